//! loramux
fn main() {}
