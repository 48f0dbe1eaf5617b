//! Workers that stand in for others which work on after their reply.
//!
//! A large write is answered before the disk has it, so whoever wrote sends the next at once;
//! that one waits for the first, and two workers are gone for one writer. So for each worker
//! that has answered and is not back two stand-ins take requests: nobody else waits for the disk.
//! Each ends with one request, be it that one which it waited for when the worker was back.
//! No more than so many may be away: the next large write is answered when it is done, and so
//! holds up one worker, not two.
//!
//! Locks: `state`, a leaf.

use uext_sync::{Condvar, Mutex};

/// Stand-ins for each who is away: one may be held up by the writer's next request.
pub(crate) const EACH: usize = 2;

/// Who is away, and who stands in.
pub(crate) struct StandIns {
    /// How many may be away at once.
    most: usize,
    state: Mutex<State>,
    /// Too few stand in for those who are away, or it is over.
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
    /// So many may be away at once.
    pub fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), wanted: Condvar::new() }
    }

    /// The calling thread answers its request and works on, until what this gives is dropped;
    /// nothing when too many are away.
    pub fn away(&self) -> Option<Away<'_>> {
        let mut state = self.state.lock();
        if state.away >= self.most {
            return None;
        }
        state.away += 1;
        for _ in state.standing..EACH * state.away {
            self.wanted.notify_one();
        }
        Some(Away(self))
    }

    /// Waits until one is wanted, who then takes one request; `None` when it is over.
    pub fn stand(&self) -> Option<Standing<'_>> {
        let mut state = self.state.lock();
        while !state.closed && EACH * state.away <= state.standing {
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
    fn two_stand_for_each_who_is_away_and_all_go_at_the_end() {
        let stand_ins = StandIns::new(2);
        let (send, recv) = channel();
        std::thread::scope(|scope| {
            for _ in 0..5 {
                let (send, stand_ins) = (send.clone(), &stand_ins);
                scope.spawn(move || {
                    while let Some(standing) = stand_ins.stand() {
                        send.send(Some(standing)).unwrap();
                    }
                    send.send(None).unwrap();
                });
            }
            assert!(recv.recv_timeout(A_WHILE).is_err(), "nobody is away");
            let [first, second] = [(); 2].map(|()| stand_ins.away().unwrap());
            assert!(stand_ins.away().is_none(), "two are away");
            let standing = [(); 2 * EACH].map(|()| recv.recv_timeout(LONG).unwrap().unwrap());
            assert!(recv.recv_timeout(A_WHILE).is_err(), "two are away");
            drop((first, second));
            drop(standing);
            assert!(recv.recv_timeout(A_WHILE).is_err(), "both are back");
            let third = stand_ins.away().unwrap();
            let _standing = [(); EACH].map(|()| recv.recv_timeout(LONG).unwrap().unwrap());
            drop(third);
            stand_ins.close();
            for _ in 0..5 {
                assert!(recv.recv_timeout(LONG).unwrap().is_none());
            }
        });
    }
}
