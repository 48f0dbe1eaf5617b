//! Progress, as fsck(8) and people want to see it.

use std::fs::File;
use std::io::Write;

use indicatif::{ProgressBar, ProgressStyle};

/// Where progress goes.
enum Sink {
    /// Nowhere.
    Off,
    /// A bar on the terminal (`-C 0`).
    Bar(ProgressBar),
    /// Lines of `pass current total device` into a file descriptor (`-C fd`).
    Lines(File, String),
}

/// Tells how far a pass is.
pub struct Progress {
    sink: Sink,
    last: Option<(u8, u64)>,
}

impl Progress {
    /// Says nothing.
    pub fn off() -> Self {
        Self { sink: Sink::Off, last: None }
    }

    /// To a file descriptor as `-C` gives it; 0 is a bar on the terminal. A
    /// descriptor that is not open means no progress.
    pub fn to(fd: i32, device: &str) -> Self {
        let sink = if fd == 0 {
            let style = ProgressStyle::with_template("pass {msg} [{bar:40}] {percent}%")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            Sink::Bar(ProgressBar::new(100).with_style(style))
        } else {
            let path = format!("/proc/self/fd/{fd}");
            match File::options().append(true).open(path) {
                Ok(file) => Sink::Lines(file, device.to_owned()),
                Err(_) => Sink::Off,
            }
        };
        Self { sink, last: None }
    }

    /// `done` of `total` steps of a pass. Cheap to call: it acts once per percent.
    pub fn step(&mut self, pass: u8, done: u64, total: u64) {
        if matches!(self.sink, Sink::Off) {
            return;
        }
        let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
        if self.last == Some((pass, percent)) {
            return;
        }
        self.last = Some((pass, percent));
        match &mut self.sink {
            Sink::Off => {}
            Sink::Bar(bar) => {
                bar.set_message(pass.to_string());
                bar.set_position(percent);
            }
            // Progress is not worth an error.
            Sink::Lines(file, device) => drop(writeln!(file, "{pass} {done} {total} {device}")),
        }
    }

    /// Takes the bar off the terminal.
    pub fn finish(&mut self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.finish_and_clear();
        }
    }
}
