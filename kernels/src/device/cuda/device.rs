//! The device's calls, one driver call each.

use std::ffi::c_void;

use cudarc::driver::sys as cu;

use super::super::{
    Address, Device, DeviceError, DeviceInfo, Event, GemmPlan, GemmShape, Graph, Grid, HostUse, Kernel, Priority,
    Program, Stream,
};
use super::gemm::{ALIGNMENT, Operands, WORKSPACE_BYTES};
use super::{CudaDevice, GraphState, StreamState, api, untyped};

impl CudaDevice {
    pub(super) fn stream_state(&self, stream: Stream) -> Result<StreamState, DeviceError> {
        self.streams.borrow().get(stream.0).copied().ok_or_else(|| foreign("stream"))
    }

    fn event_handle(&self, event: Event) -> Result<cu::CUevent, DeviceError> {
        self.events.borrow().get(event.0).copied().ok_or_else(|| foreign("event"))
    }

    fn graph_state(&self, graph: Graph) -> Result<GraphState, DeviceError> {
        self.graphs.borrow().get(graph.0).copied().ok_or_else(|| foreign("graph"))
    }

    fn add_event(&self, flags: u32) -> Result<Event, DeviceError> {
        let event = self.new_event(flags)?;
        let mut events = self.events.borrow_mut();
        events.push(event);
        Ok(Event(events.len() - 1))
    }

    /// The stream's scratch memory. Taken for the first product if it was not taken at start, which a capture refuses.
    fn workspace(&self, stream: Stream) -> Result<u64, DeviceError> {
        let state = self.stream_state(stream)?;
        if state.workspace != 0 {
            return Ok(state.workspace);
        }
        let workspace = self.alloc_bytes(WORKSPACE_BYTES)?;
        self.streams.borrow_mut()[stream.0].workspace = workspace;
        Ok(workspace)
    }
}

fn foreign(what: &str) -> DeviceError {
    DeviceError::Unsupported(format!("a {what} of another device"))
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn take_warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.take();
        warnings.extend(self.cache.take_warnings());
        warnings
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: places for two numbers.
        self.check("cuMemGetInfo", unsafe { (self.driver.cuMemGetInfo_v2)(&raw mut free, &raw mut total) })?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.alloc_bytes(bytes)
    }

    unsafe fn free(&self, address: Address) {
        // SAFETY: taken in `alloc`, and the caller knows that nobody uses it.
        self.check_later("cuMemFree", unsafe { (self.driver.cuMemFree_v2)(address) });
    }

    fn alloc_host(&self, bytes: usize, _purpose: HostUse) -> Result<*mut u8, DeviceError> {
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // Kernels read it at the host's address, which the driver promises for memory that is not write-combined.
        let flags = cu::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a place for the pointer.
        let code = unsafe { (self.driver.cuMemHostAlloc)(&raw mut pointer, bytes.max(1), flags) };
        if code == api::OUT_OF_MEMORY {
            return Err(DeviceError::OutOfMemory { place: "page-locked host", bytes });
        }
        self.check("cuMemHostAlloc", code)?;
        // SAFETY: just taken with this size; pages, so aligned to more than 256 bytes.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes.max(1)) };
        Ok(pointer.cast())
    }

    unsafe fn free_host(&self, pointer: *mut u8) {
        // SAFETY: taken in `alloc_host`, and the caller knows that nobody uses it.
        self.check_later("cuMemFreeHost", unsafe { (self.driver.cuMemFreeHost)(pointer.cast()) });
    }

    fn stream(&self, priority: Priority) -> Result<Stream, DeviceError> {
        let mut state = self.new_stream(priority)?;
        let mut streams = self.streams.borrow_mut();
        if priority == Priority::High {
            state.workspace = self.alloc_bytes(WORKSPACE_BYTES).inspect_err(|_| {
                // SAFETY: just made and not used.
                self.check_later("cuStreamDestroy", unsafe { (self.driver.cuStreamDestroy_v2)(state.stream) });
            })?;
        }
        streams.push(state);
        Ok(Stream(streams.len() - 1))
    }

    fn event(&self) -> Result<Event, DeviceError> {
        self.add_event(cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    fn timed_event(&self) -> Result<Event, DeviceError> {
        self.add_event(cu::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        let (event, stream) = (self.event_handle(event)?, self.stream_state(stream)?.stream);
        // SAFETY: both were made here.
        self.check("cuEventRecord", unsafe { (self.driver.cuEventRecord)(event, stream) })
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let (event, stream) = (self.event_handle(event)?, self.stream_state(stream)?.stream);
        // SAFETY: both were made here.
        self.check("cuStreamWaitEvent", unsafe { (self.driver.cuStreamWaitEvent)(stream, event, 0) })
    }

    fn is_done(&self, event: Event) -> Result<bool, DeviceError> {
        let event = self.event_handle(event)?;
        // SAFETY: made here.
        let code = unsafe { (self.driver.cuEventQuery)(event) };
        if code == api::NOT_READY {
            return Ok(false);
        }
        self.check("cuEventQuery", code)?;
        Ok(true)
    }

    fn synchronize(&self, event: Event) -> Result<(), DeviceError> {
        let event = self.event_handle(event)?;
        // SAFETY: made here.
        self.check("cuEventSynchronize", unsafe { (self.driver.cuEventSynchronize)(event) })
    }

    fn elapsed_ms(&self, start: Event, end: Event) -> Result<f32, DeviceError> {
        let (start, end) = (self.event_handle(start)?, self.event_handle(end)?);
        let mut milliseconds = 0.0f32;
        // SAFETY: both were made here; a place for the number.
        self.check("cuEventElapsedTime", unsafe { (self.extras.elapsed_time)(&raw mut milliseconds, start, end) })?;
        Ok(milliseconds)
    }

    unsafe fn upload(&self, stream: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream_state(stream)?.stream;
        // SAFETY: the caller vouches for both ranges.
        let code = unsafe { (self.driver.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, stream) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    unsafe fn download(&self, stream: Stream, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream_state(stream)?.stream;
        // SAFETY: the caller vouches for both ranges.
        let code = unsafe { (self.driver.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, stream) };
        self.check("cuMemcpyDtoHAsync", code)
    }

    unsafe fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream_state(stream)?.stream;
        // SAFETY: the caller vouches for both ranges.
        let code = unsafe { (self.driver.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream) };
        self.check("cuMemcpyDtoDAsync", code)
    }

    unsafe fn fill(&self, stream: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream_state(stream)?.stream;
        // SAFETY: the caller vouches for the range.
        self.check("cuMemsetD8Async", unsafe { (self.driver.cuMemsetD8Async)(at, byte, bytes, stream) })
    }

    fn load(&self, program: &Program) -> Result<Kernel, DeviceError> {
        if let Some(kernel) = self.kernels.borrow().get(program) {
            return Ok(*kernel);
        }
        let compiled = self.nvrtc.compile_cached(program, &self.target.arch, &self.cache)?;
        let shared_bytes = compiled.shared_bytes + program.shared_bytes_max;
        if shared_bytes > self.info.shared_bytes_max {
            return Err(DeviceError::Unsupported(format!(
                "kernel {} takes {shared_bytes} bytes of shared memory; {} has {}",
                program.entry, self.info.name, self.info.shared_bytes_max
            )));
        }
        let function = self.load_code(program, &compiled.cubin)?;
        let mut functions = self.functions.borrow_mut();
        functions.push(function);
        let kernel = Kernel { index: functions.len() - 1, threads: program.threads, args_bytes: program.args_bytes };
        self.kernels.borrow_mut().insert(program.clone(), kernel);
        Ok(kernel)
    }

    unsafe fn launch_raw(
        &self,
        stream: Stream,
        kernel: Kernel,
        grid: Grid,
        shared_bytes: u32,
        args: *const u8,
    ) -> Result<(), DeviceError> {
        let stream = self.stream_state(stream)?.stream;
        let function = self.functions.borrow().get(kernel.index).copied().ok_or_else(|| foreign("kernel"))?;
        // The kernel's only parameter is the struct; the driver copies as many bytes as the kernel declares.
        let mut parameters = [untyped(args)];
        // SAFETY: the caller vouches for the struct and for the addresses in it.
        let code = unsafe {
            (self.driver.cuLaunchKernel)(
                function,
                grid.x,
                grid.y,
                1,
                kernel.threads,
                1,
                1,
                shared_bytes,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.check("cuLaunchKernel", code)
    }

    fn gemm_plan(&self, shape: GemmShape) -> Result<GemmPlan, DeviceError> {
        let mut products = self.products.borrow_mut();
        let products = products.as_mut().ok_or_else(|| foreign("product"))?;
        if let Some(plan) = products.by_shape.get(&shape) {
            return Ok(GemmPlan(*plan));
        }
        let (mut plan, candidates) = products.describe(shape)?;
        if self.time_products && candidates.len() > 1 {
            self.choose_by_time(products, &mut plan, &candidates)?;
        }
        Ok(GemmPlan(products.keep(plan)))
    }

    unsafe fn gemm(
        &self,
        stream: Stream,
        plan: GemmPlan,
        y: Address,
        x: Address,
        weight: Address,
    ) -> Result<(), DeviceError> {
        if [y, x, weight].iter().any(|address| !address.is_multiple_of(ALIGNMENT)) {
            return Err(DeviceError::Unsupported(format!("a product's operand is not aligned to {ALIGNMENT} bytes")));
        }
        let operands = Operands { y, x, weight, workspace: self.workspace(stream)? };
        let products = self.products.borrow();
        let plan = products.as_ref().and_then(|products| Some((products, products.plans.get(plan.0)?)));
        let (products, plan) = plan.ok_or_else(|| foreign("product"))?;
        // SAFETY: the caller vouches for the operands; the workspace is the stream's own.
        unsafe { products.run(plan, operands, self.stream_state(stream)?.stream) }
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), DeviceError> {
        let stream = self.stream_state(stream)?.stream;
        // Other threads may allocate meanwhile; this one may not.
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: made here.
        let code = unsafe { (self.driver.cuStreamBeginCapture_v2)(stream, mode) };
        self.check("cuStreamBeginCapture", code)
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph, DeviceError> {
        let stream = self.stream_state(stream)?.stream;
        let (driver, mut graph) = (self.driver, std::ptr::null_mut());
        // SAFETY: made here; a place for the handle.
        self.check("cuStreamEndCapture", unsafe { (driver.cuStreamEndCapture)(stream, &raw mut graph) })?;
        let (mut nodes, mut exec) = (0usize, std::ptr::null_mut());
        // SAFETY: the graph was just made; without an array the driver counts the nodes. The executable graph needs the
        // graph no more.
        let made = unsafe {
            let counted = (driver.cuGraphGetNodes)(graph, std::ptr::null_mut(), &raw mut nodes);
            let made = self.check("cuGraphGetNodes", counted).and_then(|()| {
                let code = (driver.cuGraphInstantiateWithFlags)(&raw mut exec, graph, 0);
                self.check("cuGraphInstantiate", code)
            });
            self.check_later("cuGraphDestroy", (driver.cuGraphDestroy)(graph));
            made
        };
        made?;
        let mut graphs = self.graphs.borrow_mut();
        graphs.push(GraphState { graph: exec, nodes });
        // Now and not at the first replay.
        // SAFETY: just made.
        self.check("cuGraphUpload", unsafe { (driver.cuGraphUpload)(exec, stream) })?;
        Ok(Graph(graphs.len() - 1))
    }

    unsafe fn replay(&self, stream: Stream, graph: Graph) -> Result<(), DeviceError> {
        let (graph, stream) = (self.graph_state(graph)?.graph, self.stream_state(stream)?.stream);
        // SAFETY: both were made here; the caller vouches for what the graph uses.
        self.check("cuGraphLaunch", unsafe { (self.driver.cuGraphLaunch)(graph, stream) })
    }

    fn graph_nodes(&self, graph: Graph) -> usize {
        self.graph_state(graph).map_or(0, |state| state.nodes)
    }
}
