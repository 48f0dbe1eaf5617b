//! The order of locks, learned while the program runs (Linux's lockdep).
//!
//! Each lock belongs to a class: where it was made and what it holds. When a thread takes
//! a lock while it holds others, the order of their classes is noted, for the whole
//! process. A lock taken against a noted order, perhaps through other classes, is
//! reported by a panic even when no deadlock happened: two threads doing what was seen,
//! at once, can each wait for the other for ever.
//!
//! Locks of one class may be held together (two inodes, pages by index); their own order
//! is not looked at. A lock that is only tried is noted as held, not as waited for.
//! [`Class`] stands alone for what is waited for without being a lock here: a journal
//! handle, the contents of a page. [`declare`] notes an order from a crate's
//! documentation, before anybody has shown it.
//!
//! Only with debug assertions, and only when `UEXT_LOCKDEP` is set in the environment.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Most classes; a program has a few dozen.
const MAX_CLASSES: usize = 512;
const WORDS: usize = MAX_CLASSES / 64;

/// Where the two locks of an order were taken.
type Seen = (&'static Location<'static>, &'static Location<'static>);

#[derive(Default)]
struct Graph {
    ids: HashMap<(usize, &'static str), u32>,
    names: Vec<String>,
    seen: HashMap<(u32, u32), Seen>,
}

/// Bit `b` of row `a`: `b` was taken under `a`.
/// WHY-RELAXED: a row only spares the look at the graph; a bit not seen yet costs that look.
static ORDER: [[AtomicU64; WORDS]; MAX_CLASSES] =
    [const { [const { AtomicU64::new(0) }; WORDS] }; MAX_CLASSES];
static GRAPH: parking_lot::Mutex<Option<Graph>> = parking_lot::Mutex::new(None);
/// Locks given up by another thread than took them: whose, and their class.
static GIVEN_UP: parking_lot::Mutex<Vec<(u64, u32)>> = parking_lot::Mutex::new(Vec::new());
/// Whether `GIVEN_UP` has any. WHY-RELAXED: seen late, an order too many is noted.
static ANY_GIVEN_UP: AtomicBool = AtomicBool::new(false);

struct HeldLock {
    class: u32,
    at: &'static Location<'static>,
}

struct Thread {
    id: u64,
    held: Vec<HeldLock>,
}

impl Thread {
    fn new() -> Self {
        /// WHY-RELAXED: only distinct numbers are wanted.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), held: Vec::new() }
    }
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::new(Thread::new());
}

/// A class of locks.
#[derive(Debug)]
pub struct Class {
    made: &'static Location<'static>,
    name: &'static str,
    /// Its number, 0 before the first use. WHY-RELAXED: every thread finds the same one.
    id: AtomicU32,
}

/// A lock, or what is like one, that its thread holds.
#[derive(Debug)]
#[must_use]
pub struct Held {
    thread: u64,
    class: u32,
}

impl Class {
    /// The class of what is made where this is called, by name.
    #[track_caller]
    pub const fn new(name: &'static str) -> Self {
        Self { made: Location::caller(), name, id: AtomicU32::new(0) }
    }

    fn id(&self) -> u32 {
        match self.id.load(Ordering::Relaxed) {
            0 => {
                let id = register(self.made, self.name);
                self.id.store(id, Ordering::Relaxed);
                id
            }
            id => id,
        }
    }

    /// Before it is waited for: notes and checks the order, and that it is held from now on.
    #[track_caller]
    pub fn acquire(&self) -> Held {
        self.check();
        self.acquired()
    }

    /// It is held, without having been waited for.
    #[track_caller]
    pub fn acquired(&self) -> Held {
        if !enabled() {
            return Held { thread: 0, class: 0 };
        }
        let (class, at) = (self.id(), Location::caller());
        let thread = THREAD.try_with(|thread| {
            let mut thread = thread.borrow_mut();
            thread.held.push(HeldLock { class, at });
            thread.id
        });
        Held { thread: thread.unwrap_or(0), class }
    }

    /// Waiting for it here and now is in order.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn check(&self) {
        if !enabled() {
            return;
        }
        let (class, at) = (self.id(), Location::caller());
        let wrong = THREAD.try_with(|thread| {
            let mut thread = thread.borrow_mut();
            if ANY_GIVEN_UP.load(Ordering::Relaxed) {
                forget_given_up(&mut thread);
            }
            thread.held.iter().find_map(|held| note(held, class, at))
        });
        // Reported without the thread's list borrowed: unwinding gives locks up.
        if let Ok(Some(report)) = wrong
            && !std::thread::panicking()
        {
            panic!("{report}");
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.class == 0 {
            return;
        }
        let found = THREAD.try_with(|thread| {
            let mut thread = thread.borrow_mut();
            if thread.id != self.thread {
                return false;
            }
            let at = thread.held.iter().rposition(|held| held.class == self.class);
            at.map(|at| thread.held.remove(at)).is_some()
        });
        if found == Ok(false) {
            GIVEN_UP.lock().push((self.thread, self.class));
            ANY_GIVEN_UP.store(true, Ordering::Relaxed);
        }
    }
}

/// Notes that `first` comes before `then`, as a crate's documentation says.
pub fn declare(first: &Class, then: &Class) {
    if !enabled() {
        return;
    }
    let held = HeldLock { class: first.id(), at: first.made };
    let wrong = note(&held, then.id(), then.made);
    assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
}

/// Whether the order is looked at: `UEXT_LOCKDEP` is set. In this crate's tests always.
fn enabled() -> bool {
    static ENABLED: LazyLock<bool> =
        LazyLock::new(|| cfg!(test) || std::env::var_os("UEXT_LOCKDEP").is_some());
    *ENABLED
}

fn forget_given_up(thread: &mut Thread) {
    let mut given_up = GIVEN_UP.lock();
    given_up.retain(|&(owner, class)| {
        let mine = owner == thread.id;
        if mine && let Some(at) = thread.held.iter().rposition(|held| held.class == class) {
            thread.held.remove(at);
        }
        !mine
    });
    ANY_GIVEN_UP.store(!given_up.is_empty(), Ordering::Relaxed);
}

fn register(made: &'static Location<'static>, name: &'static str) -> u32 {
    let mut graph = GRAPH.lock();
    let graph = graph.get_or_insert_default();
    let key = (std::ptr::from_ref(made) as usize, name);
    if let Some(&id) = graph.ids.get(&key) {
        return id;
    }
    graph.names.push(format!("{name} (made at {}:{})", made.file(), made.line()));
    let id = u32::try_from(graph.names.len()).unwrap_or(u32::MAX);
    assert!((id as usize) < MAX_CLASSES, "too many classes of locks");
    graph.ids.insert(key, id);
    id
}

fn bit(first: u32, then: u32) -> (&'static AtomicU64, u64) {
    (&ORDER[first as usize][then as usize / 64], 1 << (then % 64))
}

/// Notes an order; a report when the opposite one is known.
fn note(held: &HeldLock, class: u32, at: &'static Location<'static>) -> Option<String> {
    if held.class == class {
        return None;
    }
    let (word, mask) = bit(held.class, class);
    // WHY-RELAXED: see `ORDER`.
    if word.load(Ordering::Relaxed) & mask != 0 {
        return None;
    }
    let mut graph = GRAPH.lock();
    let graph = graph.get_or_insert_default();
    // WHY-RELAXED: see `ORDER`.
    word.fetch_or(mask, Ordering::Relaxed);
    let report = graph.path(class, held.class).map(|path| graph.report(held, class, at, &path));
    graph.seen.entry((held.class, class)).or_insert((held.at, at));
    report
}

impl Graph {
    /// A way from one class to another along the orders seen.
    fn path(&self, from: u32, to: u32) -> Option<Vec<u32>> {
        let mut came_from = HashMap::from([(from, from)]);
        let mut next = vec![from];
        while let Some(at) = next.pop() {
            if at == to {
                let mut path = vec![to];
                while let Some(&before) = path.last().and_then(|last| came_from.get(last)) {
                    if path.last() == Some(&from) {
                        break;
                    }
                    path.push(before);
                }
                path.reverse();
                return Some(path);
            }
            for &(first, then) in self.seen.keys() {
                if first == at && !came_from.contains_key(&then) {
                    came_from.insert(then, at);
                    next.push(then);
                }
            }
        }
        None
    }

    fn name(&self, class: u32) -> &str {
        self.names.get(class as usize - 1).map_or("?", String::as_str)
    }

    fn report(&self, held: &HeldLock, class: u32, at: &Location<'_>, path: &[u32]) -> String {
        let mut text = format!(
            "lock order: {} is taken at {at} under {}, held since {}; but",
            self.name(class),
            self.name(held.class),
            held.at
        );
        for pair in path.windows(2) {
            if let Some((first, then)) = self.seen.get(&(pair[0], pair[1])) {
                text += &format!(
                    "\n  {} was taken at {then} under {}, held since {first}",
                    self.name(pair[1]),
                    self.name(pair[0])
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::{Mutex, RwLock};

    fn panics(f: impl FnOnce() + Send + 'static) -> Option<String> {
        let result = std::thread::spawn(f).join();
        result.err().map(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
    }

    #[test]
    fn an_order_turned_round_is_reported_though_nothing_deadlocks() {
        let (a, b) = (Mutex::new(1u8), Mutex::new(2u8));
        {
            let _a = a.lock();
            let _b = b.lock();
        }
        let report = panics(move || {
            let _b = b.lock();
            let _a = a.lock();
        });
        let report = report.expect("it is reported");
        assert!(report.starts_with("lock order:") && report.contains("lockdep.rs"), "{report}");
    }

    #[test]
    fn an_order_turned_round_through_a_third_lock_is_reported() {
        let (a, b, c) = (Mutex::new(1u16), RwLock::new(2u16), Mutex::new('3'));
        {
            let _a = a.lock();
            let _b = b.read();
        }
        {
            let _b = b.write();
            let _c = c.lock();
        }
        let report = panics(move || {
            let _c = c.lock();
            let _a = a.lock();
        });
        assert!(report.expect("it is reported").matches("was taken at").count() == 2);
    }

    #[test]
    fn a_lock_that_is_only_tried_has_no_order_and_one_class_none_with_itself() {
        let make = |n: i64| Mutex::new(n);
        let (a, b) = (Mutex::new(1u32), Mutex::new(2u32));
        {
            let _a = a.lock();
            let _b = b.lock();
        }
        let report = panics(move || {
            let _b = b.lock();
            let _a = a.try_lock().expect("it is free");
            let (c, d) = (make(3), make(4));
            let _c = c.lock();
            let _d = d.lock();
        });
        assert_eq!(report, None);
    }

    #[test]
    fn a_lock_given_up_by_another_thread_is_not_held_any_more() {
        let (a, b) = (Mutex::new(1i8), Mutex::new(2i8));
        std::thread::scope(|scope| {
            let held = a.lock();
            scope.spawn(move || drop(held)).join().expect("it ends");
        });
        {
            let _b = b.lock();
            let _a = a.lock();
        }
        // Were `a` still held, this would turn the order round.
        drop(b.lock());
    }
}
