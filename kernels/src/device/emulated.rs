//! The host emulator as a device: kernels are compiled by g++ and run thread by thread on the CPU, memory is host memory.
//! It shows wrong results, not speed.

mod compile;
mod gemm;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;

use super::{
    Address, Device, DeviceError, DeviceInfo, Event, GemmPlan, GemmShape, Graph, Grid, HostUse, Kernel, Priority,
    Program, Stream,
};

/// The order in which a block's threads run between two meetings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Each warp goes to its next meeting, then the next warp.
    RoundRobin,
    /// The lowest warp runs as far ahead as it can.
    Eager,
    /// The highest warp does, blocks in falling order.
    EagerReverse,
    /// Shuffled.
    Random,
}

impl Schedule {
    /// All of them: a correct kernel gives the same result under each.
    pub const ALL: [Self; 4] = [Self::RoundRobin, Self::Eager, Self::EagerReverse, Self::Random];
}

/// How to emulate.
#[derive(Clone, Debug)]
pub struct EmulatedOptions {
    /// Where compiled kernels are kept.
    pub cache_dir: PathBuf,
    /// Order of threads.
    pub schedule: Schedule,
    /// Compile with instrumentation that finds races.
    pub races: bool,
    /// Compile with the address and undefined-behaviour sanitizers; the process was started with their library.
    pub sanitize: bool,
    /// Seed of [`Schedule::Random`].
    pub seed: u64,
}

/// The emulator.
#[derive(Debug)]
pub struct EmulatedDevice {
    info: DeviceInfo,
    options: EmulatedOptions,
    compiler: compile::Compiler,
    kernels: RefCell<Vec<Loaded>>,
    shapes: RefCell<Vec<GemmShape>>,
    memory: RefCell<HashMap<u64, std::alloc::Layout>>,
    capture: RefCell<Option<Vec<Work>>>,
    graphs: RefCell<Vec<Vec<Work>>>,
    streams: Cell<usize>,
    events: Cell<usize>,
}

#[repr(C)]
struct EmuLaunch {
    grid_x: u32,
    grid_y: u32,
    block_x: u32,
    dynamic_shared_bytes: u32,
    schedule: u32,
    flags: u32,
    seed: u64,
}

type LaunchFn = unsafe extern "C" fn(*const EmuLaunch, *const u8, *mut c_char, u64) -> c_int;

#[derive(Debug)]
struct Loaded {
    launch: LaunchFn,
    name: String,
    _library: libloading::Library,
}

/// One thing a stream was given.
#[derive(Clone, Debug)]
enum Work {
    Copy { to: u64, from: u64, bytes: usize },
    Fill { at: u64, byte: u8, bytes: usize },
    Launch { kernel: usize, threads: u32, grid: Grid, shared_bytes: u32, args: Vec<u64> },
    Gemm { shape: GemmShape, y: u64, x: u64, weight: u64 },
    Replay(usize),
}

impl EmulatedDevice {
    /// Starts the emulator; compiles its runtime if it is not in the cache.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] or [`DeviceError::Unsupported`] without g++.
    pub fn new(options: EmulatedOptions) -> Result<Self, DeviceError> {
        let compiler = compile::Compiler::new(&options)?;
        let info = DeviceInfo {
            name: "host emulator".into(),
            arch: "emulated".into(),
            multiprocessors: 2,
            memory_bytes: 1 << 34,
            shared_bytes_max: 227 << 10,
            libraries: vec![("compiler".into(), compiler.version().to_owned())],
        };
        Ok(Self {
            info,
            options,
            compiler,
            kernels: RefCell::default(),
            shapes: RefCell::default(),
            memory: RefCell::default(),
            capture: RefCell::default(),
            graphs: RefCell::default(),
            streams: Cell::new(0),
            events: Cell::new(0),
        })
    }

    fn submit(&self, work: Work) -> Result<(), DeviceError> {
        if let Some(recorded) = self.capture.borrow_mut().as_mut() {
            recorded.push(work);
            return Ok(());
        }
        self.run(&work)
    }

    fn run(&self, work: &Work) -> Result<(), DeviceError> {
        match work {
            // SAFETY: whoever submitted the work vouched for its addresses.
            Work::Copy { to, from, bytes } => unsafe {
                std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes);
            },
            // SAFETY: the same.
            Work::Fill { at, byte, bytes } => unsafe { std::ptr::write_bytes(*at as *mut u8, *byte, *bytes) },
            // SAFETY: the same.
            Work::Gemm { shape, y, x, weight } => unsafe { gemm::run(*shape, *y, *x, *weight) },
            Work::Replay(graph) => {
                let recorded = self.graphs.borrow()[*graph].clone();
                for work in &recorded {
                    self.run(work)?;
                }
            }
            Work::Launch { kernel, threads, grid, shared_bytes, args } => {
                self.launch_now(*kernel, *threads, *grid, *shared_bytes, args)?;
            }
        }
        Ok(())
    }

    fn launch_now(
        &self,
        kernel: usize,
        threads: u32,
        grid: Grid,
        shared_bytes: u32,
        args: &[u64],
    ) -> Result<(), DeviceError> {
        let launch = EmuLaunch {
            grid_x: grid.x,
            grid_y: grid.y,
            block_x: threads,
            dynamic_shared_bytes: shared_bytes,
            schedule: self.options.schedule as u32,
            flags: u32::from(self.options.races),
            seed: self.options.seed,
        };
        let kernels = self.kernels.borrow();
        let loaded = &kernels[kernel];
        let mut error = [0 as c_char; 1024];
        // SAFETY: the function has this signature (the ABI of the emulator), the struct is of the kernel's size, and the
        // caller vouched for the addresses in it.
        let code =
            unsafe { (loaded.launch)(&raw const launch, args.as_ptr().cast(), error.as_mut_ptr(), error.len() as u64) };
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the emulator ends its text with NUL, and the buffer began as zeros.
        let text = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned();
        Err(DeviceError::Emulated(format!("{}: {text}", loaded.name)))
    }
}

impl Device for EmulatedDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let used: usize = self.memory.borrow().values().map(std::alloc::Layout::size).sum();
        Ok(self.info.memory_bytes.saturating_sub(used as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DeviceError> {
        let refused = || DeviceError::OutOfMemory { place: "device", bytes };
        let layout = std::alloc::Layout::from_size_align(bytes.max(1), 256).map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let pointer = unsafe { std::alloc::alloc(layout) };
        if pointer.is_null() {
            return Err(refused());
        }
        self.memory.borrow_mut().insert(pointer as u64, layout);
        Ok(pointer as u64)
    }

    unsafe fn free(&self, address: Address) {
        if let Some(layout) = self.memory.borrow_mut().remove(&address) {
            // SAFETY: allocated in `alloc` with this layout.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) }
        }
    }

    fn alloc_host(&self, bytes: usize, _purpose: HostUse) -> Result<*mut u8, DeviceError> {
        let address = self.alloc(bytes)?;
        // SAFETY: just allocated with this size.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
        Ok(address as *mut u8)
    }

    unsafe fn free_host(&self, pointer: *mut u8) {
        // SAFETY: passed on.
        unsafe { self.free(pointer as u64) }
    }

    fn stream(&self, _priority: Priority) -> Result<Stream, DeviceError> {
        Ok(Stream(self.streams.replace(self.streams.get() + 1)))
    }

    fn event(&self) -> Result<Event, DeviceError> {
        Ok(Event(self.events.replace(self.events.get() + 1)))
    }

    fn record(&self, _event: Event, _stream: Stream) -> Result<(), DeviceError> {
        Ok(())
    }

    fn wait(&self, _stream: Stream, _event: Event) -> Result<(), DeviceError> {
        Ok(())
    }

    fn is_done(&self, _event: Event) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn synchronize(&self, _event: Event) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn upload(&self, _stream: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        self.submit(Work::Copy { to, from: from as u64, bytes })
    }

    unsafe fn download(&self, _stream: Stream, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError> {
        self.submit(Work::Copy { to: to as u64, from, bytes })
    }

    unsafe fn copy(&self, _stream: Stream, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        self.submit(Work::Copy { to, from, bytes })
    }

    unsafe fn fill(&self, _stream: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        self.submit(Work::Fill { at, byte, bytes })
    }

    fn load(&self, program: &Program) -> Result<Kernel, DeviceError> {
        let library = self.compiler.compile(program)?;
        let missing = |error: libloading::Error| DeviceError::Compile {
            kernel: program.entry.into(),
            arch: "emulated".into(),
            log: error.to_string(),
        };
        // SAFETY: our own source, compiled by us; its initialisers do nothing.
        let library = unsafe { libloading::Library::new(&library) }.map_err(missing)?;
        // SAFETY: `KERNEL_ENTRY` defines both functions with these signatures.
        let (launch, args_bytes) = unsafe {
            let launch: LaunchFn = *library.get(format!("{}__launch\0", program.entry).as_bytes()).map_err(missing)?;
            let args_bytes: unsafe extern "C" fn() -> u32 =
                *library.get(format!("{}__args_bytes\0", program.entry).as_bytes()).map_err(missing)?;
            (launch, args_bytes() as usize)
        };
        if args_bytes != program.args_bytes {
            return Err(DeviceError::Arguments { got: program.args_bytes, want: args_bytes });
        }
        let mut kernels = self.kernels.borrow_mut();
        kernels.push(Loaded { launch, name: program.entry.to_owned(), _library: library });
        Ok(Kernel { index: kernels.len() - 1, threads: program.threads, args_bytes })
    }

    unsafe fn launch_raw(
        &self,
        _stream: Stream,
        kernel: Kernel,
        grid: Grid,
        shared_bytes: u32,
        args: *const u8,
    ) -> Result<(), DeviceError> {
        let mut copy = vec![0u64; kernel.args_bytes.div_ceil(8)];
        // SAFETY: the caller passes a struct of this many bytes.
        unsafe { std::ptr::copy_nonoverlapping(args, copy.as_mut_ptr().cast(), kernel.args_bytes) };
        self.submit(Work::Launch { kernel: kernel.index, threads: kernel.threads, grid, shared_bytes, args: copy })
    }

    fn gemm_plan(&self, shape: GemmShape) -> Result<GemmPlan, DeviceError> {
        let mut shapes = self.shapes.borrow_mut();
        shapes.push(shape);
        Ok(GemmPlan(shapes.len() - 1))
    }

    unsafe fn gemm(
        &self,
        _stream: Stream,
        plan: GemmPlan,
        y: Address,
        x: Address,
        weight: Address,
    ) -> Result<(), DeviceError> {
        let shape = self.shapes.borrow()[plan.0];
        self.submit(Work::Gemm { shape, y, x, weight })
    }

    fn begin_capture(&self, _stream: Stream) -> Result<(), DeviceError> {
        *self.capture.borrow_mut() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self, _stream: Stream) -> Result<Graph, DeviceError> {
        let recorded = self.capture.borrow_mut().take();
        let recorded = recorded.ok_or_else(|| DeviceError::Emulated("no capture was begun".into()))?;
        let mut graphs = self.graphs.borrow_mut();
        graphs.push(recorded);
        Ok(Graph(graphs.len() - 1))
    }

    unsafe fn replay(&self, _stream: Stream, graph: Graph) -> Result<(), DeviceError> {
        self.submit(Work::Replay(graph.0))
    }

    fn graph_nodes(&self, graph: Graph) -> usize {
        self.graphs.borrow()[graph.0].len()
    }
}
