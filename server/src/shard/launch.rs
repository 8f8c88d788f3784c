//! Which device a shard runs on.

use std::rc::Rc;

use loramux_kernels::device::{
    Asynchrony, CudaDevice, CudaOptions, DeviceError, Elem, EmulatedDevice, EmulatedOptions, Schedule, SharedDevice,
};

use super::Execute;
use super::device::DeviceExecutor;
use super::options::{DeviceChoice, DtypeChoice, ShardOptions};
use super::run::{Executor, StartError};

/// Page-locked memory of the emulator at most: it is ordinary memory there, and all of it is touched at start.
const EMULATED_HOST_BYTES_MAX: u64 = 256 << 20;

/// Loads the model where the options say. `auto` takes the first GPU, and the CPU where there is none.
pub(super) fn load(
    options: &ShardOptions,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Box<dyn Execute>, StartError> {
    let mut notes = Vec::new();
    let opened: Option<SharedDevice> = match options.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => match open_cuda(options, 0) {
            Ok(device) => Some(device as SharedDevice),
            Err(error) => {
                notes.push(format!("no GPU, so the CPU computes: {error}"));
                None
            }
        },
        DeviceChoice::Cuda(index) => {
            Some(open_cuda(options, index).map_err(|error| refused(options, error))? as SharedDevice)
        }
        DeviceChoice::Emulated => Some(open_emulated(options).map_err(|error| refused(options, error))?),
    };
    load_on(opened.as_ref(), options, notes, progress)
}

/// Loads the model on a device that is open, or on the CPU.
pub(crate) fn load_on(
    device: Option<&SharedDevice>,
    options: &ShardOptions,
    notes: Vec<String>,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Box<dyn Execute>, StartError> {
    let Some(device) = device else { return Ok(Box::new(Executor::load(options, notes, progress)?)) };
    let mut options = options.clone();
    if options.device == DeviceChoice::Emulated {
        options.host_adapter_bytes = options.host_adapter_bytes.min(EMULATED_HOST_BYTES_MAX);
    }
    Ok(Box::new(DeviceExecutor::load(device, elem(options.dtype)?, &options, progress)?))
}

fn refused(options: &ShardOptions, error: DeviceError) -> StartError {
    StartError::Device { choice: options.device.to_string(), error }
}

/// The 16-bit type that a device computes in.
pub(crate) fn elem(choice: DtypeChoice) -> Result<Elem, StartError> {
    match choice {
        DtypeChoice::Auto | DtypeChoice::Bf16 => Ok(Elem::Bf16),
        DtypeChoice::F16 => Ok(Elem::F16),
        DtypeChoice::F32 => {
            let reason = "a GPU computes in bfloat16 or float16; use one of these, or --device cpu";
            Err(StartError::Dtype { dtype: "float32", reason })
        }
    }
}

/// Opens a GPU.
pub(crate) fn open_cuda(options: &ShardOptions, index: u32) -> Result<Rc<CudaDevice>, DeviceError> {
    let cuda = CudaOptions {
        libraries: options.cuda_paths.libraries(),
        ordinal: index,
        cache_dir: Some(options.kernel_cache_dir.clone()),
        time_products: true,
    };
    Ok(Rc::new(CudaDevice::open(&cuda)?))
}

/// Starts the emulator.
pub(crate) fn open_emulated(options: &ShardOptions) -> Result<SharedDevice, DeviceError> {
    let emulated = EmulatedOptions {
        cache_dir: options.kernel_cache_dir.clone(),
        schedule: Schedule::RoundRobin,
        asynchrony: Asynchrony::Lazy(options.seed),
        races: false,
        sanitize: false,
        seed: options.seed,
    };
    Ok(Rc::new(EmulatedDevice::new(emulated)?))
}
