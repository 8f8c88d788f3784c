//! The functions of the driver and of cuBLASLt, bound by hand to the libraries that were found.
//!
//! cudarc's own loader panics where a library or a function is missing, takes a library by name and not by path, and reads
//! return codes as a Rust enum, which a newer driver's code would break. So only its types are used: every signature below
//! is checked against it at compile time.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;

use super::super::DeviceError;
use super::super::libraries::OpenLibrary;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_NOT_READY`.
pub(super) const NOT_READY: c_int = 600;

macro_rules! functions {
    ($(#[$doc:meta])* $table:ident, $sys:ident, $status:ty, $(fn $name:ident($($arg:ty),*);)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[expect(non_snake_case, reason = "the names of the C functions")]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            error_text: ErrorText,
        }

        // The same types as in cudarc, whose bindings are generated from the headers.
        $(const _: unsafe fn($($arg),*) -> $status = $sys::$name;)*

        impl $table {
            fn with(library: &OpenLibrary, error_text: ErrorText) -> Result<Self, DeviceError> {
                // SAFETY: each type was checked above; a status has the size and the representation of an int.
                Ok(unsafe { Self { $($name: library.symbol(stringify!($name))?,)* error_text } })
            }

            /// Turns a code into an error with the library's own words.
            pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
                if code == 0 {
                    return Ok(());
                }
                Err(DeviceError::Call { call, code, message: self.error_text.of(code) })
            }
        }
    };
}

/// How a library puts its codes into words.
#[derive(Clone, Copy, Debug)]
enum ErrorText {
    Driver(unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int),
    CublasLt(unsafe extern "C" fn(c_int) -> *const c_char),
}

impl ErrorText {
    fn of(self, code: c_int) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: both take any code; the text is the library's own and lives as long as it.
        unsafe {
            match self {
                Self::Driver(get) => {
                    get(code, &raw mut text); // of an unknown code it leaves the null
                }
                Self::CublasLt(get) => text = get(code),
            }
            if text.is_null() {
                "unknown error".to_owned()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        }
    }
}

functions! {
    /// The driver.
    Driver, cu, cu::CUresult,
    fn cuInit(c_uint);
    fn cuDriverGetVersion(*mut c_int);
    fn cuDeviceGetCount(*mut c_int);
    fn cuDeviceGet(*mut cu::CUdevice, c_int);
    fn cuDeviceGetName(*mut c_char, c_int, cu::CUdevice);
    fn cuDeviceGetAttribute(*mut c_int, cu::CUdevice_attribute, cu::CUdevice);
    fn cuDeviceTotalMem_v2(*mut usize, cu::CUdevice);
    fn cuDevicePrimaryCtxRetain(*mut cu::CUcontext, cu::CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(cu::CUdevice);
    fn cuCtxSetCurrent(cu::CUcontext);
    fn cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
    fn cuMemGetInfo_v2(*mut usize, *mut usize);
    fn cuMemAlloc_v2(*mut cu::CUdeviceptr, usize);
    fn cuMemFree_v2(cu::CUdeviceptr);
    fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    fn cuMemFreeHost(*mut c_void);
    fn cuStreamCreateWithPriority(*mut cu::CUstream, c_uint, c_int);
    fn cuStreamDestroy_v2(cu::CUstream);
    fn cuStreamSynchronize(cu::CUstream);
    fn cuStreamWaitEvent(cu::CUstream, cu::CUevent, c_uint);
    fn cuStreamBeginCapture_v2(cu::CUstream, cu::CUstreamCaptureMode);
    fn cuStreamEndCapture(cu::CUstream, *mut cu::CUgraph);
    fn cuEventCreate(*mut cu::CUevent, c_uint);
    fn cuEventDestroy_v2(cu::CUevent);
    fn cuEventRecord(cu::CUevent, cu::CUstream);
    fn cuEventQuery(cu::CUevent);
    fn cuEventSynchronize(cu::CUevent);
    fn cuMemcpyHtoDAsync_v2(cu::CUdeviceptr, *const c_void, usize, cu::CUstream);
    fn cuMemcpyDtoHAsync_v2(*mut c_void, cu::CUdeviceptr, usize, cu::CUstream);
    fn cuMemcpyDtoDAsync_v2(cu::CUdeviceptr, cu::CUdeviceptr, usize, cu::CUstream);
    fn cuMemsetD8Async(cu::CUdeviceptr, u8, usize, cu::CUstream);
    fn cuModuleLoadData(*mut cu::CUmodule, *const c_void);
    fn cuModuleGetFunction(*mut cu::CUfunction, cu::CUmodule, *const c_char);
    fn cuModuleUnload(cu::CUmodule);
    fn cuFuncSetAttribute(cu::CUfunction, cu::CUfunction_attribute, c_int);
    fn cuLaunchKernel(cu::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, cu::CUstream,
        *mut *mut c_void, *mut *mut c_void);
    fn cuGraphInstantiateWithFlags(*mut cu::CUgraphExec, cu::CUgraph, c_ulonglong);
    fn cuGraphGetNodes(cu::CUgraph, *mut cu::CUgraphNode, *mut usize);
    fn cuGraphDestroy(cu::CUgraph);
    fn cuGraphExecDestroy(cu::CUgraphExec);
    fn cuGraphUpload(cu::CUgraphExec, cu::CUstream);
    fn cuGraphLaunch(cu::CUgraphExec, cu::CUstream);
}

/// `cuEventElapsedTime`: not in the table because cudarc has only its second version, which drivers before 12.8 lack. Both
/// take the same.
pub(super) type ElapsedTime = unsafe extern "C" fn(*mut f32, cu::CUevent, cu::CUevent) -> c_int;
const _: unsafe fn(*mut f32, cu::CUevent, cu::CUevent) -> cu::CUresult = cu::cuEventElapsedTime_v2;

impl Driver {
    pub(super) fn bind(library: &OpenLibrary) -> Result<(Self, ElapsedTime), DeviceError> {
        // SAFETY: the types are those of cuda.h.
        unsafe {
            let error_text = ErrorText::Driver(library.symbol("cuGetErrorString")?);
            Ok((Self::with(library, error_text)?, library.symbol("cuEventElapsedTime")?))
        }
    }
}

functions! {
    /// cuBLASLt.
    CublasLt, lt, lt::cublasStatus_t,
    fn cublasLtCreate(*mut lt::cublasLtHandle_t);
    fn cublasLtDestroy(lt::cublasLtHandle_t);
    fn cublasLtMatmulDescCreate(*mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType_t);
    fn cublasLtMatmulDescDestroy(lt::cublasLtMatmulDesc_t);
    fn cublasLtMatmulDescSetAttribute(lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize);
    fn cublasLtMatrixLayoutCreate(*mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64);
    fn cublasLtMatrixLayoutDestroy(lt::cublasLtMatrixLayout_t);
    fn cublasLtMatmulPreferenceCreate(*mut lt::cublasLtMatmulPreference_t);
    fn cublasLtMatmulPreferenceDestroy(lt::cublasLtMatmulPreference_t);
    fn cublasLtMatmulPreferenceSetAttribute(lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t,
        *const c_void, usize);
    fn cublasLtMatmulAlgoGetHeuristic(lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t,
        lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
        lt::cublasLtMatmulPreference_t, c_int, *mut lt::cublasLtMatmulHeuristicResult_t, *mut c_int);
    fn cublasLtMatmulAlgoConfigGetAttribute(*const lt::cublasLtMatmulAlgo_t, lt::cublasLtMatmulAlgoConfigAttributes_t,
        *mut c_void, usize, *mut usize);
    fn cublasLtMatmul(lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void, *const c_void,
        lt::cublasLtMatrixLayout_t, *const c_void, lt::cublasLtMatrixLayout_t, *const c_void, *const c_void,
        lt::cublasLtMatrixLayout_t, *mut c_void, lt::cublasLtMatrixLayout_t, *const lt::cublasLtMatmulAlgo_t,
        *mut c_void, usize, lt::cudaStream_t);
}

impl CublasLt {
    /// Binds the functions and asks for the version, such as `13.1.0`.
    pub(super) fn bind(library: &OpenLibrary) -> Result<(Self, String), DeviceError> {
        // SAFETY: the types are those of cublasLt.h.
        unsafe {
            let error_text = ErrorText::CublasLt(library.symbol("cublasLtGetStatusString")?);
            let version: unsafe extern "C" fn() -> usize = library.symbol("cublasLtGetVersion")?;
            let version = version();
            // Up to 11 the major version counted thousands; all that is accepted here counts ten thousands.
            let text = format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
            Ok((Self::with(library, error_text)?, text))
        }
    }
}

const _: unsafe fn() -> usize = lt::cublasLtGetVersion;
const _: unsafe fn(lt::cublasStatus_t) -> *const c_char = lt::cublasLtGetStatusString;
const _: unsafe fn(cu::CUresult, *mut *const c_char) -> cu::CUresult = cu::cuGetErrorString;
