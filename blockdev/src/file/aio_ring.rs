//! The completion ring of a Linux AIO context, read in user space.
//!
//! `io_setup` maps a ring into the process: eight `u32` (`id`, `nr`, `head`, `tail`,
//! `magic`, `compat_features`, `incompat_features`, `header_length`) and then `nr`
//! events. The kernel writes an event, then moves `tail`; the reader takes the
//! event, then moves `head`, and the kernel reads `head` again when it is short of
//! places. Both indices run from 0 to `nr - 1` and wrap there; `nr` is no power of
//! two, and more than was asked for.
//!
//! ```text
//!   kernel                         reader (one at a time)
//!   event[tail] = e                tail = load-acquire
//!   smp_wmb                        e = event[head]
//!   tail = tail + 1                head = store-release
//! ```
//!
//! Forbidden: the reader sees the new tail and the event that was there before, or the
//! kernel sees the new head and fills a place that is still being read. Checked by
//! `loom_each_event_is_taken_once_and_whole`.
//!
//! Invariants:
//! - One reader at a time: who takes from the ring owns it (`&mut`), and nobody calls
//!   `io_getevents` on the context meanwhile.
//! - A ring with another magic number, or features this file doesn't know, is not read.
//!
//! Locks: none. [`pop`] sees the ring through [`RingMemory`], so that a model can
//! stand in for the kernel's.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// The layout described above.
const MAGIC: u32 = 0xa10a_10a1;

/// A completion, as the kernel writes it (`struct io_event`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct IoEvent {
    /// `aio_data` of the request.
    pub(super) data: u64,
    /// Address of the request's iocb.
    pub(super) obj: u64,
    /// Bytes moved, or a negative errno.
    pub(super) res: i64,
    /// Unused for reads and writes.
    pub(super) res2: i64,
}

const _: () = assert!(size_of::<IoEvent>() == 32);

/// The ring's memory: what the kernel shares, or a model of it.
pub(super) trait RingMemory {
    /// Places.
    fn nr(&self) -> u32;
    /// `head`, which only the reader writes.
    fn head(&self) -> u32;
    /// `tail`, with all that the kernel wrote before it.
    fn tail_acquire(&self) -> u32;
    /// Gives places up to `head` back, after all reads of them.
    fn set_head_release(&self, head: u32);
    /// The event in a place between `head` and `tail`.
    fn event(&self, index: u32) -> IoEvent;
}

/// Takes the oldest event. The caller is the only reader.
pub(super) fn pop<M: RingMemory>(ring: &M) -> Option<IoEvent> {
    let (nr, head) = (ring.nr(), ring.head());
    let tail = ring.tail_acquire();
    if head == tail {
        return None;
    }
    // Whoever else may have written the indices, no read goes outside the ring.
    let event = ring.event(head % nr);
    ring.set_head_release((head % nr + 1) % nr);
    Some(event)
}

/// `struct aio_ring` of the kernel's `fs/aio.c`.
#[repr(C)]
struct Header {
    id: u32,
    nr: u32,
    /// PAIRS-WITH: the kernel's read of it before it fills a place.
    /// WHY-RELAXED: our own reads; only this reader writes it.
    head: AtomicU32,
    /// PAIRS-WITH: smp_wmb in aio_complete.
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

const _: () = assert!(size_of::<Header>() == 32);

/// The ring of a live context.
pub(super) struct AioRing {
    header: NonNull<Header>,
    nr: u32,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for AioRing {}

impl AioRing {
    /// The ring at the address that a context's number is; `None` where it is not of
    /// the kind this file knows.
    ///
    /// # Safety
    /// `context` comes from `io_setup`, and `io_destroy` follows the value's drop.
    pub(super) unsafe fn of_context(context: u64) -> Option<Self> {
        // The number is an address that the kernel exposed.
        let address = usize::try_from(context).ok()?;
        let header = NonNull::new(std::ptr::with_exposed_provenance_mut::<Header>(address))?;
        // SAFETY: at least a page is mapped there, page-aligned, while the context lives;
        // of these fields none changes any more.
        let (magic, incompat, length, nr) = unsafe {
            let header = header.as_ref();
            (header.magic, header.incompat_features, header.header_length, header.nr)
        };
        let known = magic == MAGIC && incompat == 0 && length as usize == size_of::<Header>();
        (known && nr > 1).then_some(Self { header, nr })
    }

    /// Takes the oldest completion, without a system call.
    pub(super) fn pop(&mut self) -> Option<IoEvent> {
        pop(self)
    }

    fn header(&self) -> &Header {
        // SAFETY: mapped as long as self lives (`of_context`); the kernel changes only
        // the atomic fields.
        unsafe { self.header.as_ref() }
    }
}

impl RingMemory for AioRing {
    fn nr(&self) -> u32 {
        self.nr
    }

    fn head(&self) -> u32 {
        // WHY-RELAXED: only this reader writes it.
        self.header().head.load(Ordering::Relaxed)
    }

    fn tail_acquire(&self) -> u32 {
        self.header().tail.load(Ordering::Acquire) // PAIRS-WITH: smp_wmb in aio_complete
    }

    fn set_head_release(&self, head: u32) {
        self.header().head.store(head, Ordering::Release); // PAIRS-WITH: refill_reqs_available
    }

    fn event(&self, index: u32) -> IoEvent {
        assert!(index < self.nr, "event outside the ring");
        // SAFETY: `nr` events follow the header, and the kernel has finished this one,
        // since `tail` is past it; the index was checked.
        unsafe { self.header.add(1).cast::<IoEvent>().add(index as usize).read_volatile() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// A ring with both ends in one thread.
    struct Fake {
        head: Cell<u32>,
        tail: Cell<u32>,
        events: RefCell<Vec<IoEvent>>,
    }

    impl Fake {
        fn new(nr: usize) -> Self {
            let events = RefCell::new(vec![IoEvent::default(); nr]);
            Self { head: Cell::new(0), tail: Cell::new(0), events }
        }
        fn push(&self, data: u64) -> bool {
            let next = (self.tail.get() + 1) % self.nr();
            if next == self.head.get() {
                return false;
            }
            let event = IoEvent { data, ..IoEvent::default() };
            self.events.borrow_mut()[self.tail.get() as usize] = event;
            self.tail.set(next);
            true
        }
    }

    impl RingMemory for Fake {
        fn nr(&self) -> u32 {
            self.events.borrow().len() as u32
        }
        fn head(&self) -> u32 {
            self.head.get()
        }
        fn tail_acquire(&self) -> u32 {
            self.tail.get()
        }
        fn set_head_release(&self, head: u32) {
            self.head.set(head);
        }
        fn event(&self, index: u32) -> IoEvent {
            self.events.borrow()[index as usize]
        }
    }

    #[test]
    fn events_come_in_order_around_the_end_of_a_ring_of_any_size() {
        for nr in [2, 3, 7, 383] {
            let ring = Fake::new(nr);
            let (mut pushed, mut popped) = (0, 0);
            for round in 0..5000 {
                for _ in 0..=round % (nr + 1) {
                    pushed += u64::from(ring.push(pushed));
                }
                for _ in 0..=(round * 7) % nr {
                    if let Some(event) = pop(&ring) {
                        assert_eq!(event.data, popped, "ring of {nr}");
                        popped += 1;
                    }
                }
            }
            while pop(&ring).is_some() {
                popped += 1;
            }
            assert_eq!(popped, pushed);
        }
    }

    #[test]
    fn a_head_outside_the_ring_reads_nothing_outside_it() {
        let ring = Fake::new(5);
        assert!(ring.push(0));
        ring.head.set(u32::MAX);
        pop(&ring);
        assert!(ring.head.get() < 5);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p uext-blockdev --lib loom` (own target
/// directory).
#[cfg(all(test, loom))]
mod loom_tests {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicU32;

    use super::*;

    /// Places in the ring; one less holds events.
    const NR: u32 = 3;
    const EVENTS: u64 = 4;

    struct Model {
        head: AtomicU32,
        tail: AtomicU32,
        events: [UnsafeCell<IoEvent>; NR as usize],
    }

    // SAFETY: loom watches each access of a cell and fails on a race, which is the test.
    unsafe impl Sync for Model {}
    // SAFETY: as above.
    unsafe impl Send for Model {}

    impl RingMemory for Model {
        fn nr(&self) -> u32 {
            NR
        }
        fn head(&self) -> u32 {
            self.head.load(Ordering::Relaxed)
        }
        fn tail_acquire(&self) -> u32 {
            self.tail.load(Ordering::Acquire)
        }
        fn set_head_release(&self, head: u32) {
            self.head.store(head, Ordering::Release);
        }
        fn event(&self, index: u32) -> IoEvent {
            // SAFETY: loom fails when somebody writes it meanwhile.
            self.events[index as usize].with(|event| unsafe { *event })
        }
    }

    impl Model {
        /// What the kernel does for one completion; `false` when there is no place.
        fn complete(&self, event: IoEvent) -> bool {
            let tail = self.tail.load(Ordering::Relaxed);
            let next = (tail + 1) % NR;
            if next == self.head.load(Ordering::Acquire) {
                return false;
            }
            // SAFETY: loom fails when somebody reads or writes it meanwhile.
            self.events[tail as usize].with_mut(|slot| unsafe { *slot = event });
            self.tail.store(next, Ordering::Release);
            true
        }
    }

    #[test]
    fn loom_each_event_is_taken_once_and_whole() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let ring = Arc::new(Model {
                head: AtomicU32::new(0),
                tail: AtomicU32::new(0),
                events: std::array::from_fn(|_| UnsafeCell::new(IoEvent::default())),
            });
            let kernel = ring.clone();
            let thread = loom::thread::spawn(move || {
                for n in 1..=EVENTS {
                    let event = IoEvent { data: n, obj: n * 3, res: -5, res2: 0 };
                    while !kernel.complete(event) {
                        loom::thread::yield_now();
                    }
                }
            });
            for n in 1..=EVENTS {
                let event = loop {
                    match pop(&*ring) {
                        Some(event) => break event,
                        None => loom::thread::yield_now(),
                    }
                };
                assert_eq!((event.data, event.obj), (n, n * 3), "lost, twice or torn");
            }
            thread.join().expect("the kernel ends");
            assert_eq!(pop(&*ring), None);
        });
    }
}
