//! The kernel against a copy.

use super::cuda::{BundleSection, UnpackKernel};
use crate::device::check::{CheckError, Checker, Random, Summary, expect};
use crate::device::{Elem, HostBuffer, HostUse};

/// Spreads bundles; what lies behind a section must stay as it was.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let device = &*checker.device;
    let kernel = UnpackKernel::load(device, Elem::Bf16)?;
    let sizes: [&[usize]; 3] = [&[16], &[32, 0, 4, 9000, 20], &[1, 15, 17, 70_000]];
    for (case, sizes) in sizes.iter().enumerate() {
        let room = |bytes: &usize| bytes.next_multiple_of(16);
        let total: usize = sizes.iter().map(room).sum();
        let mut bundle = HostBuffer::<u8>::new(&checker.device, total, HostUse::Upload)?;
        let mut random = Random::new(case as u64);
        bundle.as_mut_slice().fill_with(|| random.word() as u8);
        let place = checker.poisoned(2 * total + 64 * sizes.len())?;
        let (mut from, mut to, mut sections) = (0, 0, Vec::new());
        for size in *sizes {
            sections.push(BundleSection { to: place.address() + to, from, bytes: *size as u32 });
            from += room(size) as u32;
            to += room(size) as u64 + 64;
        }
        // SAFETY: the sections lie in the bundle, the places in `place`, and the host waits below.
        unsafe { kernel.launch(device, checker.stream, bundle.as_ptr() as u64, &sections)? };
        checker.wait()?;
        let got: Vec<u8> = place.read(checker.stream, 0, place.bytes())?;
        let mut want = vec![0xff; got.len()];
        for section in &sections {
            let (at, bytes) = ((section.to - place.address()) as usize, room(&(section.bytes as usize)));
            want[at..][..bytes].copy_from_slice(&bundle.as_slice()[section.from as usize..][..bytes]);
        }
        expect(got == want, || format!("unpack: bundle {case} arrived wrong"))?;
    }
    Ok(Summary { cases: sizes.len(), worst: 0.0, unit: "bytes differ" })
}
