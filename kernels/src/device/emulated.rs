//! The host emulator as a device: kernels are compiled by g++ and run thread by thread on the CPU, memory is host memory.
//! It shows wrong results, not speed.
//!
//! Streams are queues. Under [`Asynchrony::Lazy`] their work runs only when the host waits for it (or by chance before), so
//! a host that reads too early, overwrites what a copy has not read yet, frees what is still in use, or forgets that one
//! stream has to wait for another, gets a wrong result or an error here and not only now and then on a GPU.

mod capture;
mod compile;
mod gemm;
mod memory;
mod queue;
#[cfg(test)]
mod tests;
mod work;

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::PathBuf;
use std::rc::Rc;

use self::capture::{Capture, Recording};
use self::memory::{Memory, Place};
use self::queue::{Next, Queues, Ticket};
use self::work::{Direction, LaunchFn, Loaded, Work};
use super::check::Random;
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

/// When a stream's work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asynchrony {
    /// As soon as it is given. Errors still come where the host waits.
    Eager,
    /// When the host waits for it; whenever the host waits or asks, some more by chance. The seed makes it repeatable.
    Lazy(u64),
}

/// How to emulate.
#[derive(Clone, Debug)]
pub struct EmulatedOptions {
    /// Where compiled kernels are kept.
    pub cache_dir: PathBuf,
    /// Order of threads.
    pub schedule: Schedule,
    /// When streams run.
    pub asynchrony: Asynchrony,
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
    state: RefCell<State>,
}

/// Everything that work changes.
#[derive(Debug)]
struct State {
    memory: Memory,
    queues: Queues,
    capture: Option<Capture>,
    /// Events whose last record was captured: they mark no point in time.
    captured: HashSet<usize>,
    graphs: Vec<Rc<Recording>>,
    random: Option<Random>,
    /// The first fault of work. Nothing runs after it.
    fault: Option<DeviceError>,
    /// Whether the host has met the fault: then, as on a GPU, no call works any more.
    is_fault_known: bool,
}

impl State {
    fn check(&self, stream: Option<Stream>, event: Option<Event>) -> Result<(), DeviceError> {
        if let Some(fault) = self.fault.as_ref().filter(|_| self.is_fault_known) {
            return Err(fault.clone());
        }
        let is_stream = stream.is_none_or(|stream| stream.0 < self.queues.streams());
        let is_event = event.is_none_or(|event| event.0 < self.queues.events());
        if is_stream && is_event {
            return Ok(());
        }
        Err(DeviceError::Emulated("a stream or an event of another device".into()))
    }

    /// The host looks: a fault shows.
    fn observe(&mut self) -> Result<(), DeviceError> {
        self.is_fault_known = self.fault.is_some();
        self.fault.clone().map_or(Ok(()), Err)
    }

    /// What the host may not do during a capture.
    fn outside_capture(&mut self, what: &str) -> Result<(), DeviceError> {
        self.capture.as_mut().map_or(Ok(()), |capture| Err(capture.refuse(what)))
    }

    fn outside_captured(&self, event: Event) -> Result<(), DeviceError> {
        if self.captured.contains(&event.0) {
            return Err(DeviceError::Emulated("the event was last recorded in a capture".into()));
        }
        Ok(())
    }
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
        let state = State {
            memory: Memory::default(),
            queues: Queues::default(),
            capture: None,
            captured: HashSet::new(),
            graphs: Vec::new(),
            random: match options.asynchrony {
                Asynchrony::Eager => None,
                Asynchrony::Lazy(seed) => Some(Random::new(seed)),
            },
            fault: None,
            is_fault_known: false,
        };
        let (kernels, shapes) = (RefCell::default(), RefCell::default());
        Ok(Self { info, options, compiler, kernels, shapes, state: RefCell::new(state) })
    }

    fn submit(&self, stream: Stream, work: Work) -> Result<(), DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(Some(stream), None)?;
        if let Some(capture) = &mut state.capture {
            return capture.push(stream.0, work);
        }
        state.queues.push(stream.0, work);
        self.run_if_eager(state);
        Ok(())
    }

    fn run_if_eager(&self, state: &mut State) {
        if state.random.is_none() {
            // What is given later never holds up what was given before, so one pass over the streams empties them unless
            // one waits for a later one: then another pass does.
            while !state.queues.is_idle() {
                (0..state.queues.streams()).for_each(|stream| while self.step(state, stream).is_ok() {});
            }
        }
    }

    /// Takes a stream one entry further. An error holds the ticket it waits for, or none if the stream is empty.
    fn step(&self, state: &mut State, stream: usize) -> Result<(), Option<Ticket>> {
        match state.queues.next(stream) {
            Next::Empty => return Err(None),
            Next::Blocked(ticket) => return Err(Some(ticket)),
            Next::Passed => {}
            Next::Run(_) if state.fault.is_some() => {}
            Next::Run(work) => state.fault = self.run(state, &work).err(),
        }
        Ok(())
    }

    /// Runs what leads to a ticket and nothing else.
    fn force(&self, state: &mut State, ticket: Ticket) {
        let mut target = ticket;
        while let Some(stream) = state.queues.stream_of(target).or_else(|| state.queues.stream_of(ticket)) {
            if !state.queues.is_pending(target) {
                target = ticket;
            }
            if let Err(Some(before)) = self.step(state, stream) {
                target = before;
            }
        }
    }

    /// Runs up to `most` entries of streams by chance.
    fn drift(&self, state: &mut State, most: usize) {
        let streams = state.queues.streams();
        let Some(random) = state.random.as_mut().filter(|_| streams > 0) else { return };
        let chosen: Vec<usize> = (0..random.below(most + 1)).map(|_| random.below(streams)).collect();
        for stream in chosen {
            let _ = self.step(state, stream); // empty or blocked: nothing happens
        }
    }

    fn run(&self, state: &mut State, work: &Work) -> Result<(), DeviceError> {
        let Work::Replay(graph) = work else {
            return work::run(work, &state.memory, &self.kernels.borrow(), &self.options);
        };
        let recording = state.graphs[*graph].clone();
        let order = recording.order(state.random.as_mut());
        order.into_iter().try_for_each(|work| self.run(state, work))
    }

    fn alloc_in(&self, bytes: usize, place: Place) -> Result<u64, DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(None, None)?;
        state.outside_capture("an allocation")?;
        state.memory.alloc(bytes, place, self.info.memory_bytes)
    }

    fn free_in(&self, address: u64) {
        let state = &mut *self.state.borrow_mut();
        let _ = state.outside_capture("memory was given back"); // shows when the capture ends
        state.memory.free(address);
        if state.queues.is_idle() {
            state.memory.trim();
        }
    }
}

impl Device for EmulatedDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let used = self.state.borrow().memory.device_bytes();
        Ok(self.info.memory_bytes.saturating_sub(used as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.alloc_in(bytes, Place::Device)
    }

    unsafe fn free(&self, address: Address) {
        self.free_in(address);
    }

    fn alloc_host(&self, bytes: usize, _purpose: HostUse) -> Result<*mut u8, DeviceError> {
        Ok(self.alloc_in(bytes, Place::Host)? as *mut u8)
    }

    unsafe fn free_host(&self, pointer: *mut u8) {
        self.free_in(pointer as u64);
    }

    fn stream(&self, _priority: Priority) -> Result<Stream, DeviceError> {
        Ok(Stream(self.state.borrow_mut().queues.stream()))
    }

    fn event(&self) -> Result<Event, DeviceError> {
        Ok(Event(self.state.borrow_mut().queues.event()))
    }

    fn timed_event(&self) -> Result<Event, DeviceError> {
        self.event()
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(Some(stream), Some(event))?;
        if let Some(capture) = &mut state.capture {
            return capture.record(event.0, stream.0);
        }
        state.captured.remove(&event.0);
        state.queues.record(event.0, stream.0);
        self.run_if_eager(state);
        Ok(())
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(Some(stream), Some(event))?;
        if let Some(capture) = &mut state.capture {
            return capture.wait(stream.0, event.0);
        }
        state.outside_captured(event)?;
        state.queues.wait(stream.0, event.0);
        self.run_if_eager(state);
        Ok(())
    }

    fn is_done(&self, event: Event) -> Result<bool, DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(None, Some(event))?;
        state.outside_capture("a question whether an event has come")?;
        state.outside_captured(event)?;
        self.drift(state, 4);
        state.observe()?;
        Ok(state.queues.awaited(event.0).is_none())
    }

    fn synchronize(&self, event: Event) -> Result<(), DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(None, Some(event))?;
        state.outside_capture("a wait of the host")?;
        state.outside_captured(event)?;
        self.drift(state, 8);
        if let Some(ticket) = state.queues.awaited(event.0) {
            self.force(state, ticket);
        }
        state.observe()
    }

    fn elapsed_ms(&self, start: Event, end: Event) -> Result<f32, DeviceError> {
        let state = self.state.borrow();
        state.check(None, Some(start))?;
        state.check(None, Some(end))?;
        let (Some(start), Some(end)) = (state.queues.came_at(start.0), state.queues.came_at(end.0)) else {
            return Err(DeviceError::Unsupported("the time between events that have not come".into()));
        };
        Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
    }

    unsafe fn upload(&self, stream: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        self.copy_work(stream, Direction::Upload, to, from as u64, bytes)
    }

    unsafe fn download(&self, stream: Stream, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError> {
        self.copy_work(stream, Direction::Download, to as u64, from, bytes)
    }

    unsafe fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        self.copy_work(stream, Direction::OnDevice, to, from, bytes)
    }

    unsafe fn fill(&self, stream: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 { Ok(()) } else { self.submit(stream, Work::Fill { at, byte, bytes }) }
    }

    fn load(&self, program: &Program) -> Result<Kernel, DeviceError> {
        self.state.borrow_mut().outside_capture("a kernel was loaded")?;
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
        stream: Stream,
        kernel: Kernel,
        grid: Grid,
        shared_bytes: u32,
        args: *const u8,
    ) -> Result<(), DeviceError> {
        let mut copy = vec![0u64; kernel.args_bytes.div_ceil(8)];
        // SAFETY: the caller passes a struct of this many bytes.
        unsafe { std::ptr::copy_nonoverlapping(args, copy.as_mut_ptr().cast(), kernel.args_bytes) };
        let (kernel, threads) = (kernel.index, kernel.threads);
        self.submit(stream, Work::Launch { kernel, threads, grid, shared_bytes, args: copy })
    }

    fn gemm_plan(&self, shape: GemmShape) -> Result<GemmPlan, DeviceError> {
        self.state.borrow_mut().outside_capture("the choice of an algorithm")?;
        let mut shapes = self.shapes.borrow_mut();
        shapes.push(shape);
        Ok(GemmPlan(shapes.len() - 1))
    }

    unsafe fn gemm(
        &self,
        stream: Stream,
        plan: GemmPlan,
        y: Address,
        x: Address,
        weight: Address,
    ) -> Result<(), DeviceError> {
        let shape = self.shapes.borrow()[plan.0];
        self.submit(stream, Work::Gemm { shape, y, x, weight })
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), DeviceError> {
        let state = &mut *self.state.borrow_mut();
        state.check(Some(stream), None)?;
        state.outside_capture("another capture")?;
        state.capture = Some(Capture::begin(stream.0));
        Ok(())
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph, DeviceError> {
        let state = &mut *self.state.borrow_mut();
        let capture = state.capture.take();
        let capture = capture.ok_or_else(|| DeviceError::Emulated("no capture was begun".into()))?;
        let (recording, events) = capture.end(stream.0)?;
        state.captured.extend(events);
        state.graphs.push(Rc::new(recording));
        Ok(Graph(state.graphs.len() - 1))
    }

    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<(), DeviceError> {
        self.submit(stream, Work::Replay(graph.0))
    }

    fn graph_nodes(&self, graph: Graph) -> usize {
        self.state.borrow().graphs[graph.0].nodes()
    }
}

impl EmulatedDevice {
    fn copy_work(
        &self,
        stream: Stream,
        direction: Direction,
        to: u64,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 { Ok(()) } else { self.submit(stream, Work::Copy { direction, to, from, bytes }) }
    }
}
