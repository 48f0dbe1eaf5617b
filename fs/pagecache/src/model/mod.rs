//! The page cache under shuttle.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test -p uext-pagecache --lib model` (own target
//! directory), or `make models`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod blocks;
mod pages;
mod shared;

use std::sync::Arc;

use crate::{CacheConfig, PageCache};

/// The smallest cache: one slab.
fn cache() -> Arc<PageCache> {
    PageCache::new(CacheConfig { limit_bytes: 0, ..CacheConfig::default() })
}

/// A number in the first bytes of a page or block.
fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn put_number(bytes: &mut [u8], number: u64) {
    bytes[..8].copy_from_slice(&number.to_le_bytes());
}
