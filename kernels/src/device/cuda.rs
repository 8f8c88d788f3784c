//! A CUDA GPU: the driver, cuBLASLt and the run-time compiler, none of which is linked.
//!
//! The primary context of one GPU is bound to the thread that opens it, and the type does not leave that thread. Nothing
//! here tracks who uses which memory: the order between streams is the caller's, by events.

mod api;
mod device;
mod gemm;
mod tune;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;

use cudarc::driver::sys as cu;

use self::api::{CublasLt, Driver, ElapsedTime};
use self::gemm::Products;
use super::cache::CodeCache;
use super::libraries::{open_cublas_lt, open_driver};
use super::nvrtc::{Nvrtc, Target};
use super::{DeviceError, DeviceInfo, FoundLibrary, Kernel, LibraryPaths, Priority, Program};

/// Static shared memory that every kernel may have without asking, bytes.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;

/// How to open a GPU.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Where the libraries are looked for.
    pub libraries: LibraryPaths,
    /// Which GPU, counted by the driver from 0.
    pub ordinal: u32,
    /// Where compiled kernels are kept; none compiles them at each start.
    pub cache_dir: Option<PathBuf>,
    /// Time the candidates for small products at start, instead of trusting the library's first answer.
    pub time_products: bool,
}

/// A GPU.
#[derive(Debug)]
pub struct CudaDevice {
    info: DeviceInfo,
    driver: Driver,
    elapsed_time: ElapsedTime,
    gpu: cu::CUdevice,
    nvrtc: Nvrtc,
    target: Target,
    cache: CodeCache,
    time_products: bool,
    products: RefCell<Option<Products>>,
    streams: RefCell<Vec<StreamState>>,
    events: RefCell<Vec<cu::CUevent>>,
    modules: RefCell<Vec<cu::CUmodule>>,
    functions: RefCell<Vec<cu::CUfunction>>,
    kernels: RefCell<HashMap<Program, Kernel>>,
    graphs: RefCell<Vec<GraphState>>,
    timer: Cell<Option<tune::Timer>>,
    warnings: RefCell<Vec<String>>,
    /// What giving memory back met: the next call that has a result returns it.
    late: RefCell<Option<DeviceError>>,
}

#[derive(Clone, Copy, Debug)]
struct StreamState {
    stream: cu::CUstream,
    /// Scratch memory of its products; 0 until it computes one.
    workspace: u64,
}

#[derive(Clone, Copy, Debug)]
struct GraphState {
    graph: cu::CUgraphExec,
    nodes: usize,
}

impl CudaDevice {
    /// Opens a GPU and binds it to this thread.
    ///
    /// # Errors
    /// [`DeviceError::Library`] if a library is missing, [`DeviceError::NoDevice`] if the driver has no such GPU,
    /// [`DeviceError::Unsupported`] if a library or the GPU is too old.
    pub fn open(options: &CudaOptions) -> Result<Self, DeviceError> {
        let library = open_driver(&options.libraries)?;
        let (driver, elapsed_time) = Driver::bind(&library)?;
        // SAFETY: the driver's first call.
        let code = unsafe { (driver.cuInit)(0) };
        driver.check("cuInit", code).map_err(|error| DeviceError::NoDevice(error.to_string()))?;
        let gpu = Gpu::find(driver, options.ordinal)?;
        let nvrtc = Nvrtc::find(&options.libraries)?;
        gpu.check_compiler(&nvrtc)?;
        let target = nvrtc.target(gpu.capability.0, gpu.capability.1)?;
        let (cublas_lt, cublas_found) = {
            let library = open_cublas_lt(&options.libraries)?;
            let (api, version) = CublasLt::bind(&library)?;
            (api, FoundLibrary { version, ..library.found })
        };
        let driver_found = FoundLibrary { version: gpu.driver_version_text(), ..library.found };
        let libraries = [&driver_found, nvrtc.library(), &cublas_found].map(describe);
        let info = gpu.info(&target, libraries.into())?;
        gpu.bind()?;
        // From here on `drop` gives the context back.
        let device = Self {
            info,
            driver,
            elapsed_time,
            gpu: gpu.handle,
            nvrtc,
            warnings: RefCell::new(target.note.iter().cloned().collect()),
            target,
            cache: CodeCache::new(options.cache_dir.clone()),
            time_products: options.time_products,
            products: RefCell::new(None),
            streams: RefCell::default(),
            events: RefCell::default(),
            modules: RefCell::default(),
            functions: RefCell::default(),
            kernels: RefCell::default(),
            graphs: RefCell::default(),
            timer: Cell::new(None),
            late: RefCell::new(None),
        };
        device.products.replace(Some(Products::new(cublas_lt)?));
        Ok(device)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        self.driver.check(call, code)?;
        self.late.take().map_or(Ok(()), Err)
    }

    /// For calls that have no result of their own.
    fn check_later(&self, call: &'static str, code: c_int) {
        if let Err(error) = self.driver.check(call, code) {
            drop(self.late.replace(Some(error)));
        }
    }

    fn alloc_bytes(&self, bytes: usize) -> Result<u64, DeviceError> {
        let mut address = 0;
        // SAFETY: a place for the address.
        let code = unsafe { (self.driver.cuMemAlloc_v2)(&raw mut address, bytes.max(1)) };
        if code == api::OUT_OF_MEMORY {
            return Err(DeviceError::OutOfMemory { place: "device", bytes });
        }
        self.check("cuMemAlloc", code)?;
        Ok(address)
    }

    fn new_stream(&self, priority: Priority) -> Result<StreamState, DeviceError> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: places for two numbers.
        let code = unsafe { (self.driver.cuCtxGetStreamPriorityRange)(&raw mut least, &raw mut greatest) };
        self.check("cuCtxGetStreamPriorityRange", code)?;
        let value = if priority == Priority::High { greatest } else { least };
        let mut stream = std::ptr::null_mut();
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for the handle.
        let code = unsafe { (self.driver.cuStreamCreateWithPriority)(&raw mut stream, flags, value) };
        self.check("cuStreamCreateWithPriority", code)?;
        Ok(StreamState { stream, workspace: 0 })
    }

    fn new_event(&self, flags: u32) -> Result<cu::CUevent, DeviceError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        let code = unsafe { (self.driver.cuEventCreate)(&raw mut event, flags) };
        self.check("cuEventCreate", code)?;
        Ok(event)
    }

    /// Loads machine code and finds its entry point.
    fn load_code(&self, program: &Program, code: &[u8]) -> Result<cu::CUfunction, DeviceError> {
        let entry = CString::new(program.entry)
            .map_err(|_| DeviceError::Unsupported(format!("{:?} is no name of a kernel", program.entry)))?;
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a cubin knows its own length and PTX ends with NUL; the driver copies what it needs.
        let code = unsafe { (self.driver.cuModuleLoadData)(&raw mut module, code.as_ptr().cast()) };
        self.check("cuModuleLoadData", code)?;
        self.modules.borrow_mut().push(module);
        // SAFETY: the module was just loaded; the name ends with NUL.
        let code = unsafe { (self.driver.cuModuleGetFunction)(&raw mut function, module, entry.as_ptr()) };
        self.check("cuModuleGetFunction", code)?;
        if program.shared_bytes_max > 0 {
            use cu::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC_SHARED;
            let bytes = program.shared_bytes_max as c_int;
            // SAFETY: the function was just found.
            let code = unsafe { (self.driver.cuFuncSetAttribute)(function, DYNAMIC_SHARED, bytes) };
            self.check("cuFuncSetAttribute", code)?;
        }
        Ok(function)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let driver = self.driver;
        // Failures have nobody to go to: after a fault every call fails, and the process is about to go.
        // SAFETY: all handles were made here and are given back once, after the streams have come to an end.
        unsafe {
            for state in self.streams.get_mut().iter() {
                (driver.cuStreamSynchronize)(state.stream);
            }
            self.products.get_mut().take();
            for state in self.graphs.get_mut().drain(..) {
                (driver.cuGraphExecDestroy)(state.graph);
            }
            for event in self.events.get_mut().drain(..) {
                (driver.cuEventDestroy_v2)(event);
            }
            for state in self.streams.get_mut().drain(..) {
                (driver.cuMemFree_v2)(state.workspace);
                (driver.cuStreamDestroy_v2)(state.stream);
            }
            for module in self.modules.get_mut().drain(..) {
                (driver.cuModuleUnload)(module);
            }
            (driver.cuDevicePrimaryCtxRelease_v2)(self.gpu);
        }
    }
}

/// A GPU that has no context yet.
#[derive(Clone, Copy, Debug)]
struct Gpu {
    driver: Driver,
    handle: cu::CUdevice,
    capability: (u32, u32),
    driver_version: c_int,
}

impl Gpu {
    fn find(driver: Driver, ordinal: u32) -> Result<Self, DeviceError> {
        use cu::CUdevice_attribute_enum as Attribute;
        let (mut count, mut handle, mut driver_version) = (0, 0, 0);
        // SAFETY: places for numbers.
        unsafe {
            driver.check("cuDriverGetVersion", (driver.cuDriverGetVersion)(&raw mut driver_version))?;
            driver.check("cuDeviceGetCount", (driver.cuDeviceGetCount)(&raw mut count))?;
        }
        let wanted = c_int::try_from(ordinal).ok().filter(|&ordinal| ordinal < count);
        let wanted = wanted
            .ok_or_else(|| DeviceError::NoDevice(format!("GPU {ordinal} was asked for; the driver has {count}")))?;
        // SAFETY: a place for the handle, and an ordinal that the driver has.
        driver.check("cuDeviceGet", unsafe { (driver.cuDeviceGet)(&raw mut handle, wanted) })?;
        let mut gpu = Self { driver, handle, capability: (0, 0), driver_version };
        let major = gpu.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        gpu.capability = (major, gpu.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
        Ok(gpu)
    }

    fn attribute(&self, attribute: cu::CUdevice_attribute) -> Result<u32, DeviceError> {
        let mut value = 0;
        // SAFETY: a place for the number, and a handle of the driver.
        let code = unsafe { (self.driver.cuDeviceGetAttribute)(&raw mut value, attribute, self.handle) };
        self.driver.check("cuDeviceGetAttribute", code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    fn driver_version_text(&self) -> String {
        format!("CUDA {}.{}", self.driver_version / 1000, self.driver_version % 1000 / 10)
    }

    /// A driver loads machine code of its own major version's compilers and of older ones.
    fn check_compiler(&self, nvrtc: &Nvrtc) -> Result<(), DeviceError> {
        let library = nvrtc.library();
        let major = library.version.split('.').next().and_then(|major| major.parse::<c_int>().ok()).unwrap_or(0);
        if major > self.driver_version / 1000 {
            return Err(DeviceError::Unsupported(format!(
                "{} ({}) makes code that this driver ({}) does not load: update the driver, or use the compiler of its version",
                library.path.display(),
                library.version,
                self.driver_version_text()
            )));
        }
        Ok(())
    }

    fn info(&self, target: &Target, libraries: Vec<(String, String)>) -> Result<DeviceInfo, DeviceError> {
        use cu::CUdevice_attribute_enum as Attribute;
        let mut name = [0 as c_char; 256];
        let mut memory_bytes = 0usize;
        // SAFETY: a buffer with its length, one byte of which stays NUL, and a place for a number.
        let name = unsafe {
            let code = (self.driver.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int - 1, self.handle);
            self.driver.check("cuDeviceGetName", code)?;
            let code = (self.driver.cuDeviceTotalMem_v2)(&raw mut memory_bytes, self.handle);
            self.driver.check("cuDeviceTotalMem", code)?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        Ok(DeviceInfo {
            name,
            arch: target.arch.clone(),
            multiprocessors: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            memory_bytes: memory_bytes as u64,
            shared_bytes_max: self
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                .max(SHARED_BYTES_DEFAULT),
            libraries,
        })
    }

    /// Makes the GPU's primary context this thread's.
    fn bind(&self) -> Result<(), DeviceError> {
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the handle; the context is given back when the device is dropped, or here.
        unsafe {
            let code = (self.driver.cuDevicePrimaryCtxRetain)(&raw mut context, self.handle);
            self.driver.check("cuDevicePrimaryCtxRetain", code)?;
            let bound = self.driver.check("cuCtxSetCurrent", (self.driver.cuCtxSetCurrent)(context));
            if bound.is_err() {
                (self.driver.cuDevicePrimaryCtxRelease_v2)(self.handle);
            }
            bound
        }
    }
}

/// For reports: name, and version with path.
fn describe(library: &FoundLibrary) -> (String, String) {
    (library.name.to_owned(), format!("{} ({})", library.version, library.path.display()))
}

/// A pointer for the driver's untyped arguments.
const fn untyped(pointer: *const u8) -> *mut c_void {
    pointer.cast_mut().cast()
}
