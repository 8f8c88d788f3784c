//! The op on a device.

use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static UNPACK: KernelSource = KernelSource { file: "unpack.cu", text: include_str!("unpack.cu") };

const THREADS: u32 = 256;

/// Units of a section; as in the source.
const PARTS: usize = 8;

/// Most sections of a bundle.
pub const UNPACK_SECTIONS_MAX: usize = 16;

/// One list of a bundle.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BundleSection {
    /// Where kernels read it; has room for `bytes` rounded up to 16.
    pub to: Address,
    /// Where it begins in the bundle, bytes; a multiple of 16.
    pub from: u32,
    /// Its size.
    pub bytes: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    bundle: Address,
    count: u64,
    sections: [BundleSection; UNPACK_SECTIONS_MAX],
}

/// Spreads a bundle over its places.
#[derive(Clone, Copy, Debug)]
pub struct UnpackKernel {
    kernel: Kernel,
    blocks_max: usize,
}

impl UnpackKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem) -> Program {
        Program::new::<Args>(&UNPACK, "unpack", THREADS, elem)
    }

    /// Loads it.
    ///
    /// # Errors
    /// [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem) -> Result<Self, DeviceError> {
        let blocks_max = device.info().multiprocessors as usize;
        Ok(Self { kernel: device.load(&Self::program(elem))?, blocks_max })
    }

    /// Spreads `bundle`, page-locked host memory.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for too many sections or one that is not aligned; [`DeviceError`] of the driver.
    /// # Safety
    /// The sections lie inside the bundle (rounded up to 16 bytes) and their places have room; the host leaves the bundle
    /// alone until the launch is done.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        bundle: Address,
        sections: &[BundleSection],
    ) -> Result<(), DeviceError> {
        let refused = |what: String| Err(DeviceError::Unsupported(format!("unpack: {what}")));
        let mut args = Args { bundle, count: sections.len() as u64, sections: [BundleSection::default(); _] };
        let Some(target) = args.sections.get_mut(..sections.len()) else {
            return refused(format!("{} sections", sections.len()));
        };
        if let Some(section) = sections.iter().find(|section| section.from % 16 != 0 || section.to % 16 != 0) {
            return refused(format!("{section:?} is not aligned"));
        }
        target.copy_from_slice(sections);
        let blocks = (sections.len() * PARTS).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
