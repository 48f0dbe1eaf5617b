//! Frames, address spaces, the reverse map and writeback
