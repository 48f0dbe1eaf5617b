//! What a run is shown as: a table, and JSON.

use serde_json::{Value, json};

use super::coordinator::Run;
use super::message::Finding;
use super::plan::{Plan, Target};
use super::stats::Op;
use super::verify::Verdict;

/// Findings and failures that are printed.
const SHOWN: usize = 20;

/// A run and what was found in it.
pub struct Report<'a> {
    /// What was done.
    pub plan: &'a Plan,
    /// What it came to.
    pub run: &'a Run,
    /// What the target was found to be at the end.
    pub verdict: Option<&'a Result<Verdict, String>>,
}

/// Name of an error number.
fn errno_name(errno: i32) -> String {
    match errno {
        0 => "other".into(),
        errno => format!("{:?}", nix::errno::Errno::from_raw(errno)),
    }
}

impl Report<'_> {
    /// How the run ended, in a word.
    pub fn status(&self) -> &'static str {
        if self.findings() > 0 {
            "wrong data"
        } else if !self.run.failures.is_empty() || self.verdict.is_some_and(Result::is_err) {
            "failed"
        } else if !self.run.killed.is_empty() {
            "clients lost"
        } else if self.run.interrupted {
            "interrupted"
        } else {
            "good"
        }
    }

    /// The exit status that says it.
    pub fn exit_code(&self) -> i32 {
        match self.status() {
            "good" => 0,
            "wrong data" => super::EXIT_WRONG,
            "interrupted" => super::EXIT_INTERRUPTED,
            _ => super::EXIT_FAILED,
        }
    }

    /// How much is wrong with the data.
    pub fn findings(&self) -> u64 {
        let verdict = self.verdict.and_then(|verdict| verdict.as_ref().ok());
        self.run.findings.0 + verdict.map_or(0, |verdict| verdict.count)
    }

    /// Its name.
    pub fn target(&self) -> String {
        match &self.plan.target {
            Target::Directory(path) | Target::Device(path, _) => path.display().to_string(),
            Target::Nbd(address, _) => address.clone(),
        }
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.run.totals.sums().0 as f64 / self.seconds()
    }

    /// How long it ran.
    pub fn seconds(&self) -> f64 {
        self.run.took.as_secs_f64().max(1e-9)
    }

    /// The coordinator's share of one processor, percent.
    pub fn own_percent(&self) -> f64 {
        self.run.own_cpu.as_secs_f64() * 100.0 / self.seconds()
    }

    /// Prints the table.
    pub fn print(&self) {
        let (plan, run) = (self.plan, self.run);
        println!(
            "{} on {}: {} clients, {} threads each, {:.1} s, seed {}",
            plan.workload.name,
            self.target(),
            plan.clients,
            plan.threads,
            self.seconds(),
            plan.seed
        );
        println!(
            "{:10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "operation",
            "count",
            "per s",
            "MB/s",
            "mean us",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "max us"
        );
        for (op, figures) in Op::ALL.iter().zip(&run.totals.ops) {
            if figures.count() == 0 {
                continue;
            }
            let megabytes = match figures.bytes {
                0 => String::new(),
                bytes => format!("{:.1}", bytes as f64 / 1e6 / self.seconds()),
            };
            println!(
                "{:10} {:>10} {:>10.0} {:>9} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                op.name(),
                figures.count(),
                figures.count() as f64 / self.seconds(),
                megabytes,
                figures.mean(),
                figures.percentile(50.0),
                figures.percentile(99.0),
                figures.percentile(99.9),
                figures.percentile(100.0),
            );
        }
        let (count, bytes) = run.totals.sums();
        println!(
            "{count} operations ({:.0}/s) and {:.1} MB ({:.1} MB/s) in {} steps; coordinator {:.1} % of a CPU",
            self.rate(),
            bytes as f64 / 1e6,
            bytes as f64 / 1e6 / self.seconds(),
            run.steps,
            self.own_percent()
        );
        self.print_problems();
    }

    fn print_problems(&self) {
        let run = self.run;
        for (errno, count) in &run.errors {
            println!("errors: {count} x {}", errno_name(*errno));
        }
        print_some("failed", &run.failures);
        for (client, how) in run.killed.iter().take(SHOWN) {
            println!("lost: client {client} {how}");
        }
        if run.recovered > 0 {
            println!("recovered: {} locks of dead clients", run.recovered);
        }
        println!("verified: {} blocks as they were read, {} wrong", run.verified, run.findings.0);
        print_some("wrong", &run.findings.1);
        match self.verdict {
            None => {}
            Some(Ok(verdict)) => print_verdict(verdict),
            Some(Err(problem)) => println!("failed: verification: {problem}"),
        }
        println!("result: {}", self.status());
    }

    /// All of it.
    pub fn json(&self) -> Value {
        let (plan, run) = (self.plan, self.run);
        let (count, bytes) = run.totals.sums();
        let ops: serde_json::Map<String, Value> = Op::ALL
            .iter()
            .zip(&run.totals.ops)
            .filter(|(_, figures)| figures.count() > 0)
            .map(|(op, figures)| {
                let value = json!({
                    "count": figures.count(),
                    "per_second": figures.count() as f64 / self.seconds(),
                    "bytes": figures.bytes,
                    "bytes_per_second": figures.bytes as f64 / self.seconds(),
                    "mean_us": figures.mean(),
                    "p50_us": figures.percentile(50.0),
                    "p90_us": figures.percentile(90.0),
                    "p95_us": figures.percentile(95.0),
                    "p99_us": figures.percentile(99.0),
                    "p99_9_us": figures.percentile(99.9),
                    "max_us": figures.percentile(100.0),
                });
                (op.name().to_owned(), value)
            })
            .collect();
        let errors: serde_json::Map<String, Value> =
            run.errors.iter().map(|(errno, n)| (errno_name(*errno), json!(n))).collect();
        let killed: Vec<Value> =
            run.killed.iter().map(|(n, how)| json!({"client": n, "how": how})).collect();
        json!({
            "status": self.status(),
            "exit": self.exit_code(),
            "target": self.target(),
            "workload": plan.workload,
            "clients": plan.clients,
            "threads": plan.threads,
            "seed": plan.seed,
            "seconds": self.seconds(),
            "prepared_seconds": run.prepared.as_secs_f64(),
            "steps": run.steps,
            "operations": count,
            "operations_per_second": self.rate(),
            "bytes": bytes,
            "bytes_per_second": bytes as f64 / self.seconds(),
            "coordinator_cpu_percent": self.own_percent(),
            "coordinator_max_rss_kib": run.own_memory,
            "ops": ops,
            "errors": errors,
            "failures": run.failures,
            "killed": killed,
            "recovered_locks": run.recovered,
            "interrupted": run.interrupted,
            "verified_blocks": run.verified,
            "findings_count": run.findings.0,
            "findings": run.findings.1,
            "verification": self.verdict.map(|verdict| match verdict {
                Ok(verdict) => verdict_json(verdict),
                Err(problem) => json!({ "failed": problem }),
            }),
            "intervals": self.intervals(),
        })
    }

    fn intervals(&self) -> Vec<Value> {
        let intervals = self.run.totals.intervals.iter();
        intervals
            .map(|interval| {
                let ops: serde_json::Map<String, Value> = Op::ALL
                    .iter()
                    .zip(&interval.ops)
                    .filter(|(_, op)| op.count > 0)
                    .map(|(kind, op)| {
                        let value = json!({
                            "count": op.count, "bytes": op.bytes,
                            "p50_us": op.p50, "p99_us": op.p99, "max_us": op.max,
                        });
                        (kind.name().to_owned(), value)
                    })
                    .collect();
                json!({"end": interval.end, "seconds": interval.seconds, "ops": ops})
            })
            .collect()
    }
}

fn print_some<T: std::fmt::Display>(word: &str, list: &[T]) {
    for item in list.iter().take(SHOWN) {
        println!("{word}: {item}");
    }
    if list.len() > SHOWN {
        println!("{word}: and {} more", list.len() - SHOWN);
    }
}

/// Prints what a verification came to.
pub fn print_verdict(verdict: &Verdict) {
    let Verdict { files, blocks, promised, gone, mixed, count, findings } = verdict;
    print_some::<Finding>("wrong", findings);
    println!(
        "verified: {files} files, {blocks} blocks ({promised} promised); {gone} begun and not there, {mixed} half written, which nobody promised"
    );
    println!("verified: {count} wrong");
}

/// A verification as JSON.
pub fn verdict_json(verdict: &Verdict) -> Value {
    json!({
        "files": verdict.files,
        "blocks": verdict.blocks,
        "promised": verdict.promised,
        "gone": verdict.gone,
        "mixed": verdict.mixed,
        "findings_count": verdict.count,
        "findings": verdict.findings,
    })
}
