//! The kernel's list of the robust mutexes that a thread holds.
//!
//! Each thread tells the kernel once where its list begins (`set_robust_list`). When the
//! thread ends, however it ends, the kernel walks the list, and in each word that still
//! names the thread puts `OWNER_DIED` in place of its number and wakes one sleeper.
//! `pending` names a mutex that is being taken or given up, so that a death between the
//! change of the word and that of the list is covered too.
//!
//! Invariants: the list holds exactly the mutexes that the thread holds, but for `pending`;
//! links are addresses of this process, and only its kernel follows them. This unsafe code
//! is here because libc gives the call no wrapper and its own list, which this one takes
//! the place of, is not reachable; nothing in this process uses libc's robust mutexes.
//!
//! Locks: none; everything belongs to one thread and to the kernel after its end.

use std::sync::atomic::{AtomicUsize, Ordering, compiler_fence};

/// A mutex's place in its owner's list (`struct robust_list`).
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Node {
    /// WHY-RELAXED: the owner's own, until the kernel reads it after the owner's end.
    next: AtomicUsize,
}

/// `struct robust_list_head`.
#[repr(C)]
struct Head {
    /// WHY-RELAXED: as `Node::next`.
    next: AtomicUsize,
    /// From a node to its mutex's word.
    futex_offset: isize,
    /// WHY-RELAXED: as `Node::next`.
    pending: AtomicUsize,
}

thread_local! {
    /// No destructor: the kernel reads it when the thread has none of its code left to run.
    static HEAD: Head = const {
        Head {
            next: AtomicUsize::new(0),
            futex_offset: size_of::<Node>() as isize,
            pending: AtomicUsize::new(0),
        }
    };
    static TID: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// The number by which the thread owns mutexes; its list is known to the kernel after this.
pub(crate) fn thread_id() -> u32 {
    let known = TID.get();
    if known != 0 { known } else { register() }
}

#[cold]
fn register() -> u32 {
    HEAD.with(|head| {
        let address = std::ptr::from_ref(head).expose_provenance();
        // WHY-RELAXED: this thread's own.
        head.next.store(address, Ordering::Relaxed);
        // SAFETY: the head stays at its address until the thread's end, since the
        // thread's static storage does and it has no destructor.
        let result =
            unsafe { libc::syscall(libc::SYS_set_robust_list, address, size_of::<Head>()) };
        assert_eq!(result, 0, "set_robust_list: {}", std::io::Error::last_os_error());
    });
    let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
    TID.set(tid);
    tid
}

/// Says which mutex is about to be taken or given up.
pub(crate) fn begin(node: &Node) {
    let address = std::ptr::from_ref(node).expose_provenance();
    HEAD.with(|head| head.pending.store(address, Ordering::Relaxed));
    // PAIRS-WITH: the kernel's walk after this thread's end; it sees what the thread did
    // in program order, so only the compiler must keep the order.
    compiler_fence(Ordering::SeqCst);
}

/// The change that `begin` announced is complete.
pub(crate) fn end() {
    compiler_fence(Ordering::SeqCst); // PAIRS-WITH: as in `begin`
    HEAD.with(|head| head.pending.store(0, Ordering::Relaxed));
}

/// Adds a mutex that is now held.
pub(crate) fn push(node: &Node) {
    let address = std::ptr::from_ref(node).expose_provenance();
    HEAD.with(|head| {
        node.next.store(head.next.load(Ordering::Relaxed), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst); // PAIRS-WITH: as in `begin`
        head.next.store(address, Ordering::Relaxed);
    });
}

/// Takes a mutex out that is about to be given up. A thread holds few: the last taken is
/// found at once, others by a walk.
pub(crate) fn remove(node: &Node) {
    let address = std::ptr::from_ref(node).addr();
    HEAD.with(|head| {
        let mut link = &head.next;
        loop {
            // WHY-RELAXED: this thread's own list.
            let at = link.load(Ordering::Relaxed);
            if at == address {
                // WHY-RELAXED: as above.
                link.store(node.next.load(Ordering::Relaxed), Ordering::Relaxed);
                return;
            }
            assert_ne!(at, std::ptr::from_ref(head).addr(), "a mutex that is not held");
            // SAFETY: a link that is neither the head's nor null was made by `push` from a
            // node in memory that stays mapped while its guard lives.
            link = unsafe { &(*std::ptr::with_exposed_provenance::<Node>(at)).next };
        }
    });
}
