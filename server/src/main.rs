//! `loramux`: one base model and thousands of LoRA adapters from one device, behind the OpenAI API.

mod adapters_cli;
mod args;
mod bench;
mod command_line;
mod config;
mod demo;
mod doctor;
mod fetch_model;
mod foreign_flags;
mod serve;
mod shard;
mod terminal;

use std::process::ExitCode;

use args::{Command, ShardArgs};

fn main() -> ExitCode {
    shard::map_large_buffers();
    config::no_implicit_hub_token();
    let cli = command_line::parse(&config::Env::read());
    let ended = match cli.command {
        None => serve::main(cli.serve).map(|()| ExitCode::SUCCESS),
        Some(Command::Serve(args)) => serve::main(*args).map(|()| ExitCode::SUCCESS),
        Some(Command::Doctor(args)) => doctor::main(&args),
        Some(Command::Bench(args)) => bench::main(*args),
        Some(Command::Adapters(args)) => adapters_cli::main(args),
        Some(Command::WarmKernels(args)) => doctor::warm::main(&args).map(|()| ExitCode::SUCCESS),
        Some(Command::Shard(args)) => shard_main(&args).map(|()| ExitCode::SUCCESS),
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn shard_main(args: &ShardArgs) -> anyhow::Result<()> {
    let options = serde_json::from_str(&args.options)?;
    shard::process::child_main(&options)?;
    Ok(())
}
