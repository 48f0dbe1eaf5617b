//! Running a model under shuttle: how many schedules, which seed, and how to run a
//! failure again.
//!
//! - `UEXT_MODEL_FACTOR=n`: n times as many schedules as the test asks for.
//! - `UEXT_MODEL_SEED=n`: the seed a run printed; the same schedules again.
//! - `UEXT_MODEL_REPLAY=file`: only the schedule in the file, which a failure names.

use std::env;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Bytes of stack of a model's threads.
const STACK_BYTES: usize = 512 << 10;
/// A schedule of so many steps goes round in circles.
const MOST_STEPS: usize = 2_000_000;
/// Preemptions that PCT places.
const PCT_DEPTH: usize = 3;

/// Runs `model` under `schedules` schedules times `UEXT_MODEL_FACTOR`: half of them
/// chosen at random, half by PCT, which finds what needs few preemptions.
///
/// # Panics
/// When one of the schedules panics, deadlocks or does not end.
pub fn explore(name: &str, schedules: usize, model: impl Fn() + Send + Sync + 'static) {
    let model: Arc<dyn Fn() + Send + Sync> = Arc::new(model);
    if let Some(file) = env::var_os("UEXT_MODEL_REPLAY") {
        let text = std::fs::read_to_string(&file).expect("the schedule's file");
        run(ReplayScheduler::new_from_encoded(text.trim()), &model);
        return;
    }
    let schedules = schedules * usize::try_from(number("UEXT_MODEL_FACTOR").unwrap_or(1)).unwrap();
    let seed = number("UEXT_MODEL_SEED").unwrap_or_else(fresh_seed);
    say(format_args!("model {name}: {schedules} schedules, UEXT_MODEL_SEED={seed}"));
    let (half, begun) = (schedules / 2, Instant::now());
    let random = run(RandomScheduler::new_from_seed(seed, schedules - half), &model);
    let pct = run(PctScheduler::new_from_seed(seed, PCT_DEPTH, half), &model);
    let seconds = begun.elapsed().as_secs_f64();
    say(format_args!("model {name}: {random} random and {pct} PCT schedules in {seconds:.1} s"));
}

/// Whether and after how many schedules `model`, which is wrong, fails within `most`:
/// shows that a model can fail.
///
/// # Panics
/// When it doesn't.
pub fn must_fail(name: &str, most: usize, model: impl Fn() + Send + Sync + 'static) {
    let tried = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = tried.clone();
    let model: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        // WHY-RELAXED: a count.
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    let mut config = config();
    config.failure_persistence = FailurePersistence::None;
    let seed = number("UEXT_MODEL_SEED").unwrap_or_else(fresh_seed);
    let runner = Runner::new(RandomScheduler::new_from_seed(seed, most), config);
    let result = catch_unwind(AssertUnwindSafe(|| runner.run(move || model())));
    // WHY-RELAXED: a count.
    let tried = tried.load(std::sync::atomic::Ordering::Relaxed);
    assert!(result.is_err(), "model {name}: the planted defect survived {tried} schedules");
    say(format_args!("model {name}: the planted defect was found by schedule {tried}"));
}

/// A number that belongs to the schedule: the same when it is run again.
pub fn random() -> u64 {
    use shuttle::rand::RngCore as _;
    shuttle::rand::thread_rng().next_u64()
}

/// A number below `bound`, as [`random`].
pub fn below(bound: u64) -> u64 {
    random() % bound
}

fn run<S: Scheduler + 'static>(scheduler: S, model: &Arc<dyn Fn() + Send + Sync>) -> usize {
    let model = model.clone();
    Runner::new(scheduler, config()).run(move || model())
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = MaxSteps::FailAfter(MOST_STEPS);
    config.silence_warnings = true;
    let dir = env::var_os("UEXT_MODEL_DIR").map_or_else(env::temp_dir, PathBuf::from);
    config.failure_persistence = FailurePersistence::File(Some(dir));
    config
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Whatever its bits: they are printed.
    now.as_nanos() as u64
}

/// To stderr past the test harness's capture, so that counts and seeds show in any run.
fn say(text: std::fmt::Arguments<'_>) {
    let mut line = String::new();
    let _ = writeln!(line, "{text}");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}
