//! Runs checks on the emulator.

use std::path::PathBuf;
use std::rc::Rc;

use super::check::{CheckError, Checker, Effort, Summary};
use super::{Asynchrony, EmulatedDevice, EmulatedOptions, LibraryPaths, Nvrtc, Schedule, SharedDevice};

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

/// The compiler for GPUs, if it is installed; says where it was looked for if not. With `LORAMUX_REQUIRE_NVRTC` set, it has
/// to be there. `LORAMUX_CUDA_LIB_DIR` names its folder.
pub(crate) fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find(&library_paths()) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            assert!(std::env::var_os("LORAMUX_REQUIRE_NVRTC").is_none(), "{error}");
            println!("SKIPPED: {error}");
            None
        }
    }
}

/// Where tests look for CUDA's libraries.
pub(crate) fn library_paths() -> LibraryPaths {
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    LibraryPaths {
        dirs: path("LORAMUX_CUDA_LIB_DIR").into_iter().collect(),
        cuda_home: path("CUDA_HOME"),
        virtual_env: path("VIRTUAL_ENV"),
        ask_python: true,
    }
}
