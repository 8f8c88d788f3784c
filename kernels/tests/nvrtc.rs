//! Every program compiles for every architecture that we name, without spills and within its budget. Needs the run-time
//! compiler (no GPU, no driver): without it the test says so and passes, unless `LORAMUX_REQUIRE_NVRTC` is set.

use std::collections::BTreeMap;
use std::path::PathBuf;

use loramux_kernels::cuda::programs;
use loramux_kernels::device::{
    CodeCache, Compiled, LibraryPaths, ModelShape, Nvrtc, Program, TESTED_ARCHS, compile_all,
};

/// Registers and static shared bytes.
type Usage = (u32, u32);

/// Static shared memory that a block may have without asking, bytes.
const STATIC_SHARED_MAX: u32 = 48 << 10;

fn budgets() -> BTreeMap<&'static str, Usage> {
    let lines = include_str!("budgets.txt").lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let row = |line: &'static str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [entry, registers, shared] => (entry, (registers.parse().unwrap(), shared.parse().unwrap())),
        _ => panic!("budgets.txt: `{line}` is not `entry registers shared_bytes`"),
    };
    lines.map(row).collect()
}

/// Shared memory of a block that an architecture has, bytes.
fn shared_max(arch: &str) -> u32 {
    match arch {
        "sm_80" => 163 << 10,
        "sm_86" | "sm_89" | "sm_120" => 99 << 10,
        _ => 227 << 10,
    }
}

fn nvrtc() -> Option<Nvrtc> {
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    let paths = LibraryPaths {
        dirs: path("LORAMUX_CUDA_LIB_DIR").into_iter().collect(),
        cuda_home: path("CUDA_HOME"),
        virtual_env: path("VIRTUAL_ENV"),
        ask_python: true,
    };
    match Nvrtc::find(&paths) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) if std::env::var_os("LORAMUX_REQUIRE_NVRTC").is_some() => panic!("{error}"),
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

#[test]
fn every_program_compiles_without_spills_and_within_its_budget() {
    let Some(nvrtc) = nvrtc() else { return };
    let (programs, budgets) = (programs(&ModelShape::tested()), budgets());
    let cache = CodeCache::new(Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels")));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut most, mut wrong) = (BTreeMap::<&str, Usage>::new(), Vec::new());
    for arch in TESTED_ARCHS {
        let compiled = compile_all(&nvrtc, &programs, arch, &cache, threads).unwrap_or_else(|error| panic!("{error}"));
        for (program, compiled) in programs.iter().zip(&compiled) {
            let used = most.entry(program.entry).or_default();
            *used = (used.0.max(compiled.registers), used.1.max(compiled.shared_bytes));
            wrong.extend(faults(program, arch, compiled));
        }
    }
    println!("{} programs x {} architectures", programs.len(), TESTED_ARCHS.len());
    for (entry, (registers, shared)) in &most {
        println!("{entry:<25} {registers:>10} {shared:>13}");
        match budgets.get(entry) {
            None => wrong.push(format!("{entry} has no line in budgets.txt")),
            Some(budget) if *registers > budget.0 || *shared > budget.1 => {
                wrong.push(format!("{entry} takes {registers} registers and {shared} bytes, over {budget:?}"));
            }
            Some(_) => {}
        }
    }
    let stale = budgets.keys().filter(|entry| !most.contains_key(*entry));
    wrong.extend(stale.map(|entry| format!("budgets.txt has a line for {entry}, which is no program")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn faults(program: &Program, arch: &str, compiled: &Compiled) -> Vec<String> {
    let mut found = Vec::new();
    let name = format!("{} {:?} for {arch}", program.entry, program.defines);
    if compiled.spill_bytes > 0 {
        found.push(format!("{name} spills {} bytes:\n{}", compiled.spill_bytes, compiled.log));
    }
    if compiled.registers == 0 {
        found.push(format!("{name}: the log does not tell the registers:\n{}", compiled.log));
    }
    if compiled.shared_bytes > STATIC_SHARED_MAX {
        found.push(format!("{name} has {} bytes of static shared memory", compiled.shared_bytes));
    }
    if compiled.shared_bytes + program.shared_bytes_max > shared_max(arch) {
        let total = compiled.shared_bytes + program.shared_bytes_max;
        found.push(format!("{name} takes {total} bytes of shared memory; that GPU has {}", shared_max(arch)));
    }
    found
}
