//! Nothing but its tests: `tests/async_openai.rs`.
