//! Finds the libraries that a GPU needs and says where they were: the driver (`libcuda`), the compiler (`libnvrtc` with its
//! builtins) and `libcublasLt`. None is linked, so one binary runs on machines with and without them.
//!
//! A file is opened by its absolute path and stays open until the process ends: later look-ups by soname, which is how the
//! bindings load, then find the same file without any variable being set.

use std::ffi::{OsStr, c_int};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use super::DeviceError;

/// Major versions of the CUDA libraries that are accepted, best first.
const MAJORS: [u32; 2] = [13, 12];

/// How long `python3` may take to say where its packages are.
const PYTHON_LIMIT: Duration = Duration::from_secs(10);

/// Where to look, before the places that are always tried (the toolkit's folder and the loader's own path).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibraryPaths {
    /// Folders that the user named.
    pub dirs: Vec<PathBuf>,
    /// The toolkit's root (`CUDA_HOME`).
    pub cuda_home: Option<PathBuf>,
    /// A Python environment whose packages may hold the libraries (`VIRTUAL_ENV`).
    pub virtual_env: Option<PathBuf>,
    /// Whether `python3` may be asked where its packages are, once, when nothing else has helped.
    pub ask_python: bool,
}

/// An open library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLibrary {
    /// Name without version, such as `libnvrtc.so`.
    pub name: &'static str,
    /// The file; only its name when the loader does not tell.
    pub path: PathBuf,
    /// As the library or its file name says; empty if unknown.
    pub version: String,
}

/// A library that is never closed: its threads and its exit handlers outlive every owner here.
pub(super) struct OpenLibrary {
    pub(super) found: FoundLibrary,
    handle: &'static Library,
}

impl std::fmt::Debug for OpenLibrary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.found.fmt(f)
    }
}

impl OpenLibrary {
    /// A function of the library.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if the library is too old to have it.
    /// # Safety
    /// `F` is the function's type.
    pub(super) unsafe fn symbol<F: Copy>(&self, name: &str) -> Result<F, DeviceError> {
        // SAFETY: the caller vouches for the type.
        match unsafe { self.handle.get::<F>(name) } {
            Ok(symbol) => Ok(*symbol),
            Err(_) => Err(self.lacks(name)),
        }
    }

    fn lacks(&self, name: &str) -> DeviceError {
        DeviceError::Unsupported(format!("{} is too old: it has no {name}", self.found.path.display()))
    }
}

/// The driver. Its file belongs to the machine, so Python's packages are no place for it.
pub(super) fn open_driver(paths: &LibraryPaths) -> Result<OpenLibrary, DeviceError> {
    // Behind the loader's own path, which may name a newer driver's compatibility library on purpose.
    let system = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/local/nvidia/lib64",
        "/usr/lib/wsl/lib",
    ];
    let mut looked = Vec::new();
    let in_folder = |dir: PathBuf, looked: &mut _| open_file("libcuda.so", &dir.join("libcuda.so.1"), looked);
    for dir in paths.dirs.iter().cloned() {
        if let Some(library) = in_folder(dir, &mut looked) {
            return Ok(library);
        }
    }
    if let Some(library) = open_by_name("libcuda.so", &["libcuda.so.1".to_owned()], &mut looked) {
        return Ok(library);
    }
    for dir in system.map(PathBuf::from) {
        if let Some(library) = in_folder(dir, &mut looked) {
            return Ok(library);
        }
    }
    Err(missing("libcuda.so", looked))
}

/// The compiler, after its builtins: it looks for them by name.
pub(super) fn open_nvrtc(paths: &LibraryPaths) -> Result<OpenLibrary, DeviceError> {
    open(paths, "libnvrtc.so", Some("libnvrtc-builtins.so"))
}

/// cuBLASLt.
pub(super) fn open_cublas_lt(paths: &LibraryPaths) -> Result<OpenLibrary, DeviceError> {
    open(paths, "libcublasLt.so", None)
}

fn open(paths: &LibraryPaths, name: &'static str, first: Option<&str>) -> Result<OpenLibrary, DeviceError> {
    let mut looked = Vec::new();
    for dir in folders(paths) {
        if let Some(library) = open_in(&dir, name, first, &mut looked) {
            return Ok(library);
        }
    }
    let sonames = MAJORS.map(|major| format!("{name}.{major}"));
    if let Some(library) = open_by_name(name, &sonames, &mut looked) {
        return Ok(library);
    }
    // Last, because it starts a process.
    if paths.ask_python {
        for dir in packages_of_python(&mut looked).iter().flat_map(|packages| nvidia_folders(packages)) {
            if let Some(library) = open_in(&dir, name, first, &mut looked) {
                return Ok(library);
            }
        }
    }
    Err(missing(name, looked))
}

fn missing(name: &str, looked: Vec<String>) -> DeviceError {
    DeviceError::Library { library: name.to_owned(), looked }
}

/// The folders to look in, best first.
fn folders(paths: &LibraryPaths) -> Vec<PathBuf> {
    let mut folders = paths.dirs.clone();
    folders.extend(paths.cuda_home.iter().map(|home| home.join("lib64")));
    for packages in paths.virtual_env.iter().flat_map(|root| packages_of_environment(root)) {
        folders.extend(nvidia_folders(&packages));
    }
    folders.push(PathBuf::from("/usr/local/cuda/lib64"));
    folders
}

/// `lib/python3.*/site-packages` of an environment.
fn packages_of_environment(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join("site-packages"))
        .collect();
    found.sort();
    found
}

/// Where the vendor's Python packages put their libraries: one folder since CUDA 13, one for each library before.
fn nvidia_folders(packages: &Path) -> Vec<PathBuf> {
    ["cu13", "cuda_nvrtc", "cublas"].map(|part| packages.join("nvidia").join(part).join("lib")).into()
}

/// Asks `python3` for its package folders; gives up after [`PYTHON_LIMIT`].
fn packages_of_python(looked: &mut Vec<String>) -> Vec<PathBuf> {
    looked.push("packages of python3".to_owned());
    let program = "import sysconfig, site; print(sysconfig.get_path('purelib')); print(site.getusersitepackages())";
    let command = Command::new("python3")
        .args(["-c", program])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = command else { return Vec::new() };
    let begin = Instant::now();
    // Two short lines fit the pipe, so the child never waits for us to read.
    while !matches!(child.try_wait(), Ok(Some(_))) {
        if begin.elapsed() > PYTHON_LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            return Vec::new();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let Ok(output) = child.wait_with_output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).filter(|path| path.is_absolute()).collect()
}

/// Opens the best `name.<major>` of a folder, after `first` of the same folder.
fn open_in(dir: &Path, name: &'static str, first: Option<&str>, looked: &mut Vec<String>) -> Option<OpenLibrary> {
    let candidates: Vec<PathBuf> =
        MAJORS.map(|major| dir.join(format!("{name}.{major}"))).into_iter().filter(|path| path.is_file()).collect();
    if candidates.is_empty() {
        looked.push(dir.display().to_string());
    }
    for path in candidates {
        let major = path.extension().map(OsStr::to_os_string);
        if let (Some(first), Some(major)) = (first, major) {
            open_builtins(dir, first, &major.to_string_lossy());
        }
        if let Some(library) = open_file(name, &path, looked) {
            return Some(library);
        }
    }
    None
}

/// Opens `<first>.<major>.<minor>`. A failure shows when something is compiled, with the compiler's own message.
fn open_builtins(dir: &Path, first: &str, major: &str) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let prefix = format!("{first}.{major}");
    for entry in entries.filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            let _ = keep_open(&entry.path());
        }
    }
}

fn open_file(name: &'static str, path: &Path, looked: &mut Vec<String>) -> Option<OpenLibrary> {
    if !path.is_file() {
        looked.push(path.display().to_string());
        return None;
    }
    match keep_open(path) {
        Ok(handle) => {
            let version = version_of(path);
            Some(OpenLibrary { found: FoundLibrary { name, path: path.to_owned(), version }, handle })
        }
        Err(error) => {
            looked.push(format!("{} (it does not load: {error})", path.display()));
            None
        }
    }
}

fn open_by_name(name: &'static str, sonames: &[String], looked: &mut Vec<String>) -> Option<OpenLibrary> {
    for soname in sonames {
        if let Ok(handle) = keep_open(Path::new(soname)) {
            let path = mapped_file(soname).unwrap_or_else(|| PathBuf::from(soname));
            let version = version_of(&path);
            return Some(OpenLibrary { found: FoundLibrary { name, path, version }, handle });
        }
    }
    looked.push(format!("the loader's own path ({})", sonames.join(", ")));
    None
}

fn keep_open(path: &Path) -> Result<&'static Library, libloading::Error> {
    const FLAGS: c_int = RTLD_LAZY | RTLD_GLOBAL;
    // SAFETY: one of the vendor's libraries by its name; what it does when it is loaded is the vendor's.
    let library = unsafe { Library::open(Some(path), FLAGS)? };
    Ok(Box::leak(Box::new(library)))
}

/// The file that the loader took for a soname: it is mapped now.
fn mapped_file(soname: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    paths.find(|path| Path::new(path).file_name().is_some_and(|file| is_version_of(file, soname))).map(PathBuf::from)
}

/// Whether `file` is `soname` or a longer version of it.
fn is_version_of(file: &OsStr, soname: &str) -> bool {
    let file = file.to_string_lossy();
    file.strip_prefix(soname).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What follows `.so.` in the name of the file behind the links.
fn version_of(path: &Path) -> String {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split_once(".so.").map(|(_, version)| version.to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> LibraryPaths {
        LibraryPaths {
            dirs: vec![PathBuf::from("/nonexistent/one")],
            cuda_home: Some(PathBuf::from("/nonexistent/home")),
            virtual_env: None,
            ask_python: false,
        }
    }

    #[test]
    fn a_missing_library_names_every_place_looked_at() {
        // Only where the machine has no compiler of its own; with one, finding it is right.
        match open_nvrtc(&nowhere()) {
            Ok(library) => println!("this machine has {}", library.found.path.display()),
            Err(error) => {
                let text = error.to_string();
                for place in
                    ["/nonexistent/one", "/nonexistent/home/lib64", "/usr/local/cuda/lib64", "loader's own path"]
                {
                    assert!(text.contains(place), "{text}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_no_library_is_passed_over_with_the_reason() {
        let dir = std::env::temp_dir().join(format!("loramux-libraries-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("libcublasLt.so.13"), b"no ELF").unwrap();
        let mut looked = Vec::new();
        assert!(open_in(&dir, "libcublasLt.so", None, &mut looked).is_none());
        assert!(looked.len() == 1 && looked[0].contains("does not load"), "{looked:?}");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn packages_of_an_environment_are_found_without_running_it() {
        let root = std::env::temp_dir().join(format!("loramux-environment-{}", std::process::id()));
        let lib = root.join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        let paths = LibraryPaths { virtual_env: Some(root.clone()), ..LibraryPaths::default() };
        assert!(folders(&paths).contains(&lib));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn versions_come_from_file_names() {
        assert_eq!(version_of(Path::new("/x/libnvrtc.so.13.0.88")), "13.0.88");
        assert_eq!(version_of(Path::new("/x/libcuda.so")), "");
        assert!(is_version_of(OsStr::new("libcuda.so.1"), "libcuda.so.1"));
        assert!(is_version_of(OsStr::new("libcuda.so.1.2"), "libcuda.so.1"));
        assert!(!is_version_of(OsStr::new("libcuda.so.13"), "libcuda.so.1"));
    }
}
