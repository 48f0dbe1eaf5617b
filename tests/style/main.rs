//! What the compiler does not look at in the sources.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod atomics;
