//! The n-th call fails, for every n; and then everything works again.
