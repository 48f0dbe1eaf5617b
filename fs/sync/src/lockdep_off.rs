//! The order of locks, not looked at: without debug assertions, and in models. The
//! other `lockdep.rs` says what is meant.

/// A class of locks.
#[derive(Debug)]
pub struct Class;

/// A lock, or what is like one, that its thread holds.
#[derive(Debug)]
#[must_use]
pub struct Held;

impl Class {
    /// The class of what is made where this is called, by name.
    pub const fn new(_name: &'static str) -> Self {
        Self
    }

    /// Before it is waited for.
    #[inline]
    pub fn acquire(&self) -> Held {
        Held
    }

    /// It is held, without having been waited for.
    #[inline]
    pub fn acquired(&self) -> Held {
        Held
    }

    /// Waiting for it here and now is in order.
    #[inline]
    pub fn check(&self) {}
}

/// Notes that `first` comes before `then`, as a crate's documentation says.
#[inline]
pub fn declare(_first: &Class, _then: &Class) {}
