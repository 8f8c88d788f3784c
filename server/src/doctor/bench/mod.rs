//! `loramux doctor --bench`: what the kernels ([`kernels`]) and whole steps ([`steps`]) take, held against what the same
//! device reached on a plain copy and a plain product in the same run.

mod kernels;
mod shapes;
mod steps;

use std::process::Command;
use std::time::{Duration, Instant};

use loramux_kernels::device::SharedDevice;
use serde_json::{Map, Value};

use self::shapes::BenchModel;
use super::args::{DoctorArgs, ShapeChoice, Tier};
use super::basic;
use super::machine::Machine;
use super::report::{Line, Report, Section, Status};
use crate::shard::launch;

/// What the device reaches on plain work.
#[derive(Clone, Copy, Debug)]
struct Ceilings {
    /// Bytes of a copy, read and written, a second.
    bytes_per_s: f64,
    /// Floating-point operations of a large product, a second.
    flop_per_s: f64,
}

/// What a benchmark runs on.
struct Setting<'a> {
    device: &'a SharedDevice,
    args: &'a DoctorArgs,
    model: BenchModel,
    ceilings: Ceilings,
    is_emulated: bool,
    /// No row begins after it.
    deadline: Instant,
}

/// Measured times, microseconds.
#[derive(Clone, Debug)]
struct Times(Vec<f64>);

impl Times {
    fn new(mut us: Vec<f64>) -> Self {
        us.sort_by(f64::total_cmp);
        Self(us)
    }

    /// The time that `part` of the runs stayed under; 0 of none.
    fn at(&self, part: f64) -> f64 {
        let index = (part * (self.0.len().saturating_sub(1)) as f64).round() as usize;
        self.0.get(index).copied().unwrap_or(0.0)
    }

    fn fields(&self, line: &mut Line) {
        line.field("runs", self.0.len());
        for (name, part) in [("min_us", 0.0), ("p50_us", 0.5), ("p99_us", 0.99), ("max_us", 1.0)] {
            line.field(name, self.at(part));
        }
    }
}

/// Measures.
pub(super) fn report(machine: &Machine, args: &DoctorArgs, tier: Tier) -> Report {
    let mut sections = vec![basic::device(machine)];
    let mut setup = Map::new();
    let outcome = match &machine.device {
        Some(device) => measure(machine, device, args, tier, &mut setup, &mut sections),
        None => Err(anyhow::anyhow!("--bench needs a GPU (or --device emulated, to try the code path)")),
    };
    if let Err(error) = outcome {
        let mut section = Section::new("not measured");
        section.push(Status::Failed, "error", format!("{error:#}"));
        sections.push(section);
    }
    let mut report = Report {
        kind: if tier == Tier::A { "bench A" } else { "bench B" },
        device: machine.choice.to_string(),
        is_emulated: machine.is_emulated(),
        setup,
        sections,
        verdict: String::new(),
    };
    report.verdict = match (report.is_ok(), machine.is_emulated()) {
        (true, true) => "Measured on the host emulator, which is no GPU's speed: this only shows that the code runs.",
        (true, false) => "Times are medians on random data after a warm-up; % is of this run's own copy and product.",
        (false, _) => "Something FAILED: the figures above it do not count.",
    }
    .to_owned();
    report
}

fn measure(
    machine: &Machine,
    device: &SharedDevice,
    args: &DoctorArgs,
    tier: Tier,
    setup: &mut Map<String, Value>,
    sections: &mut Vec<Section>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(args.time_limit);
    let is_emulated = machine.is_emulated();
    let standard = if is_emulated { ShapeChoice::Tiny } else { ShapeChoice::Llama8b };
    let model = BenchModel::new(args.model_shape.unwrap_or(standard));
    let elem = launch::elem(args.dtype)?;
    setup.insert("commit".into(), args.commit.clone().into());
    setup.insert("model_shape".into(), model.name.into());
    setup.insert("dtype".into(), format!("{elem:?}").to_lowercase().into());
    setup.insert("seed".into(), args.seed.into());
    let libraries = device.info().libraries.iter().map(|(name, found)| (name.clone(), found.clone().into()));
    setup.insert("libraries".into(), Value::Object(libraries.collect()));
    setup.insert("clocks_before".into(), clocks().into());
    let (copy, product) = basic::ceilings(device, elem, is_emulated)?;
    setup.insert("copy_gb_per_s".into(), copy.into());
    setup.insert("product_tflop_per_s".into(), product.into());
    let mut section = Section::new("what the device reaches on plain work");
    section.push(Status::Info, "copy", format!("{copy:.0} GB/s, read + written"));
    section.push(Status::Info, "product", format!("{product:.3} TFLOP/s"));
    sections.push(section);
    let ceilings = Ceilings { bytes_per_s: copy * 1e9, flop_per_s: product * 1e12 };
    let setting = Setting { device, args, model, ceilings, is_emulated, deadline };
    let measured = match tier {
        Tier::A => kernels::measure(&setting, elem, sections),
        Tier::B => steps::measure(&setting, sections),
    };
    setup.insert("clocks_after".into(), clocks().into());
    measured
}

/// Clocks, temperature and power of the GPUs, if the driver's tool is there.
fn clocks() -> Option<String> {
    let query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw";
    let output = Command::new("nvidia-smi").args([query, "--format=csv,noheader"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Setting<'_> {
    /// Whether there is time for another row; says so once in the section if not.
    fn has_time(&self, section: &mut Section, what: &str) -> bool {
        let has_time = Instant::now() < self.deadline;
        if !has_time {
            section.push(Status::Warning, what, "not measured: --time-limit was reached");
        }
        has_time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let times = Times::new((1..=101).rev().map(f64::from).collect());
        assert_eq!([times.at(0.0), times.at(0.5), times.at(0.99), times.at(1.0)], [1.0, 51.0, 100.0, 101.0]);
        assert_eq!(Times::new(Vec::new()).at(0.5), 0.0);
    }
}
