//! The page of a run: one file, without anything from elsewhere.
//!
//! Pictures are SVG that is made here: throughput of each kind of operation, bytes, and the
//! 99th percentile, over time; latency by percentile. Colours follow the reader's scheme.

use std::fmt::Write as _;

use super::message::Finding;
use super::report::Report;
use super::stats::{Figures, Interval, Op};

/// Kinds that get a line of their own in a picture.
const LINES: usize = 6;
/// Picture's size, with room for numbers at the left and below.
const WIDTH: f64 = 860.0;
/// Room right of a picture, for half a label.
const RIGHT: f64 = 24.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 28.0;
const TOP: f64 = 12.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--fg:#1d2327;--soft:#667079;--line:#e2e5e8;\
--c0:#2563eb;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#0b7285;--c5:#a86f00;--bad:#c92a2a;--good:#2b8a3e}\
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2125;--fg:#e6e9ec;--soft:#98a3ad;\
--line:#31383e;--c0:#74a5ff;--c1:#ff9466;--c2:#69cf7f;--c3:#d890ee;--c4:#5cc5d8;--c5:#e0b04d;\
--bad:#ff8787;--good:#69cf7f}}\
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);\
font:15px/1.5 system-ui,sans-serif}main{max-width:960px;margin:0 auto;padding:32px 20px 64px}\
h1{font-size:24px;margin:0}h2{font-size:16px;margin:0 0 8px}p{margin:4px 0;color:var(--soft)}\
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}\
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}\
.tile{padding:12px 16px}.tile b{display:block;font-size:22px;font-weight:600;\
font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}\
section{padding:16px 20px;margin:14px 0;overflow-x:auto}svg{display:block;width:100%;height:auto}\
svg text{fill:var(--soft);font:11px system-ui,sans-serif}\
.grid{stroke:var(--line);stroke-width:1}.l{fill:none;stroke-width:1.8;stroke-linejoin:round}\
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin-top:6px}\
.key i{display:inline-block;width:14px;height:3px;border-radius:2px;margin:0 6px 3px 0}\
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}\
th,td{text-align:right;padding:5px 8px;border-bottom:1px solid var(--line);white-space:nowrap}\
th{color:var(--soft);font-weight:500}th:first-child,td:first-child{text-align:left}\
tr:last-child td{border-bottom:0}.good{color:var(--good)}.bad{color:var(--bad)}\
ul{margin:0;padding-left:20px}li{overflow-wrap:anywhere}";

/// One line of a picture: its name, and its points.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The page.
pub fn page(report: &Report<'_>) -> String {
    let name = escape(&report.plan.workload.name);
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>uext drive: {name}</title><style>{STYLE}</style><main>"
    );
    let status = report.status();
    let class = if report.exit_code() == 0 { "good" } else { "bad" };
    let _ = write!(
        page,
        "<h1>{name} <span class=\"{class}\">{status}</span></h1><p>{} on <b>{}</b></p>\
         <p>{} clients, {} threads each, {:.1} s, seed {}</p>",
        escape(&report.plan.workload.about),
        escape(&report.target()),
        report.plan.clients,
        report.plan.threads,
        report.seconds(),
        report.plan.seed
    );
    tiles(&mut page, report);
    problems(&mut page, report);
    pictures(&mut page, report);
    table(&mut page, report);
    page.push_str("</main></html>\n");
    page
}

fn tiles(page: &mut String, report: &Report<'_>) {
    let (count, bytes) = report.run.totals.sums();
    let bytes = bytes as f64 / report.seconds();
    let tiles = [
        (short(report.rate()), "operations a second"),
        (format!("{}B", short(bytes)), "a second"),
        (short(count as f64), "operations"),
        (short(report.run.verified as f64), "blocks verified"),
        (report.findings().to_string(), "wrong"),
        (format!("{:.1} %", report.own_percent()), "coordinator, of a CPU"),
    ];
    page.push_str("<div class=\"tiles\">");
    for (value, what) in tiles {
        let _ = write!(page, "<div class=\"tile\"><b>{value}</b><span>{what}</span></div>");
    }
    page.push_str("</div>");
}

fn problems(page: &mut String, report: &Report<'_>) {
    let run = report.run;
    let verdict = report.verdict.and_then(|verdict| verdict.as_ref().ok());
    let mut lines: Vec<String> = run.failures.iter().map(ToString::to_string).collect();
    lines.extend(run.killed.iter().map(|(client, how)| format!("client {client} {how}")));
    lines.extend(run.findings.1.iter().map(Finding::to_string));
    lines.extend(verdict.into_iter().flat_map(|v| v.findings.iter().map(Finding::to_string)));
    if let Some(Err(problem)) = report.verdict {
        lines.push(problem.clone());
    }
    if lines.is_empty() {
        return;
    }
    page.push_str("<section><h2 class=\"bad\">Problems</h2><ul>");
    for line in lines.iter().take(50) {
        let _ = write!(page, "<li>{}</li>", escape(line));
    }
    if lines.len() > 50 {
        let _ = write!(page, "<li>and {} more</li>", lines.len() - 50);
    }
    page.push_str("</ul></section>");
}

/// The kinds that there was most of.
fn main_ops(report: &Report<'_>) -> Vec<usize> {
    let ops = &report.run.totals.ops;
    let mut kinds: Vec<usize> = (0..ops.len()).filter(|&kind| ops[kind].count() > 0).collect();
    kinds.sort_by_key(|&kind| std::cmp::Reverse(ops[kind].count()));
    kinds.truncate(LINES);
    kinds
}

fn pictures(page: &mut String, report: &Report<'_>) {
    // A last interval of a moment shows nothing but chance.
    let longest = report.run.totals.intervals.iter().map(|i| i.seconds).fold(0.0, f64::max);
    let intervals: Vec<&Interval> =
        report.run.totals.intervals.iter().filter(|i| i.seconds > longest / 2.0).collect();
    if intervals.is_empty() {
        return;
    }
    let kinds = main_ops(report);
    let over_time = |of: &dyn Fn(&Interval, usize) -> Option<f64>| -> Vec<Series> {
        let series = kinds.iter().map(|&kind| Series {
            name: Op::ALL[kind].name().into(),
            points: intervals.iter().filter_map(|i| Some((i.end, of(i, kind)?))).collect(),
        });
        series.filter(|series| !series.points.is_empty()).collect()
    };
    let rates = over_time(&|i, kind| Some(i.ops[kind].count as f64 / i.seconds));
    picture(page, "Operations a second", "", &rates, false);
    let bytes = over_time(&|i, kind| {
        let moves = matches!(Op::ALL[kind], Op::Read | Op::Write);
        moves.then(|| i.ops[kind].bytes as f64 / i.seconds)
    });
    if bytes.iter().any(|series| series.points.iter().any(|point| point.1 > 0.0)) {
        picture(page, "Bytes a second", "B", &bytes, false);
    }
    let some = |i: &Interval, kind: usize, value: f64| (i.ops[kind].count > 0).then_some(value);
    let p99 = over_time(&|i, kind| some(i, kind, i.ops[kind].p99 / 1e6));
    picture(page, "Latency: 99 of 100 are shorter", "s", &p99, true);
    let p50 = over_time(&|i, kind| some(i, kind, i.ops[kind].p50 / 1e6));
    picture(page, "Latency: half are shorter", "s", &p50, true);
}

/// A picture of some lines over time.
fn picture(page: &mut String, title: &str, unit: &str, series: &[Series], logarithmic: bool) {
    let points = || series.iter().flat_map(|series| &series.points);
    let end = points().map(|point| point.0).fold(0.0, f64::max).max(1e-3);
    let most = points().map(|point| point.1).fold(0.0, f64::max).max(1e-9);
    let least = points().map(|point| point.1).filter(|y| *y > 0.0).fold(most, f64::min);
    let ticks = if logarithmic { decades(least, most) } else { steps(most) };
    let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end;
    let y = |value: f64| {
        let part = if logarithmic {
            (value.max(low).ln() - low.ln()) / (high.ln() - low.ln())
        } else {
            value / high
        };
        HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * part
    };
    let _ = write!(
        page,
        "<section><h2>{title}</h2><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">"
    );
    for &tick in &ticks {
        let at = y(tick);
        let _ = write!(
            page,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}{unit}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            short(tick)
        );
    }
    for tick in steps(end).into_iter().filter(|tick| *tick <= end) {
        let (at, below) = (x(tick), HEIGHT - 8.0);
        let number = (tick * 1000.0).round() / 1000.0;
        let _ = write!(
            page,
            "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{number} s</text>"
        );
    }
    for (colour, line) in series.iter().enumerate() {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1)))
            .collect();
        // A single interval is a point.
        if let [point] = &line.points[..] {
            let _ = write!(
                page,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"var(--c{colour})\"/>",
                x(point.0),
                y(point.1)
            );
        }
        let _ = write!(
            page,
            "<polyline class=\"l\" stroke=\"var(--c{colour})\" points=\"{}\"><title>{}</title></polyline>",
            points.join(" "),
            line.name
        );
    }
    page.push_str("</svg><div class=\"key\">");
    for (colour, line) in series.iter().enumerate() {
        let _ =
            write!(page, "<span><i style=\"background:var(--c{colour})\"></i>{}</span>", line.name);
    }
    page.push_str("</div></section>");
}

fn table(page: &mut String, report: &Report<'_>) {
    page.push_str(
        "<section><h2>Operations</h2><table><tr><th>operation<th>count<th>a second<th>MB/s\
         <th>mean µs<th>p50<th>p90<th>p99<th>p99.9<th>max",
    );
    for (op, figures) in Op::ALL.iter().zip(&report.run.totals.ops) {
        if figures.count() > 0 {
            row(page, op.name(), figures, report.seconds());
        }
    }
    page.push_str("</table></section>");
}

fn row(page: &mut String, name: &str, figures: &Figures, seconds: f64) {
    let megabytes = match figures.bytes {
        0 => String::new(),
        bytes => format!("{:.1}", bytes as f64 / 1e6 / seconds),
    };
    let _ = write!(
        page,
        "<tr><td>{name}<td>{}<td>{:.0}<td>{megabytes}<td>{:.1}",
        figures.count(),
        figures.count() as f64 / seconds,
        figures.mean()
    );
    for percent in [50.0, 90.0, 99.0, 99.9, 100.0] {
        let _ = write!(page, "<td>{:.1}", figures.percentile(percent));
    }
}

/// Round numbers from 0 to above `most`.
fn steps(most: f64) -> Vec<f64> {
    let rough = most / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|n| n * power).into_iter().find(|s| *s >= rough);
    let step = step.unwrap_or(rough);
    let count = (most / step - 1e-9).ceil().max(1.0);
    // At most five.
    (0..=count as u32).map(|n| f64::from(n) * step).collect()
}

/// Powers of ten around two numbers.
fn decades(least: f64, most: f64) -> Vec<f64> {
    let (low, high) = (least.log10().floor(), most.log10().ceil());
    // Some dozens at most.
    (0..=(high - low).max(1.0) as i32).map(|n| 10f64.powf(low + f64::from(n))).collect()
}

/// A number for people: three digits and a prefix.
fn short(value: f64) -> String {
    const PREFIXES: [(f64, &str); 6] =
        [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")];
    if value == 0.0 {
        return "0".into();
    }
    let (unit, prefix) =
        PREFIXES.into_iter().find(|(unit, _)| value >= *unit * 0.9995).unwrap_or((1e-6, "µ"));
    let scaled = value / unit;
    let digits = match scaled {
        s if s >= 99.95 => 0,
        s if s >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {prefix}").trim_end().to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_scales_are_round() {
        for (value, text) in [
            (0.0, "0"),
            (999.6, "1 k"),
            (1_234_567.0, "1.23 M"),
            (42.0, "42"),
            (0.000_05, "50 µ"),
            (0.01, "10 m"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!(steps(9.0), [0.0, 2.5, 5.0, 7.5, 10.0]);
        assert_eq!(decades(0.02, 0.5).len(), 3);
        assert!(steps(3e-9).len() >= 2 && decades(1.0, 1.0).len() == 2);
    }

    #[test]
    fn text_from_elsewhere_cannot_be_markup() {
        assert_eq!(escape("<b>&\""), "&lt;b&gt;&amp;&quot;");
    }
}
