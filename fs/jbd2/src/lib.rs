//! The journal: recovery, handles, commit and checkpoint
