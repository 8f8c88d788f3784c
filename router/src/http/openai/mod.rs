//! The OpenAI routes. A handler is a sentence: read, validate, resolve, encode, submit, reply.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod format;
pub(crate) mod message;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod prompt;
pub(crate) mod reply;
pub(crate) mod resolve;
pub(crate) mod run;
pub(crate) mod sequence;
pub(crate) mod sse;
pub(crate) mod stream;
pub(crate) mod submit;
pub(crate) mod tools;
pub(crate) mod types;
pub(crate) mod unsupported;
pub(crate) mod validate;
