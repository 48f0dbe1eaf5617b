//! One worker alone, for as long as it is enough.
//!
//! A request wakes a worker that waits for one, even where another looks for requests
//! (`spin`) and has it first. Waking a CPU in vain can cost the program that asked more than its
//! request does. So when the one that looks finds request after request and none of them had
//! to wait for it, the others rest instead of waiting: each takes one more request, for which
//! the one doesn't look, and is not woken by any after that.
//!
//! They are back when the one is to serve what takes long, when requests have waited for it (but
//! not in a [`Crowd`], where the others would be of no use), and when it has taken none for
//! [`GUARD`], which one of those that rest watches: whatever holds up the one does so to nobody
//! else for more than twice that.
//!
//! Where the one goes to its client ([`crate::beside`]), it is the one who watches that makes it a
//! thread that others can keep from running, and a thread like any other again.
//!
//! Locks: `state`, a leaf. A thread that can be kept from running takes it nowhere, for it is what
//! who watches needs.

use std::time::Duration;

use uext_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use uext_sync::{Condvar, Mutex};

use crate::beside::Seat;
use crate::crowd::Crowd;

/// How often it is looked whether a request holds up all others.
const GUARD: Duration = Duration::from_millis(2);
/// Requests in a row that must be found before one worker is left alone, at first.
const FEW: u32 = 32;
/// The same after spells that were short again and again.
const MANY: u32 = 4096;
/// A spell of fewer requests is short.
const SHORT: u32 = 512;
/// What a request that had to wait weighs, in requests that didn't.
const WAITED: u32 = 8;

/// What all workers of a connection know of it.
pub(crate) struct Alone {
    /// How many may rest.
    others: usize,
    guard: Duration,
    /// Whether others are to rest.
    /// WHY-RELAXED: changed under `state`, under which it is looked at before anybody rests; who
    /// sees it late elsewhere takes one request more or less.
    on: AtomicBool,
    /// Requests the one has taken. WHY-RELAXED: only whether it stands still is asked.
    taken: AtomicU64,
    /// Whether there is a seat in `state`. WHY-RELAXED: changed under the lock; the one, which
    /// looks, is told of what changes by `on` too, or changes it itself.
    beside: AtomicBool,
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Default)]
struct State {
    resting: usize,
    /// Whether one of them watches.
    guarded: bool,
    closed: bool,
    /// What the one was before it went to its client: only while others are to rest.
    seat: Option<Seat>,
    /// Whether it can be kept from running.
    seated: bool,
}

impl Alone {
    /// Of one worker and so many others.
    pub fn new(others: usize) -> Self {
        let (on, beside) = (AtomicBool::new(false), AtomicBool::new(false));
        let taken = AtomicU64::new(0);
        let (state, over) = (Mutex::default(), Condvar::new());
        Self { others, guard: GUARD, on, beside, taken, state, over }
    }

    /// Of which whoever rests looks after so long: a test may be held up.
    #[cfg(test)]
    pub fn guarded(others: usize, guard: Duration) -> Self {
        Self { guard, ..Self::new(others) }
    }

    #[cfg(test)]
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed) // WHY-RELAXED: see there
    }

    /// Others rest from now on.
    fn begin(&self) {
        let state = self.state.lock();
        self.on.store(!state.closed && self.others > 0, Ordering::Relaxed); // WHY-RELAXED: see there
    }

    /// Whoever rests is back.
    fn end(&self) {
        if self.is_on() {
            let mut state = self.state.lock();
            self.give_back(&mut state);
            self.on.store(false, Ordering::Relaxed); // WHY-RELAXED: see there
            self.over.notify_all();
        }
    }

    /// Whether others still wait for requests, though they are to rest.
    fn is_awaited(&self) -> bool {
        self.is_on() && self.state.lock().resting < self.others
    }

    /// Whether all others rest, one of whom watches.
    pub fn all_rest(&self) -> bool {
        self.is_on() && self.state.lock().resting == self.others
    }

    /// The one has gone to its client, with all others at rest; it was this before. Whoever
    /// watches makes the rest of it.
    pub fn sit(&self, seat: &Seat) {
        let mut state = self.state.lock();
        if self.is_on() && state.resting == self.others {
            state.seat = Some(seat.clone());
            self.beside.store(true, Ordering::Relaxed); // WHY-RELAXED: see there
        }
    }

    /// Whether it is there still.
    pub fn is_beside(&self) -> bool {
        self.beside.load(Ordering::Relaxed) // WHY-RELAXED: see there
    }

    /// It goes back, and nobody can keep it from running.
    pub fn stand(&self) {
        self.give_back(&mut self.state.lock());
    }

    fn give_back(&self, state: &mut State) {
        self.beside.store(false, Ordering::Relaxed); // WHY-RELAXED: see there
        state.seated = false;
        if let Some(seat) = state.seat.take() {
            seat.give_back_all();
        }
    }

    fn seat(state: &mut State) {
        if !state.seated {
            state.seated = state.seat.as_ref().is_some_and(Seat::sit);
        }
    }

    /// What whoever watches does in time.
    #[cfg(test)]
    pub fn seat_now(&self) {
        Self::seat(&mut self.state.lock());
    }

    /// Waits, as one of the others, until there is something to do.
    pub fn rest(&self) {
        if !self.is_on() {
            return;
        }
        let mut state = self.state.lock();
        state.resting += 1;
        while self.is_on() {
            if state.guarded {
                self.over.wait(&mut state);
                continue;
            }
            state.guarded = true;
            let before = self.taken.load(Ordering::Relaxed); // WHY-RELAXED: see there
            let in_time = !self.over.wait_for(&mut state, self.guard).timed_out();
            state.guarded = false;
            if in_time {
                continue;
            }
            if self.taken.load(Ordering::Relaxed) == before {
                self.give_back(&mut state);
                // WHY-RELAXED: see there
                self.on.store(false, Ordering::Relaxed);
                self.over.notify_all();
            } else {
                Self::seat(&mut state);
            }
        }
        state.resting -= 1;
    }

    /// Nobody rests any more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        self.give_back(&mut state);
        self.on.store(false, Ordering::Relaxed); // WHY-RELAXED: see there
        self.over.notify_all();
    }
}

/// What the one has seen of its requests.
pub(crate) struct Lonely {
    /// What speaks against being alone: nothing at 0.
    pressure: u32,
    /// With how much it begins.
    need: u32,
    /// Requests since it was alone; `None`: it isn't.
    spell: Option<u32>,
    crowd: Crowd,
}

impl Lonely {
    pub fn new() -> Self {
        Self::among(Crowd::new())
    }

    pub fn among(crowd: Crowd) -> Self {
        Self { pressure: FEW, need: FEW, spell: None, crowd }
    }

    /// A request of thread `client` was taken.
    pub fn took(&mut self, alone: &Alone, client: u32) {
        self.crowd.took(client);
        let Some(spell) = &mut self.spell else { return };
        *spell = spell.saturating_add(1);
        alone.taken.fetch_add(1, Ordering::Relaxed); // WHY-RELAXED: see there
        if !alone.is_on() {
            self.stop(alone);
        }
    }

    /// The request was served.
    pub fn served(&mut self) {
        self.crowd.served();
    }

    /// Whether what comes is left to others, so that they rest after it.
    pub fn leaves_it(&self, alone: &Alone) -> bool {
        // One that is held up doesn't rest for long.
        self.spell.is_some_and(|spell| spell < FEW) && alone.is_awaited()
    }

    /// It was found by looking, and had waited for that or not.
    pub fn found(&mut self, alone: &Alone, waited: bool) {
        if waited && !self.crowd.is_there() {
            self.pressure = (self.pressure + WAITED).min(self.need);
            if self.pressure >= FEW {
                self.stop(alone);
            }
        } else {
            self.pressure = self.pressure.saturating_sub(1);
            if self.pressure == 0 && self.spell.is_none() {
                self.spell = Some(0);
                alone.begin();
            }
        }
    }

    /// What comes takes long, or requests are not looked for any more.
    pub fn stop(&mut self, alone: &Alone) {
        if let Some(spell) = self.spell.take() {
            self.need = if spell < SHORT { (2 * self.need).min(MANY) } else { FEW };
            alone.end();
        }
        self.pressure = self.need;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    const NEVER: Duration = Duration::from_secs(3600);
    const A_WHILE: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_secs(30);

    /// Runs `one` beside two others, which say so whenever they don't rest.
    fn beside_two(alone: &Alone, one: impl FnOnce(&Receiver<()>)) {
        let (send, awake) = channel();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let send = send.clone();
                scope.spawn(move || {
                    while !alone.state.lock().closed {
                        alone.rest();
                        send.send(()).unwrap();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            let _closed = Closed(alone);
            one(&awake);
        });
    }

    /// Lets the others go, also when a test fails.
    struct Closed<'a>(&'a Alone);

    impl Drop for Closed<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }

    /// Takes requests, each of which has to be looked for, until others are to rest; how many.
    fn until_alone(lonely: &mut Lonely, alone: &Alone) -> u32 {
        let mut count = 0;
        while !alone.is_on() {
            lonely.took(alone, 1);
            lonely.found(alone, false);
            count += 1;
            assert!(count <= 2 * MANY);
        }
        count
    }

    #[test]
    fn others_rest_while_requests_are_found_and_are_back_when_they_waited() {
        let (alone, mut lonely) = (Alone::guarded(2, NEVER), Lonely::among(Crowd::default()));
        beside_two(&alone, |awake| {
            awake.recv_timeout(LONG).unwrap();
            assert_eq!(until_alone(&mut lonely, &alone), FEW);
            while lonely.leaves_it(&alone) {
                std::thread::sleep(Duration::from_micros(100));
            }
            let begin = Instant::now();
            awake.try_iter().for_each(drop);
            while begin.elapsed() < A_WHILE {
                lonely.took(&alone, 1);
                // One in sixteen is bad luck.
                for waited in 0..16 {
                    lonely.found(&alone, waited == 0);
                }
            }
            assert!(awake.try_recv().is_err(), "both rest");
            for _ in 0..FEW / WAITED {
                assert!(alone.is_on());
                lonely.found(&alone, true);
            }
            awake.recv_timeout(LONG).unwrap();
        });
    }

    #[test]
    fn others_are_back_when_the_one_takes_no_request() {
        let (alone, mut lonely) = (Alone::new(2), Lonely::among(Crowd::default()));
        beside_two(&alone, |awake| {
            until_alone(&mut lonely, &alone);
            let begin = Instant::now();
            while alone.is_on() {
                assert!(begin.elapsed() < LONG, "nobody took a request for so long");
                std::thread::sleep(Duration::from_millis(1));
            }
            awake.try_iter().for_each(drop);
            awake.recv_timeout(LONG).unwrap();
            until_alone(&mut lonely, &alone);
        });
    }

    #[test]
    fn who_is_not_left_alone_for_long_waits_for_longer() {
        let (alone, mut lonely) = (Alone::guarded(1, NEVER), Lonely::among(Crowd::default()));
        for need in [FEW, 2 * FEW, 4 * FEW] {
            assert_eq!(until_alone(&mut lonely, &alone), need);
            lonely.stop(&alone);
        }
        assert_eq!(until_alone(&mut lonely, &alone), 8 * FEW);
        for _ in 0..SHORT {
            lonely.took(&alone, 1);
        }
        lonely.stop(&alone);
        assert_eq!(until_alone(&mut lonely, &alone), FEW);
    }

    #[test]
    fn a_crowd_is_served_alone_though_it_waits() {
        let (alone, mut lonely) = (Alone::guarded(1, NEVER), Lonely::among(Crowd::that_is_there()));
        for _ in 0..FEW {
            assert!(!alone.is_on());
            lonely.found(&alone, true);
        }
        assert!(alone.is_on());
        lonely.crowd = Crowd::default();
        for _ in 0..FEW / WAITED {
            assert!(alone.is_on());
            lonely.found(&alone, true);
        }
        assert!(!alone.is_on());
    }

    #[test]
    fn nobody_is_alone_without_others_or_at_the_end() {
        for (alone, close) in [(Alone::new(0), false), (Alone::new(1), true)] {
            if close {
                alone.close();
            }
            let mut lonely = Lonely::among(Crowd::default());
            for _ in 0..2 * FEW {
                lonely.found(&alone, false);
            }
            assert!(!alone.is_on());
            alone.rest();
        }
    }
}
