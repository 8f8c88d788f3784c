//! The shapes of bodies, for the document only. Requests are read field by field (`http/json.rs`) and replies have types
//! of their own, so nothing but tests holds these to the code: `http/tests/openapi.rs` sends what they allow and what they
//! forbid, and the black-box tests validate every reply against them.
//!
//! In a request null means absent, so every optional member is nullable. In a reply an optional member is absent.
#![expect(dead_code, reason = "read by the derive macro, never made")]

pub(super) mod admin;
pub(super) mod anthropic;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod embeddings;
pub(super) mod format;
pub(super) mod generation;
pub(super) mod live;
pub(super) mod lorax;
pub(super) mod models;
pub(super) mod responses;
pub(super) mod runtime;
pub(super) mod service;
