//! What a stream is given, and how it is done on the host.

use std::ffi::{CStr, c_char, c_int};

use super::super::{DeviceError, GemmOut, GemmShape, Grid};
use super::memory::Memory;
use super::{EmulatedOptions, gemm};

/// Which of a copy's ends are the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Upload,
    Download,
    OnDevice,
}

/// One thing a stream was given. Addresses are looked at when it runs.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Copy { direction: Direction, to: u64, from: u64, bytes: usize },
    Fill { at: u64, byte: u8, bytes: usize },
    Launch { kernel: usize, threads: u32, grid: Grid, shared_bytes: u32, args: Vec<u64> },
    Gemm { shape: GemmShape, y: u64, x: u64, weight: u64 },
    Replay(usize),
}

#[repr(C)]
pub(super) struct EmuLaunch {
    grid_x: u32,
    grid_y: u32,
    block_x: u32,
    dynamic_shared_bytes: u32,
    schedule: u32,
    flags: u32,
    seed: u64,
}

pub(super) type LaunchFn = unsafe extern "C" fn(*const EmuLaunch, *const u8, *mut c_char, u64) -> c_int;

/// A kernel's entry point.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) launch: LaunchFn,
    pub(super) name: String,
    pub(super) _library: libloading::Library,
}

/// Does one thing that is no replay, after looking at its addresses.
pub(super) fn run(
    work: &Work,
    memory: &Memory,
    kernels: &[Loaded],
    options: &EmulatedOptions,
) -> Result<(), DeviceError> {
    match work {
        Work::Copy { direction, to, from, bytes } => {
            let (to_host, from_host) = (*direction == Direction::Download, *direction == Direction::Upload);
            check(memory, "a copy's target", *to, *bytes, to_host)?;
            check(memory, "a copy's source", *from, *bytes, from_host)?;
            if *direction == Direction::OnDevice && to.abs_diff(*from) < *bytes as u64 {
                return Err(DeviceError::Emulated("a copy's ranges overlap".into()));
            }
            // SAFETY: the device's side was just checked; whoever submitted the copy vouched for the host's.
            unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) };
        }
        Work::Fill { at, byte, bytes } => {
            memory.check_device("a fill", *at, *bytes)?;
            // SAFETY: just checked.
            unsafe { std::ptr::write_bytes(*at as *mut u8, *byte, *bytes) };
        }
        Work::Gemm { shape, y, x, weight } => {
            let GemmShape { rows, d_out, d_in, out, .. } = *shape;
            let out_bytes = if out == GemmOut::F32 { 4 } else { 2 };
            memory.check_device("a product's result", *y, rows * d_out * out_bytes)?;
            memory.check_device("a product's x", *x, rows * d_in * 2)?;
            memory.check_device("a product's weight", *weight, d_out * d_in * 2)?;
            // SAFETY: just checked.
            unsafe { gemm::run(*shape, *y, *x, *weight) };
        }
        Work::Launch { kernel, threads, grid, shared_bytes, args } => {
            let loaded = &kernels[*kernel];
            memory.check_args(&loaded.name, args)?;
            launch(loaded, *threads, *grid, *shared_bytes, args, options)?;
        }
        Work::Replay(_) => {}
    }
    Ok(())
}

fn check(memory: &Memory, what: &str, at: u64, bytes: usize, is_host: bool) -> Result<(), DeviceError> {
    if is_host { memory.check_host(what, at, bytes) } else { memory.check_device(what, at, bytes) }
}

fn launch(
    loaded: &Loaded,
    threads: u32,
    grid: Grid,
    shared_bytes: u32,
    args: &[u64],
    options: &EmulatedOptions,
) -> Result<(), DeviceError> {
    let launch = EmuLaunch {
        grid_x: grid.x,
        grid_y: grid.y,
        block_x: threads,
        dynamic_shared_bytes: shared_bytes,
        schedule: options.schedule as u32,
        flags: u32::from(options.races && !options.sanitize),
        seed: options.seed,
    };
    let mut error = [0 as c_char; 1024];
    // SAFETY: the function has this signature (the ABI of the emulator), the struct is of the kernel's size, and the caller
    // vouched for the addresses in it.
    let code =
        unsafe { (loaded.launch)(&raw const launch, args.as_ptr().cast(), error.as_mut_ptr(), error.len() as u64) };
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the emulator ends its text with NUL, and the buffer began as zeros.
    let text = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned();
    Err(DeviceError::Emulated(format!("{}: {text}", loaded.name)))
}
