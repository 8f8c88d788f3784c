//! Reads this repository's own files, for `tests/tidy.rs`. The black-box tests are in `tests/python`.

pub mod manifest;
pub mod repository;
pub mod source;
