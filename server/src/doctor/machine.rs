//! The device that is looked at, or why there is none.

use std::path::PathBuf;
use std::rc::Rc;

use loramux_kernels::device::{CudaDevice, DeviceError, LibraryPaths, SharedDevice};

use super::args::DoctorArgs;
use crate::config;
use crate::shard::{DeviceChoice, LoadFormatChoice, ShardOptions, launch};

/// What was asked for and what was found.
pub(crate) struct Machine {
    pub(crate) choice: DeviceChoice,
    /// `None` for the CPU.
    pub(crate) device: Option<SharedDevice>,
    /// The same device, if it is a GPU: it has warnings.
    pub(crate) cuda: Option<Rc<CudaDevice>>,
    /// Why there is no device although one was asked for, or looked for.
    pub(crate) error: Option<DeviceError>,
    pub(crate) libraries: LibraryPaths,
    pub(crate) kernel_cache_dir: PathBuf,
}

impl Machine {
    pub(crate) fn open(args: &DoctorArgs) -> Self {
        let options = shard_options(args);
        let mut machine = Self {
            choice: args.device,
            device: None,
            cuda: None,
            error: None,
            libraries: options.cuda_paths.libraries(),
            kernel_cache_dir: options.kernel_cache_dir.clone(),
        };
        match args.device {
            DeviceChoice::Cpu => {}
            DeviceChoice::Auto => machine.take_cuda(launch::open_cuda(&options, 0)),
            DeviceChoice::Cuda(index) => machine.take_cuda(launch::open_cuda(&options, index)),
            DeviceChoice::Emulated => match launch::open_emulated(&options) {
                Ok(device) => machine.device = Some(device),
                Err(error) => machine.error = Some(error),
            },
        }
        machine
    }

    fn take_cuda(&mut self, opened: Result<Rc<CudaDevice>, DeviceError>) {
        match opened {
            Ok(device) => {
                self.device = Some(Rc::clone(&device) as SharedDevice);
                self.cuda = Some(device);
            }
            Err(error) => self.error = Some(error),
        }
    }

    /// Whether the host emulator stands in for a GPU.
    pub(crate) fn is_emulated(&self) -> bool {
        self.choice == DeviceChoice::Emulated
    }
}

/// What to do about a device that does not open.
pub(crate) fn advice(error: &DeviceError) -> &'static str {
    match error {
        DeviceError::Library { library, .. } if library.starts_with("libcuda") => {
            "there is no NVIDIA driver here: install one (then nvidia-smi lists the GPU); a container needs --gpus all"
        }
        DeviceError::Library { .. } => {
            "install CUDA 13's run-time libraries, with `pip install nvidia-cuda-nvrtc nvidia-cublas` or the toolkit, or name \
             their folder with --cuda-libraries"
        }
        DeviceError::NoDevice(_) => {
            "the driver is there and offers no such GPU: see what nvidia-smi lists, CUDA_VISIBLE_DEVICES, and --gpus of a \
             container"
        }
        DeviceError::Unsupported(_) => "update the driver or the library that the line above names",
        DeviceError::OutOfMemory { .. } => "other programs hold the memory: nvidia-smi lists them",
        DeviceError::Compile { .. } | DeviceError::Arguments { .. } | DeviceError::Emulated(_) => {
            "this is a fault of loramux: please report it with this page"
        }
        DeviceError::Call { .. } => {
            "the driver refused a call: nvidia-smi shows whether the GPU is healthy; dmesg has the driver's own words (Xid)"
        }
    }
}

/// Settings of a shard on the device that is looked at. The model is filled in by whoever loads one.
pub(crate) fn shard_options(args: &DoctorArgs) -> ShardOptions {
    ShardOptions {
        model: PathBuf::new(),
        model_id: "doctor".into(),
        dtype: args.dtype,
        load_format: LoadFormatChoice::Auto,
        seed: args.seed,
        context_tokens_max: None,
        arena_bytes: None,
        step_tokens_max: Some(256),
        seqs_max: 16,
        slots_max: None,
        threads: None,
        cpu_isa: None,
        device: args.device,
        host_adapter_bytes: 64 << 20,
        kernel_cache_dir: config::kernel_cache_dir(args.cuda.kernel_cache.as_deref()),
        cuda_paths: config::cuda_paths(&args.cuda.cuda_libraries),
        fuse_rope: false,
        fuse_activation: false,
        fuse_norm: false,
    }
}
