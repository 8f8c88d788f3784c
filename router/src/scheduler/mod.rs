//! Pure and synchronous: no clock, no I/O, no device; a seed replays it.
