//! A progress bar for what takes over a second, when somebody looks.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long nothing is shown.
const PATIENCE: Duration = Duration::from_secs(1);

/// The bar; hidden at first, and for good when stderr is no terminal.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    waiting: RefCell<bool>,
}

impl Progress {
    /// Shown after a second if `wanted` and stderr is a terminal.
    pub fn new(wanted: bool) -> Self {
        let bar = ProgressBar::hidden();
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let waiting = RefCell::new(wanted && std::io::stderr().is_terminal());
        Self { bar, started: Instant::now(), waiting }
    }

    /// A new part of the work, of `bytes` bytes.
    pub fn begin(&self, what: &'static str, bytes: u64) {
        self.bar.set_message(what);
        self.bar.set_length(bytes);
        self.bar.set_position(0);
        self.show_when_due();
    }

    /// So much of the part is done.
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.show_when_due();
    }

    fn show_when_due(&self) {
        let mut waiting = self.waiting.borrow_mut();
        if *waiting && self.started.elapsed() >= PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            *waiting = false;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
