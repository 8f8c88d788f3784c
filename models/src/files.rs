//! Opening files that someone else wrote: regular files only, and sized before they are read.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Why a file was not read.
#[derive(Debug)]
pub(crate) enum FileFault {
    /// Nothing is there.
    Absent,
    /// A directory, FIFO, socket or device: opening one may block for ever or have effects.
    NotRegular,
    /// Larger than the caller accepts.
    TooLarge { bytes: u64 },
    /// The system refused.
    Io(io::Error),
}

impl From<io::Error> for FileFault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Absent,
            _ => Self::Io(error),
        }
    }
}

/// Opens a regular file (symbolic links are followed) and returns it with its size in bytes.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), FileFault> {
    // Asked before opening, because opening a device may act on it, and again after, because the name may have
    // been given to something else in between.
    if !std::fs::metadata(path)?.is_file() {
        return Err(FileFault::NotRegular);
    }
    let file = open_without_waiting(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(FileFault::NotRegular);
    }
    Ok((file, metadata.len()))
}

/// Reads a whole regular file of at most `bytes_max`.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FileFault> {
    let (file, bytes) = open_regular(path)?;
    if bytes > bytes_max {
        return Err(FileFault::TooLarge { bytes });
    }
    let mut content = Vec::with_capacity(bytes as usize);
    // One byte more than allowed, so that a file that grows while it is read is seen and not cut.
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut content)?;
    if content.len() as u64 > bytes_max {
        return Err(FileFault::TooLarge { bytes: content.len() as u64 });
    }
    Ok(content)
}

/// `O_NONBLOCK`, so that a FIFO put in the file's place after the check cannot hold the thread; no effect on files.
#[cfg(target_os = "linux")]
fn open_without_waiting(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    const O_NONBLOCK: i32 = 0o4000;
    std::fs::OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path)
}

#[cfg(not(target_os = "linux"))]
fn open_without_waiting(path: &Path) -> io::Result<File> {
    File::open(path)
}
