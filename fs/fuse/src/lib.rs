//! The FUSE front: requests from /dev/fuse to a filesystem
