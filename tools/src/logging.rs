//! Messages: env_logger's filter (`RUST_LOG`) and format, and where they go.
//!
//! A daemon has nobody to talk to once it is live: it then writes to its log file,
//! else to syslog, else nowhere. Until it is live, its messages go to the program
//! that started it, which shows them.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use log::{Level, LevelFilter};

/// Where messages go.
enum Sink {
    /// Standard error, or what stands for it.
    Stream(Box<dyn Write + Send>),
    /// A stream that somebody reads for now, and a file.
    Both(Box<dyn Write + Send>, File),
    /// `/dev/log`.
    Syslog(UnixDatagram),
    /// Nowhere.
    Nobody,
}

/// A way to send messages elsewhere later.
#[derive(Clone)]
pub struct LogTarget(Arc<Mutex<Sink>>);

impl LogTarget {
    fn set(&self, sink: Sink) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    /// To syslog, or nowhere when there is none.
    fn to_syslog(&self) {
        let socket = UnixDatagram::unbound().and_then(|socket| {
            socket.connect("/dev/log")?;
            // A full log must not stop a filesystem.
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        self.set(socket.map_or(Sink::Nobody, Sink::Syslog));
    }

    /// To the end of a file too.
    ///
    /// # Errors
    /// Those of opening it.
    pub fn also_to_file(&self, path: &Path) -> io::Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sink = match std::mem::replace(&mut *sink, Sink::Nobody) {
            Sink::Stream(stream) | Sink::Both(stream, _) => Sink::Both(stream, file),
            Sink::Syslog(_) | Sink::Nobody => Sink::Stream(Box::new(file)),
        };
        Ok(())
    }

    /// No more to the stream: to the file that was named, else as [`LogTarget::to_syslog`].
    pub fn leave_stream(&self) {
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *sink, Sink::Nobody) {
            Sink::Both(_, file) => *sink = Sink::Stream(Box::new(file)),
            _ => {
                drop(sink);
                self.to_syslog();
            }
        }
    }
}

/// Sets the logger up: messages of `level` and above, if `RUST_LOG` does not say
/// otherwise, to `stream`.
pub fn init(level: LevelFilter, stream: Box<dyn Write + Send>) -> LogTarget {
    let target = LogTarget(Arc::new(Mutex::new(Sink::Stream(stream))));
    let env = env_logger::Env::default();
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).parse_env(env);
    let for_format = target.clone();
    builder.format(move |_, record| {
        for_format.write(record.level(), &format!("{}", record.args()));
        Ok(())
    });
    // A second logger in one process (tests) is no reason to fail.
    let _ = builder.try_init();
    let hook = target.clone();
    std::panic::set_hook(Box::new(move |info| hook.write(Level::Error, &info.to_string())));
    target
}

impl LogTarget {
    /// One message. What cannot be written is lost: there is nobody to tell.
    fn write(&self, level: Level, message: &str) {
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line = || match level {
            Level::Error | Level::Warn => format!("uext: {message}\n"),
            _ => format!("uext: {}: {message}\n", level.as_str().to_lowercase()),
        };
        let _ = match &mut *sink {
            Sink::Stream(stream) => stream.write_all(line().as_bytes()),
            Sink::Both(stream, file) => {
                let shown = stream.write_all(line().as_bytes());
                file.write_all(line().as_bytes()).and(shown)
            }
            Sink::Syslog(socket) => socket.send(syslog_line(level, message).as_bytes()).map(drop),
            Sink::Nobody => Ok(()),
        };
    }
}

/// A message as RFC 3164 has it on the local socket, from the facility "daemon".
fn syslog_line(level: Level, message: &str) -> String {
    const DAEMON: u32 = 3 << 3;
    let severity = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    format!("<{}>uext[{}]: {message}", DAEMON | severity, std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syslog_lines_have_priority_and_process() {
        let line = syslog_line(Level::Warn, "disk is slow");
        assert_eq!(line, format!("<28>uext[{}]: disk is slow", std::process::id()));
    }
}
