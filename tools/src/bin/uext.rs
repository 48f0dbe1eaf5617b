//! The `uext` program.

fn main() {}
