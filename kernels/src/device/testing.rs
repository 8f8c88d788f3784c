//! Runs checks on the emulator.

use std::path::PathBuf;
use std::rc::Rc;

use super::check::{CheckError, Checker, Effort, Summary};
use super::{Asynchrony, DeviceError, EmulatedDevice, EmulatedOptions, LibraryPaths, Nvrtc, Schedule, SharedDevice};

/// The emulator with threads in this order. A check that forgets to wait fails under one of the orders.
pub(crate) fn emulator(schedule: Schedule, races: bool) -> SharedDevice {
    let asynchrony = if schedule == Schedule::Random { Asynchrony::Lazy(7) } else { Asynchrony::Eager };
    Rc::new(emulator_with(schedule, races, asynchrony))
}

/// The emulator with threads and streams in these orders.
pub(crate) fn emulator_with(schedule: Schedule, races: bool, asynchrony: Asynchrony) -> EmulatedDevice {
    let cache_dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/emulator"));
    let sanitize = std::env::var_os("LORAMUX_EMULATOR_SANITIZE").is_some();
    let options = EmulatedOptions { cache_dir, schedule, asynchrony, races, sanitize, seed: 7 };
    EmulatedDevice::new(options).expect("the emulator starts (it needs g++)")
}

/// Runs a check under every order of threads, and once with race detection.
#[track_caller]
pub(crate) fn on_every_schedule(check: fn(&Checker) -> Result<Summary, CheckError>) {
    let runs = Schedule::ALL.map(|schedule| (schedule, false)).into_iter().chain([(Schedule::RoundRobin, true)]);
    for (schedule, races) in runs {
        let checker = Checker::new(emulator(schedule, races), Effort::Full).expect("the emulator makes streams");
        match check(&checker) {
            Ok(summary) => println!("{schedule:?} races {races}: {summary:?}"),
            Err(error) => panic!("{schedule:?}, races {races}: {error}"),
        }
    }
}

/// The compiler for GPUs, if it is installed. With `LORAMUX_REQUIRE_NVRTC` set, it has to be there.
pub(crate) fn nvrtc() -> Option<Nvrtc> {
    or_skip(Nvrtc::find(&library_paths()), "LORAMUX_REQUIRE_NVRTC")
}

/// What was found, or a line that says where it was looked for. With the variable set, it has to be there.
pub(crate) fn or_skip<T>(found: Result<T, DeviceError>, required_by: &str) -> Option<T> {
    assert!(found.is_ok() || std::env::var_os(required_by).is_none(), "{}", found.err().unwrap());
    found.inspect_err(|error| println!("SKIPPED: {error}")).ok()
}

/// Where tests look for CUDA's libraries: `LORAMUX_CUDA_LIB_DIR` first.
pub(crate) fn library_paths() -> LibraryPaths {
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    LibraryPaths {
        dirs: path("LORAMUX_CUDA_LIB_DIR").into_iter().collect(),
        cuda_home: path("CUDA_HOME"),
        virtual_env: path("VIRTUAL_ENV"),
        ask_python: true,
    }
}
