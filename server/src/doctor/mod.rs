//! `loramux doctor`: what works on this machine, what does not, and what to do about it. `--full` checks a small model end
//! to end against the CPU, `--bench` measures. [`warm`] is `loramux warm-kernels`.
//!
//! Nothing here serves: the same code runs on a GPU and on the host emulator, so it is tested where there is no GPU.

mod adapters;
pub(crate) mod args;
mod basic;
mod bench;
mod churn;
mod full;
mod machine;
mod model;
mod report;
mod runner;
pub(crate) mod warm;

use std::process::ExitCode;

use anyhow::{Context, anyhow};

use self::args::DoctorArgs;
use self::machine::Machine;
use self::report::Report;
use crate::args::LogFormat;
use crate::terminal::init_logs;

/// Runs the command. The exit code says whether every check passed.
pub(crate) fn main(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    init_logs(LogFormat::Text, "warn").map_err(|e| anyhow!(e))?;
    let machine = Machine::open(args);
    let report = match args.bench {
        Some(tier) => bench::report(&machine, args, tier),
        None if args.full => {
            exact_inputs();
            full::report(&machine, args)
        }
        None => basic::report(&machine, args),
    };
    print(&report, args)?;
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The CPU is what a device is compared with, so its products take inputs as they are, in f32.
fn exact_inputs() {
    let exact = loramux_kernels::isa_names().into_iter().rev().find(|name| !name.ends_with("bf16"));
    if let Some(Err(error)) = exact.map(loramux_kernels::set_isa) {
        tracing::warn!("the CPU rounds inputs of products to bfloat16: {error}");
    }
}

fn print(report: &Report, args: &DoctorArgs) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(&report.json())?;
    if let Some(path) = &args.out {
        std::fs::write(path, format!("{json}\n")).with_context(|| format!("--out {}", path.display()))?;
    }
    if args.json {
        println!("{json}");
    } else {
        print!("{}", report.page());
    }
    Ok(())
}
