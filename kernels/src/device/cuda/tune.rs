//! Which of cuBLASLt's proposals is fastest here: its heuristic is weakest for a few rows, which is what decoding is.

use super::super::{Device, DeviceError, Event, GemmOut, Priority, Stream};
use super::CudaDevice;
use super::gemm::{Candidate, Operands, Plan, Products, WORKSPACE_BYTES};

/// Rows up to which candidates are timed: beyond, the heuristic is good and a run takes long.
const ROWS_MAX: usize = 256;

/// Runs that are timed, and those before.
const RUNS: usize = 20;
const WARM_RUNS: usize = 3;

/// Weights are read in turn from this many bytes, more than any L2 cache holds: in a model each is read once a step.
const WEIGHT_BYTES: usize = 256 << 20;

/// Where the timed products read and write.
struct Scratch<'a> {
    device: &'a CudaDevice,
    address: u64,
    weight_bytes: usize,
    weights: usize,
    x: u64,
    y: u64,
    workspace: u64,
}

impl<'a> Scratch<'a> {
    fn new(device: &'a CudaDevice, plan: &Plan) -> Result<Self, DeviceError> {
        let shape = plan.shape;
        let out_bytes = if shape.out == GemmOut::F32 { 4 } else { 2 };
        let round = |bytes: usize| bytes.next_multiple_of(256);
        let weight_bytes = round(shape.d_out * shape.d_in * 2);
        let weights = (WEIGHT_BYTES / weight_bytes).max(1);
        let (x_bytes, y_bytes) = (round(shape.rows * shape.d_in * 2), round(shape.rows * shape.d_out * out_bytes));
        let address = device.alloc_bytes(weights * weight_bytes + x_bytes + y_bytes + WORKSPACE_BYTES)?;
        let x = address + (weights * weight_bytes) as u64;
        let y = x + x_bytes as u64;
        Ok(Self { device, address, weight_bytes, weights, x, y, workspace: y + y_bytes as u64 })
    }

    fn operands(&self, run: usize) -> Operands {
        let weight = self.address + (run % self.weights * self.weight_bytes) as u64;
        Operands { y: self.y, x: self.x, weight, workspace: self.workspace }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // SAFETY: taken in `new`; the last run was waited for, and freeing waits for the device anyway.
        unsafe { self.device.free(self.address) };
    }
}

impl CudaDevice {
    /// Sets the plan's choice to the fastest candidate. Without the memory for it, the library's first answer stays.
    pub(super) fn choose_by_time(
        &self,
        products: &Products,
        plan: &mut Plan,
        candidates: &[Candidate],
    ) -> Result<(), DeviceError> {
        if plan.shape.rows > ROWS_MAX {
            return Ok(());
        }
        let scratch = match Scratch::new(self, plan) {
            Err(DeviceError::OutOfMemory { bytes, .. }) => {
                let text = format!("{:?} was not timed: {bytes} bytes are not free", plan.shape);
                self.warnings.borrow_mut().push(text);
                return Ok(());
            }
            scratch => scratch?,
        };
        let mut best = f32::INFINITY;
        for candidate in candidates {
            let tried = plan.with(*candidate);
            // One that does not run is no candidate. A real fault shows at the next call.
            if let Ok(milliseconds) = self.time(products, &tried, &scratch)
                && milliseconds < best
            {
                (best, plan.choice) = (milliseconds, *candidate);
            }
        }
        Ok(())
    }
}

/// A stream and two events, made once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timer {
    stream: Stream,
    start: Event,
    end: Event,
}

impl CudaDevice {
    fn timer(&self) -> Result<Timer, DeviceError> {
        if let Some(timer) = self.timer.get() {
            return Ok(timer);
        }
        let timer = Timer { stream: self.stream(Priority::Low)?, start: self.timed_event()?, end: self.timed_event()? };
        self.timer.set(Some(timer));
        Ok(timer)
    }

    /// Milliseconds of [`RUNS`] runs.
    fn time(&self, products: &Products, plan: &Plan, scratch: &Scratch<'_>) -> Result<f32, DeviceError> {
        let timer = self.timer()?;
        let stream = self.stream_state(timer.stream)?.stream;
        for run in 0..WARM_RUNS + RUNS {
            if run == WARM_RUNS {
                self.record(timer.start, timer.stream)?;
            }
            // SAFETY: `scratch` has room for the shape and outlives the wait below.
            unsafe { products.run(plan, scratch.operands(run), stream)? };
        }
        self.record(timer.end, timer.stream)?;
        self.synchronize(timer.end)?;
        self.elapsed_ms(timer.start, timer.end)
    }
}
