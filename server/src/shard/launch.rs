//! Which device a shard runs on.

use std::rc::Rc;

use loramux_kernels::device::{
    Asynchrony, CudaDevice, CudaOptions, DeviceError, Elem, EmulatedDevice, EmulatedOptions, Schedule, SharedDevice,
};

use super::Execute;
use super::device::DeviceExecutor;
use super::options::{DeviceChoice, DtypeChoice, ShardOptions};
use super::run::{Executor, StartError};

/// Loads the model where the options say. `auto` takes the first GPU, and the CPU where there is none.
pub(super) fn load(
    options: &ShardOptions,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Box<dyn Execute>, StartError> {
    let mut notes = Vec::new();
    let opened = match options.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => match open_cuda(options, 0) {
            Ok(device) => Some(device),
            Err(error) => {
                notes.push(format!("no GPU, so the CPU computes: {error}"));
                None
            }
        },
        DeviceChoice::Cuda(index) => Some(open_cuda(options, index).map_err(|error| refused(options, error))?),
        DeviceChoice::Emulated => Some(open_emulated(options).map_err(|error| refused(options, error))?),
    };
    let Some(device) = opened else { return Ok(Box::new(Executor::load(options, notes, progress)?)) };
    Ok(Box::new(DeviceExecutor::load(&device, elem(options.dtype)?, options, progress)?))
}

fn refused(options: &ShardOptions, error: DeviceError) -> StartError {
    StartError::Device { choice: options.device.to_string(), error }
}

fn elem(choice: DtypeChoice) -> Result<Elem, StartError> {
    match choice {
        DtypeChoice::Auto | DtypeChoice::Bf16 => Ok(Elem::Bf16),
        DtypeChoice::F16 => Ok(Elem::F16),
        DtypeChoice::F32 => {
            let reason = "a GPU computes in bfloat16 or float16; use one of these, or --device cpu";
            Err(StartError::Dtype { dtype: "float32", reason })
        }
    }
}

fn open_cuda(options: &ShardOptions, index: u32) -> Result<SharedDevice, DeviceError> {
    let cuda = CudaOptions {
        libraries: options.cuda_paths.libraries(),
        ordinal: index,
        cache_dir: Some(options.kernel_cache_dir.clone()),
        time_products: true,
    };
    Ok(Rc::new(CudaDevice::open(&cuda)?))
}

fn open_emulated(options: &ShardOptions) -> Result<SharedDevice, DeviceError> {
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
