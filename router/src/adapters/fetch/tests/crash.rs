//! The process dies at any point.
