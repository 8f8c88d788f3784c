//! Devices that run the CUDA kernels: a GPU through its driver, or the host emulator, which runs the same sources thread
//! by thread on the CPU. Everything above speaks to [`Device`] and cannot tell them apart.
//!
//! One thread owns a device and everything made by it. Memory, streams, events, kernels and plans are made at start; a
//! step only launches, copies and records, so nothing on its path allocates or waits.

mod buffer;
mod cache;
pub mod check;
mod cuda;
mod emulated;
mod error;
mod libraries;
pub mod lora;
mod nvrtc;
pub mod probe;
mod program;
mod shape;
pub mod step;
#[cfg(test)]
pub(crate) mod testing;

use std::fmt::Debug;
use std::rc::Rc;

pub use buffer::{DeviceBuffer, HostBuffer};
pub use cache::CodeCache;
pub use cuda::{CudaDevice, CudaOptions};
pub use emulated::{Asynchrony, EmulatedDevice, EmulatedOptions, Schedule};
pub use error::DeviceError;
pub use libraries::{FoundLibrary, LibraryPaths};
pub use nvrtc::{Compiled, Nvrtc, TESTED_ARCHS, Target, compile_all};
pub use program::{KernelSource, Program};
pub use shape::ModelShape;

/// A place in device memory.
pub type Address = u64;

/// The model's 16-bit type on a device: weights, activations, KV cache and adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elem {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// As its maker calls it.
    pub name: String,
    /// Architecture that kernels are compiled for, such as `sm_90a`; `emulated` for the emulator.
    pub arch: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Dynamic shared memory that one block may have, bytes.
    pub shared_bytes_max: u32,
    /// Driver and libraries with their versions, for reports.
    pub libraries: Vec<(String, String)>,
}

/// How the host uses page-locked memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostUse {
    /// The host writes and the device reads, by copies or from kernels at the same address.
    Upload,
    /// The device writes and the host reads: cached.
    Readback,
}

/// Importance of a stream's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Steps.
    High,
    /// Uploads beside them.
    Low,
}

/// An ordered queue of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub(crate) usize);

/// A point in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub(crate) usize);

/// A captured sequence of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub(crate) usize);

/// A compiled and loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub(crate) index: usize,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// `size_of` the argument struct.
    pub(crate) args_bytes: usize,
}

/// Type of a product's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmOut {
    /// The model's type.
    Elem,
    /// Single precision (logits).
    F32,
}

/// `y[rows, d_out] = x[rows, d_in] W^T`, W `[d_out, d_in]`, all row-major; sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GemmShape {
    /// Rows of x and y.
    pub rows: usize,
    /// Outputs.
    pub d_out: usize,
    /// Inputs.
    pub d_in: usize,
    /// Type of x and W.
    pub elem: Elem,
    /// Type of y.
    pub out: GemmOut,
}

/// An algorithm chosen for a [`GemmShape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GemmPlan(pub(crate) usize);

/// Blocks of a launch; kernels take their work by stride, so any number is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x.
    pub x: u32,
    /// Blocks along y.
    pub y: u32,
}

impl Grid {
    /// A row of blocks, at least one.
    #[must_use]
    pub fn x(blocks: usize) -> Self {
        Self { x: u32::try_from(blocks).unwrap_or(u32::MAX).max(1), y: 1 }
    }
}

/// What runs kernels. Calls are made by one thread.
///
/// # Safety of the `unsafe` calls
/// Addresses name memory of this device that is large enough and that lives until the work is done; host pointers stay
/// valid, and what a copy reads stays unchanged, until then. Argument structs match the kernel's.
pub trait Device: Debug {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// What the user should know since the last call, such as a cache that cannot be written.
    fn take_warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Device memory that nobody uses, bytes.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// Takes device memory, aligned to 256 bytes; its content is undefined. Use [`DeviceBuffer::new`].
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// Gives memory of [`Device::alloc`] back.
    ///
    /// # Safety
    /// No work that is under way or yet to come uses it.
    unsafe fn free(&self, address: Address);

    /// Takes page-locked host memory, aligned to 256 bytes, zeroed. Use [`HostBuffer::new`].
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc_host(&self, bytes: usize, purpose: HostUse) -> Result<*mut u8, DeviceError>;

    /// Gives memory of [`Device::alloc_host`] back.
    ///
    /// # Safety
    /// No work that is under way or yet to come uses it.
    unsafe fn free_host(&self, pointer: *mut u8);

    /// Makes a stream; it lives as long as the device.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn stream(&self, priority: Priority) -> Result<Stream, DeviceError>;

    /// Makes an event; it lives as long as the device. One that was never recorded is done.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn event(&self) -> Result<Event, DeviceError>;

    /// Makes an event that also keeps the time at which it came; for benchmarks.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn timed_event(&self) -> Result<Event, DeviceError>;

    /// Milliseconds between two events of [`Device::timed_event`] that have come.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver, also for events that keep no time or have not come.
    fn elapsed_ms(&self, start: Event, end: Event) -> Result<f32, DeviceError>;

    /// Sets the event to what the stream has been given so far.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError>;

    /// What the stream is given from now on waits for the event; the host does not.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;

    /// Whether the event has come. Does not wait.
    ///
    /// # Errors
    /// A [`DeviceError`] of work before the event.
    fn is_done(&self, event: Event) -> Result<bool, DeviceError>;

    /// The host waits for the event.
    ///
    /// # Errors
    /// A [`DeviceError`] of work before the event.
    fn synchronize(&self, event: Event) -> Result<(), DeviceError>;

    /// Copies host to device.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// See the trait.
    unsafe fn upload(&self, stream: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError>;

    /// Copies device to host.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// See the trait.
    unsafe fn download(&self, stream: Stream, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError>;

    /// Copies on the device; the ranges do not overlap.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// See the trait.
    unsafe fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError>;

    /// Sets bytes.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// See the trait.
    unsafe fn fill(&self, stream: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), DeviceError>;

    /// Compiles a program for this device, or takes it from the cache on disk, and loads it.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] with the compiler's log.
    fn load(&self, program: &Program) -> Result<Kernel, DeviceError>;

    /// Launches a kernel with `shared_bytes` of dynamic shared memory. Use [`launch`].
    ///
    /// # Errors
    /// [`DeviceError`] of the driver; the emulator's faults come where the host waits.
    /// # Safety
    /// See the trait. `args` points to the kernel's argument struct, which is copied.
    unsafe fn launch_raw(
        &self,
        stream: Stream,
        kernel: Kernel,
        grid: Grid,
        shared_bytes: u32,
        args: *const u8,
    ) -> Result<(), DeviceError>;

    /// Chooses how to compute a product; may time candidates, so it is called at start.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a shape the library refuses.
    fn gemm_plan(&self, shape: GemmShape) -> Result<GemmPlan, DeviceError>;

    /// Computes a product.
    ///
    /// # Errors
    /// [`DeviceError`] of the library.
    /// # Safety
    /// See the trait; the addresses hold what the plan's shape says.
    unsafe fn gemm(
        &self,
        stream: Stream,
        plan: GemmPlan,
        y: Address,
        x: Address,
        weight: Address,
    ) -> Result<(), DeviceError>;

    /// From now on, work given to the stream (and to streams that wait for its events) is recorded and not run.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn begin_capture(&self, stream: Stream) -> Result<(), DeviceError>;

    /// Ends the recording.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    fn end_capture(&self, stream: Stream) -> Result<Graph, DeviceError>;

    /// Runs a recording.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// Whatever the recorded work uses is still there.
    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<(), DeviceError>;

    /// Nodes of a recording.
    fn graph_nodes(&self, graph: Graph) -> usize;
}

/// A device that its thread shares between buffers and ops.
pub type SharedDevice = Rc<dyn Device>;

/// Launches a kernel with its argument struct.
///
/// # Errors
/// See [`Device::launch_raw`]; [`DeviceError::Arguments`] if the struct is not of the kernel's size.
/// # Safety
/// See [`Device`].
pub unsafe fn launch<Args: Copy>(
    device: &dyn Device,
    stream: Stream,
    kernel: Kernel,
    grid: Grid,
    shared_bytes: u32,
    args: &Args,
) -> Result<(), DeviceError> {
    if size_of::<Args>() != kernel.args_bytes {
        return Err(DeviceError::Arguments { got: size_of::<Args>(), want: kernel.args_bytes });
    }
    // SAFETY: the caller vouches for the addresses; the struct is of the kernel's size.
    unsafe { device.launch_raw(stream, kernel, grid, shared_bytes, std::ptr::from_ref(args).cast()) }
}
