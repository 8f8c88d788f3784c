//! A seeded simulation with a shard that keeps real page contents, and plans of small traces written out.

mod audit;
mod client;
mod fairness;
mod flight;
mod grammar;
mod keeping;
mod marker;
mod masks;
mod oracle;
mod pinning;
mod pipeline;
mod plans;
mod prefill;
mod shard;
mod sim;
mod units;
mod weather;
mod world;
