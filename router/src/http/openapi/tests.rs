//! The document against the router and the handlers.
