//! The page that `loramux doctor` prints: GPU, libraries, kernels, a self-test of every op, and what the device reaches on
//! plain work.

use std::time::Instant;

use loramux_kernels::cuda::{CHECKS, programs};
use loramux_kernels::device::check::{CheckError, Checker, Effort};
use loramux_kernels::device::{
    CodeCache, Device, DeviceError, Elem, GemmOut, GemmShape, ModelShape, Nvrtc, SharedDevice, probe,
};
use loramux_kernels::isa_name;

use super::args::DoctorArgs;
use super::machine::{Machine, advice};
use super::report::{Report, Section, Status};
use super::{model, warm};
use crate::shard::{DeviceChoice, launch};

/// Looks at everything that takes seconds.
pub(crate) fn report(machine: &Machine, args: &DoctorArgs) -> Report {
    let mut sections = vec![device(machine)];
    if machine.device.is_none() {
        sections.push(compiler(machine));
    }
    sections.push(cpu(args));
    if let Some(device) = &machine.device {
        match launch::elem(args.dtype) {
            Ok(elem) => {
                sections.push(kernels(machine, device, elem));
                sections.push(ops(device, Effort::Quick));
                if !args.skip_speed {
                    sections.push(speed(machine, device, elem));
                }
            }
            Err(error) => {
                let mut section = Section::new("kernels");
                section.push(Status::Failed, "dtype", error.to_string());
                sections.push(section);
            }
        }
    }
    let mut report = Report {
        kind: "doctor",
        device: machine.choice.to_string(),
        is_emulated: machine.is_emulated(),
        setup: serde_json::Map::new(),
        sections,
        verdict: String::new(),
    };
    report.verdict = verdict(machine, &report);
    report
}

/// The device and its libraries, or why there is none.
pub(crate) fn device(machine: &Machine) -> Section {
    let mut section = Section::new("device");
    if let Some(error) = &machine.error {
        // Looked for by `auto` and not there: the CPU serves. Asked for and not there: a failure.
        let status = if machine.choice == DeviceChoice::Auto { Status::Warning } else { Status::Failed };
        let text = format!("{error}\n{}", advice(error));
        section.push(status, "gpu", text).field("error", error.to_string());
        return section;
    }
    let Some(device) = &machine.device else {
        section.push(Status::Info, "gpu", "not looked for (--device cpu)");
        return section;
    };
    let info = device.info();
    section.push(Status::Ok, "name", &*info.name).field("device_name", &*info.name);
    let memory = match device.free_bytes() {
        Ok(free) => format!("{:.1} GiB, {:.1} GiB free", gib(info.memory_bytes), gib(free)),
        Err(error) => format!("{:.1} GiB, free unknown: {error}", gib(info.memory_bytes)),
    };
    section.push(Status::Info, "memory", memory).field("memory_bytes", info.memory_bytes);
    section
        .push(Status::Info, "processors", format!("{} multiprocessors, {}", info.multiprocessors, info.arch))
        .field("multiprocessors", info.multiprocessors)
        .field("arch", &*info.arch)
        .field("shared_bytes_max", info.shared_bytes_max);
    for (name, found) in &info.libraries {
        section.push(Status::Ok, name.as_str(), found.as_str());
    }
    for warning in machine.cuda.iter().flat_map(|cuda| cuda.take_warnings()) {
        section.push(Status::Warning, "warning", warning);
    }
    section
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Without a GPU the compiler can still be used, by `warm-kernels`.
fn compiler(machine: &Machine) -> Section {
    let mut section = Section::new("compiler");
    match Nvrtc::find(&machine.libraries) {
        Ok(nvrtc) => {
            let library = nvrtc.library();
            let text = format!("{} {} (warm-kernels works here)", library.path.display(), library.version);
            section.push(Status::Ok, "nvrtc", text).field("version", &*library.version);
        }
        Err(error) => {
            section.push(Status::Info, "nvrtc", format!("{error} (only a GPU and warm-kernels need it)"));
        }
    }
    section
}

/// The CPU's kernels: a text that is generated alone and in a batch is the same, token by token.
fn cpu(args: &DoctorArgs) -> Section {
    let mut section = Section::new("cpu");
    let threads = loramux_kernels::threads();
    section
        .push(Status::Info, "kernels", format!("{}, {threads} threads", isa_name()))
        .field("isa", isa_name())
        .field("threads", threads);
    match model::cpu_agrees(args) {
        Ok(tokens) => {
            section.push(Status::Ok, "built-in model", format!("{tokens} tokens alone and in a batch, the same"))
        }
        Err(error) => section.push(Status::Failed, "built-in model", format!("{error:#}")),
    };
    section
}

/// Every program of a model of the demo's widths: whether it compiles and loads, and where it came from.
fn kernels(machine: &Machine, device: &SharedDevice, elem: Elem) -> Section {
    let mut section = Section::new("kernels");
    let programs = programs(&[ModelShape { elem, ..warm::demo_shape() }]);
    // Asked before they are loaded; the emulator keeps its code in its own way and does not tell.
    let cached = machine.cuda.is_some().then(|| Nvrtc::find(&machine.libraries).ok()).flatten().map(|nvrtc| {
        let cache = CodeCache::new(Some(machine.kernel_cache_dir.clone()));
        programs.iter().filter(|program| nvrtc.is_cached(program, &device.info().arch, &cache)).count()
    });
    let (started, mut loaded) = (Instant::now(), 0usize);
    for program in &programs {
        match device.load(program) {
            Ok(_) => loaded += 1,
            Err(error) => {
                let _ = section.push(Status::Failed, program.entry, error.to_string());
            }
        }
    }
    let ms = started.elapsed().as_millis() as u64;
    let from = match cached {
        Some(cached) => format!("{cached} from the cache, {} compiled", programs.len() - cached),
        None => "from the cache or compiled".to_owned(),
    };
    let status = if loaded == programs.len() { Status::Ok } else { Status::Failed };
    let text =
        format!("{loaded} of {} programs, {from}, {ms} ms\n{}", programs.len(), machine.kernel_cache_dir.display());
    section
        .push(status, "programs", text)
        .field("programs", programs.len())
        .field("loaded", loaded)
        .field("cached", cached)
        .field("ms", ms);
    for warning in machine.cuda.iter().flat_map(|cuda| cuda.take_warnings()) {
        section.push(Status::Warning, "cache", warning);
    }
    section
}

/// Each op against its definition.
pub(crate) fn ops(device: &SharedDevice, effort: Effort) -> Section {
    let mut section = Section::new("ops against their definitions");
    let checker = match Checker::new(device.clone(), effort) {
        Ok(checker) => checker,
        Err(error) => {
            section.push(Status::Failed, "stream", error.to_string());
            return section;
        }
    };
    let mut lost: Option<DeviceError> = None;
    for check in CHECKS {
        if let Some(error) = &lost {
            section.push(Status::Failed, check.name, format!("not run, the device had failed: {error}"));
            continue;
        }
        let started = Instant::now();
        let outcome = (check.run)(&checker);
        let ms = started.elapsed().as_millis() as u64;
        match outcome {
            Ok(summary) => {
                let text =
                    format!("{} cases, worst error {:.2e} {}, {ms} ms", summary.cases, summary.worst, summary.unit);
                section
                    .push(Status::Ok, check.name, text)
                    .field("cases", summary.cases)
                    .field("worst", summary.worst)
                    .field("unit", summary.unit)
                    .field("ms", ms);
            }
            Err(error) => {
                section.push(Status::Failed, check.name, error.to_string()).field("ms", ms);
                // A GPU answers no call after a fault; a wrong value or a program that does not compile harms only its op.
                if let CheckError::Device(error @ (DeviceError::Call { .. } | DeviceError::Emulated(_))) = error {
                    lost = Some(error);
                }
            }
        }
    }
    section
}

/// Figures to hold the model's speed against.
fn speed(machine: &Machine, device: &SharedDevice, elem: Elem) -> Section {
    let mut section = Section::new("speed");
    let note = if machine.is_emulated() { " (of this CPU, through the emulator: no GPU's speed)" } else { "" };
    match ceilings(device, elem, machine.is_emulated()) {
        Ok((copy, gemm)) => {
            section.push(Status::Info, "copy", format!("{copy:.0} GB/s, read + written{note}")).field("gb_per_s", copy);
            section
                .push(Status::Info, "product", format!("{gemm:.3} TFLOP/s, random data{note}"))
                .field("tflop_per_s", gemm);
        }
        Err(error) => {
            let _ = section.push(Status::Failed, "speed", error.to_string());
        }
    }
    section
}

/// Bandwidth of copies in GB/s and rate of a large product in TFLOP/s; tiny ones on the emulator.
pub(crate) fn ceilings(device: &SharedDevice, elem: Elem, is_emulated: bool) -> Result<(f64, f64), DeviceError> {
    let (copy_bytes, width, runs) = if is_emulated {
        (1 << 20, 64, 1)
    } else if device.free_bytes()? > 8 << 30 {
        (2 << 30, 8192, 20)
    } else {
        (256 << 20, 4096, 20)
    };
    let copy = probe::copy_gb_per_s(device, copy_bytes, runs)?;
    let shape = GemmShape { rows: width, d_out: width, d_in: width, elem, out: GemmOut::Elem };
    Ok((copy, probe::gemm_tflop_per_s(device, shape, runs)?))
}

fn verdict(machine: &Machine, report: &Report) -> String {
    let failures = report.failures();
    let lines = if failures == 1 { "1 line above says".to_owned() } else { format!("{failures} lines above say") };
    match (&machine.error, machine.choice) {
        (Some(_), DeviceChoice::Auto) => {
            "There is no GPU that can be used here; loramux serves on the CPU. That is right for the demo and for small \
             models.\nThe line `gpu` says what is missing and what to do."
                .to_owned()
        }
        (Some(error), choice) => format!("--device {choice} cannot be used: {}.", advice(error)),
        (None, _) if failures > 0 => {
            format!("{lines} FAILED: this device must not serve. Please report this page (--json has all of it).")
        }
        (None, DeviceChoice::Cpu) => "The CPU serves.".to_owned(),
        (None, DeviceChoice::Emulated) => {
            "Every op agrees with its definition on the host emulator. It is for tests; nothing here says how fast a GPU is."
                .to_owned()
        }
        (None, _) => "The GPU works: every op agrees with its definition. `loramux doctor --full` checks more.".to_owned(),
    }
}
