//! Workers that stand in for others which work on after their reply.
//!
//! A large write is answered before the disk has it, so whoever wrote sends the next at once;
//! that one waits for the first, and two workers are gone for one writer. So for each worker
//! that has answered and is not back a stand-in takes a request: nobody else waits for the disk.
//! It ends with one request, be it that one which it waited for when the worker was back.
//!
//! Locks: `state`, a leaf.

use uext_sync::{Condvar, Mutex};

/// Who is away, and who stands in.
#[derive(Default)]
pub(crate) struct StandIns {
    state: Mutex<State>,
    /// More are away than stand in, or it is over.
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    /// Workers that have answered and work on.
    away: usize,
    /// Stand-ins with a request, or waiting for one.
    standing: usize,
    closed: bool,
}

impl StandIns {
    /// The calling thread has answered its request and works on, until what this gives is
    /// dropped.
    pub fn away(&self) -> Away<'_> {
        let mut state = self.state.lock();
        state.away += 1;
        if state.away > state.standing {
            self.wanted.notify_one();
        }
        Away(self)
    }

    /// Waits until one is wanted, who then takes one request; `None` when it is over.
    pub fn stand(&self) -> Option<Standing<'_>> {
        let mut state = self.state.lock();
        while !state.closed && state.away <= state.standing {
            self.wanted.wait(&mut state);
        }
        if state.closed {
            return None;
        }
        state.standing += 1;
        Some(Standing(self))
    }

    /// Lets all go who wait to be wanted.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.wanted.notify_all();
    }
}

/// See [`StandIns::away`].
pub(crate) struct Away<'a>(&'a StandIns);

impl Drop for Away<'_> {
    fn drop(&mut self) {
        self.0.state.lock().away -= 1;
    }
}

/// See [`StandIns::stand`].
pub(crate) struct Standing<'a>(&'a StandIns);

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.state.lock().standing -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    const A_WHILE: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn one_stands_for_each_who_is_away_and_all_go_at_the_end() {
        let stand_ins = StandIns::default();
        let (send, recv) = channel();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let (send, stand_ins) = (send.clone(), &stand_ins);
                scope.spawn(move || {
                    while let Some(standing) = stand_ins.stand() {
                        send.send(Some(standing)).unwrap();
                    }
                    send.send(None).unwrap();
                });
            }
            assert!(recv.recv_timeout(A_WHILE).is_err(), "nobody is away");
            let (first, second) = (stand_ins.away(), stand_ins.away());
            let standing = [(); 2].map(|()| recv.recv_timeout(LONG).unwrap().unwrap());
            assert!(recv.recv_timeout(A_WHILE).is_err(), "two are away");
            drop((first, second));
            drop(standing);
            assert!(recv.recv_timeout(A_WHILE).is_err(), "both are back");
            let third = stand_ins.away();
            let _standing = recv.recv_timeout(LONG).unwrap().unwrap();
            drop(third);
            stand_ins.close();
            for _ in 0..3 {
                assert!(recv.recv_timeout(LONG).unwrap().is_none());
            }
        });
    }
}
