//! The CUDA device's calls against a stand-in for the driver and cuBLASLt, on machines without a GPU. Needs g++ and the
//! run-time compiler; without the compiler the tests say so and pass, unless `LORAMUX_REQUIRE_NVRTC` is set.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard};

use loramux_kernels::device::{
    CudaDevice, CudaOptions, DeviceBuffer, DeviceError, Elem, GemmOut, GemmShape, Grid, HostBuffer, HostUse,
    KernelSource, LibraryPaths, Nvrtc, Priority, Program, SharedDevice, launch, probe,
};

static RECORD: KernelSource = KernelSource {
    file: "record.cu",
    text: "struct Args { unsigned* to; unsigned value; };\n\
           extern \"C\" __global__ void record(const Args args) { args.to[0] = args.value; }\n",
};

#[repr(C)]
#[derive(Clone, Copy)]
struct RecordArgs {
    to: u64,
    value: u32,
}

fn record() -> Program {
    Program::new::<RecordArgs>(&RECORD, "record", 96, Elem::Bf16).shared(64 << 10)
}

/// The stand-in has one state, so the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

struct Fake {
    dir: PathBuf,
    library: libloading::Library,
    _turn: MutexGuard<'static, ()>,
}

impl Fake {
    fn new() -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dirs = std::env::var_os("LORAMUX_CUDA_LIB_DIR").map(PathBuf::from).into_iter().collect();
        let virtual_env = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
        let cuda_home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
        let paths = LibraryPaths { dirs, cuda_home, virtual_env, ask_python: true };
        let nvrtc = match Nvrtc::find(&paths) {
            Ok(nvrtc) => nvrtc.library().path.clone(),
            Err(error) if std::env::var_os("LORAMUX_REQUIRE_NVRTC").is_some() => panic!("{error}"),
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        let dir = std::env::temp_dir().join(format!("loramux-fake-cuda-{}", std::process::id()));
        build(&dir);
        let link = dir.join(nvrtc.file_name().unwrap());
        if !link.exists() {
            std::os::unix::fs::symlink(&nvrtc, link).unwrap();
        }
        // SAFETY: our own library, which does nothing when it is loaded.
        let library = unsafe { libloading::Library::new(dir.join("libcuda.so.1")) }.unwrap();
        let fake = Self { dir, library, _turn: turn };
        fake.set("", 13_000);
        Some(fake)
    }

    /// The function that fails, and the driver's version.
    fn set(&self, fail: &str, version: c_int) {
        let fail = CString::new(fail).unwrap();
        // SAFETY: the signature in fake_cuda.cpp; the name is copied.
        unsafe {
            let set: libloading::Symbol<'_, unsafe extern "C" fn(*const c_char, c_int)> =
                self.library.get("loramux_fake_set").unwrap();
            set(fail.as_ptr(), version);
        }
    }

    /// Memory and contexts that nobody gave back.
    fn left(&self) -> u64 {
        self.number("loramux_fake_left")
    }

    fn number(&self, name: &str) -> u64 {
        // SAFETY: the signature in fake_cuda.cpp.
        unsafe { self.library.get::<unsafe extern "C" fn() -> u64>(name).unwrap()() }
    }

    fn options(&self) -> CudaOptions {
        let libraries = LibraryPaths { dirs: vec![self.dir.clone()], ..LibraryPaths::default() };
        CudaOptions { libraries, ordinal: 0, cache_dir: None, time_products: true }
    }

    fn open(&self) -> SharedDevice {
        Rc::new(CudaDevice::open(&self.options()).unwrap())
    }
}

/// Compiles the stand-in under both names: one file, so one state.
fn build(dir: &Path) {
    if dir.join("libcuda.so.1").exists() {
        return;
    }
    std::fs::create_dir_all(dir).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_cuda/fake_cuda.cpp");
    let mut command = Command::new("g++");
    command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", source, "-o"]);
    let output = command.arg(dir.join("libcublasLt.so.13")).output().expect("g++ is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::os::unix::fs::symlink(dir.join("libcublasLt.so.13"), dir.join("libcuda.so.1")).unwrap();
}

#[test]
fn a_device_says_what_it_is_and_leaves_nothing() {
    let Some(fake) = Fake::new() else { return };
    {
        let device = fake.open();
        let info = device.info();
        assert_eq!((info.name.as_str(), info.arch.as_str()), ("Fake GPU 40", "sm_90a"));
        assert_eq!((info.multiprocessors, info.shared_bytes_max), (132, 227 << 10));
        assert_eq!(info.memory_bytes, 1 << 30);
        let names: Vec<&str> = info.libraries.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["libcuda.so", "libnvrtc.so", "libcublasLt.so"]);
        assert!(info.libraries[0].1.starts_with("CUDA 13.0 (/"), "{:?}", info.libraries);
        assert!(info.libraries[2].1.starts_with("13.1.0 (/"), "{:?}", info.libraries);
        let free = device.free_bytes().unwrap();
        let stream = device.stream(Priority::High).unwrap();
        assert_eq!(device.free_bytes().unwrap(), free - (32 << 20), "the stream's workspace");
        let buffer = DeviceBuffer::of(&device, stream, &[1u32; 100]).unwrap();
        assert_eq!(buffer.read::<u32>(stream, 4, 99).unwrap(), [1; 99]);
        assert!(matches!(device.alloc(1 << 40), Err(DeviceError::OutOfMemory { place: "device", .. })));
    }
    assert_eq!(fake.left(), 0, "memory or a context was not given back");
}

#[test]
fn a_launch_passes_its_struct_and_shape_also_through_a_graph() {
    let Some(fake) = Fake::new() else { return };
    let device = fake.open();
    let (stream, out) = (device.stream(Priority::High).unwrap(), DeviceBuffer::new(&device, 64).unwrap());
    let kernel = device.load(&record()).unwrap();
    assert_eq!(device.load(&record()).unwrap(), kernel, "loaded once");
    let args = RecordArgs { to: out.address(), value: 77 };
    // SAFETY: the struct is the kernel's; the stand-in writes 20 bytes.
    let given = |grid, shared| unsafe { launch(&*device, stream, kernel, grid, shared, &args) };
    given(Grid { x: 5, y: 3 }, 60 << 10).unwrap();
    assert_eq!(out.read::<u32>(stream, 0, 5).unwrap(), [5, 3, 96, 60 << 10, 77]);
    assert!(given(Grid::x(1), 65 << 10).is_err(), "more shared memory than was announced");
    // SAFETY: refused before it is used.
    let wrong = unsafe { launch(&*device, stream, kernel, Grid::x(1), 0, &1u32) };
    assert_eq!(wrong, Err(DeviceError::Arguments { got: 4, want: 16 }));

    device.begin_capture(stream).unwrap();
    given(Grid::x(9), 0).unwrap();
    // SAFETY: inside the buffer.
    unsafe { device.fill(stream, out.address() + 20, 0, 4).unwrap() };
    let graph = device.end_capture(stream).unwrap();
    assert_eq!(device.graph_nodes(graph), 2);
    out.fill(stream, 0xff).unwrap();
    // SAFETY: the buffer is still there.
    unsafe { device.replay(stream, graph).unwrap() };
    assert_eq!(out.read::<u32>(stream, 0, 6).unwrap(), [9, 1, 96, 0, 77, 0]);
}

#[test]
fn events_and_page_locked_memory() {
    let Some(fake) = Fake::new() else { return };
    let device = fake.open();
    let (stream, side) = (device.stream(Priority::High).unwrap(), device.stream(Priority::Low).unwrap());
    let buffer = DeviceBuffer::new(&device, 16).unwrap();
    let mut host = HostBuffer::<u32>::new(&device, 4, HostUse::Upload).unwrap();
    assert_eq!(host.as_slice(), [0; 4]);
    host.as_mut_slice().copy_from_slice(&[1, 2, 3, 4]);
    let (event, back) = (device.event().unwrap(), HostBuffer::<u32>::new(&device, 4, HostUse::Readback).unwrap());
    // SAFETY: both buffers have 16 bytes and outlive the wait.
    unsafe {
        device.upload(side, buffer.address(), host.as_ptr(), 16).unwrap();
        device.record(event, side).unwrap();
        device.wait(stream, event).unwrap();
        device.download(stream, back.as_ptr(), buffer.address(), 16).unwrap();
        device.upload(stream, 1, host.as_ptr(), 0).unwrap(); // nothing to copy, nothing to check
    }
    device.record(event, stream).unwrap();
    assert!(!device.is_done(event).unwrap(), "not ready is no error");
    assert!(device.is_done(event).unwrap());
    device.synchronize(event).unwrap();
    assert_eq!(back.as_slice(), [1, 2, 3, 4]);
    assert!(device.elapsed_ms(event, event).is_err(), "it keeps no time");
    let (start, end) = (device.timed_event().unwrap(), device.timed_event().unwrap());
    device.record(start, stream).unwrap();
    device.record(end, stream).unwrap();
    assert_eq!(device.elapsed_ms(start, end).unwrap(), 2.0);
    assert!(probe::copy_gb_per_s(&device, 1 << 20, 3).unwrap() > 0.0);
}

#[test]
fn a_product_is_described_in_columns_and_the_fastest_candidate_is_kept() {
    let Some(fake) = Fake::new() else { return };
    let device = fake.open();
    let stream = device.stream(Priority::High).unwrap();
    let shape = GemmShape { rows: 2, d_out: 3, d_in: 8, elem: Elem::F16, out: GemmOut::F32 };
    let free = device.free_bytes().unwrap();
    let plan = device.gemm_plan(shape).unwrap();
    assert_eq!(device.gemm_plan(shape).unwrap(), plan, "chosen once");
    assert_eq!(device.free_bytes().unwrap(), free, "what the timing took is given back");
    let values = |count: usize| (0..count).map(|i| i as f32 * 0.25 - 1.0).collect::<Vec<f32>>();
    let elems = |values: &[f32]| values.iter().map(|&value| Elem::F16.to_bits(value)).collect::<Vec<u16>>();
    let (x, weight) = (values(16), values(24));
    let x_buffer = DeviceBuffer::of(&device, stream, &elems(&x)).unwrap();
    let weight_buffer = DeviceBuffer::of(&device, stream, &elems(&weight)).unwrap();
    let y = DeviceBuffer::new(&device, 6 * 4).unwrap();
    // SAFETY: the buffers are what the shape says.
    unsafe { device.gemm(stream, plan, y.address(), x_buffer.address(), weight_buffer.address()).unwrap() };
    let want: Vec<f32> = (0..2)
        .flat_map(|row| (0..3).map(move |out| (row, out)))
        .map(|(row, out)| (0..8).map(|k| x[row * 8 + k] * weight[out * 8 + k]).sum())
        .collect();
    assert_eq!(y.read::<f32>(stream, 0, 6).unwrap(), want);
    assert_eq!(fake.number("loramux_fake_algorithm"), 4, "3 is the first that may be used, 4 the fastest");
    // SAFETY: refused before it runs.
    let odd = unsafe { device.gemm(stream, plan, y.address() + 4, x_buffer.address(), weight_buffer.address()) };
    assert!(odd.unwrap_err().to_string().contains("aligned"));
    let refused = device.gemm_plan(GemmShape { d_out: 13, ..shape }).unwrap_err();
    assert!(matches!(&refused, DeviceError::Unsupported(text) if text.contains("no algorithm")), "{refused}");
}

#[test]
fn failures_come_with_the_function_and_the_drivers_words() {
    let Some(fake) = Fake::new() else { return };
    {
        let device = fake.open();
        let stream = device.stream(Priority::High).unwrap();
        let buffer = DeviceBuffer::new(&device, 16).unwrap();
        fake.set("cuEventSynchronize", 13_000);
        let error = buffer.read::<u32>(stream, 0, 1).unwrap_err().to_string();
        assert_eq!(error, "cuEventSynchronize failed: an illegal memory access was encountered (code 700)");
        fake.set("cuMemFree_v2", 13_000);
        drop(DeviceBuffer::new(&device, 16).unwrap());
        fake.set("", 13_000);
        assert!(device.free_bytes().unwrap_err().to_string().contains("cuMemFree"), "told by the next call");
        assert!(device.free_bytes().is_ok(), "and once");
    }
    fake.set("cuInit", 13_000);
    let error = CudaDevice::open(&fake.options()).unwrap_err();
    assert!(matches!(&error, DeviceError::NoDevice(text) if text.contains("cuInit")), "{error}");
    fake.set("", 12_040);
    let error = CudaDevice::open(&fake.options()).unwrap_err().to_string();
    assert!(error.contains("CUDA 12.4") && error.contains("libnvrtc"), "{error}");
    fake.set("", 13_000);
    let error = CudaDevice::open(&CudaOptions { ordinal: 3, ..fake.options() }).unwrap_err().to_string();
    assert!(error.contains("GPU 3") && error.contains("has 1"), "{error}");
    fake.set("cuCtxSetCurrent", 13_000);
    let kept = fake.left();
    assert!(CudaDevice::open(&fake.options()).is_err());
    fake.set("", 13_000);
    assert_eq!(fake.left(), kept, "a failed start gives the context back");
}

#[test]
fn without_a_driver_the_error_names_what_is_missing_and_where_it_was_looked_for() {
    let libraries = LibraryPaths { dirs: vec![PathBuf::from("/nonexistent")], ..LibraryPaths::default() };
    let options = CudaOptions { libraries, ordinal: 0, cache_dir: None, time_products: false };
    match CudaDevice::open(&options) {
        Err(DeviceError::Library { library, looked }) => {
            println!("{library}: {looked:?}");
            assert!(looked[0].contains("/nonexistent") && looked.len() > 1, "{looked:?}");
        }
        // A machine with a driver: its library was found, whatever comes after.
        other => println!("this machine has a driver: {other:?}"),
    }
}
