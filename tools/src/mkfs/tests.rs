//! Filesystems made in memory.
