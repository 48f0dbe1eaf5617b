//! The traits between a filesystem and its front ends
