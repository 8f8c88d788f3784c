//! `loramux bench`: measures this server, or any other that speaks OpenAI's API, with the same client and the same load.
//!
//! [`workload`] says what is sent, [`plan`] makes a round's requests before its clock starts, [`drive`] sends them through
//! [`client`], [`figures`] makes numbers of the times, [`record`] keeps them, and [`report`] puts several runs side by side.
//! All of it runs on one thread, so that the server has the others.

pub(crate) mod args;
mod client;
mod drive;
mod figures;
mod machine;
mod own_server;
mod plan;
mod plot;
mod popularity;
mod process;
mod random_adapters;
mod record;
mod report;
mod rng;
mod run;
mod sse;
mod table;
mod target;
mod workload;

use std::process::ExitCode;

use args::{BenchArgs, BenchCommand};

pub(crate) fn main(args: BenchArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(BenchCommand::Report(args)) => report::main(&args),
        None => run::main(args.run),
    }
}
