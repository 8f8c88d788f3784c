//! Tiles of AMX: eight registers of 16 rows of 64 bytes, and the product of two of them in bf16.
//!
//! The kernels are written over [`Tiles`], which has two forms: the instructions, and the same in plain code ([`Emulated`]),
//! so that what is built on it is tested on processors without AMX. The instructions are used only where processor and kernel
//! have them and a product of small whole numbers comes out as the plain code says.
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS and LDTILECFG.

use super::{LANES, Line};
use half::bf16;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Bytes of a row of a tile.
pub(crate) const ROW_BYTES: usize = 64;
const TILES: usize = 8;

/// Rows of each of the eight tiles; every row is 64 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape(pub(crate) [u8; TILES]);

/// The tile registers of this thread.
pub(crate) trait Tiles {
    /// Sets the shape and clears all tiles.
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn new(shape: &Shape) -> Self;
    /// Tile `T` = 0.
    fn zero<const T: usize>(&mut self);
    /// Tile `T` = its rows of 64 bytes from `p` on, `stride` bytes apart.
    /// # Safety
    /// The rows must be readable.
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize);
    /// Tile `C` of f32 += tile `A` of bf16 pairs along its rows times tile `B` of bf16 pairs down its columns.
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
    /// Writes tile `T`.
    /// # Safety
    /// The rows must be writable.
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize);
}

/// The instructions. Dropping it gives the tiles back, so that switching threads does not have to save them.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Hardware(());

#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

#[cfg(target_arch = "x86_64")]
impl Tiles for Hardware {
    #[inline(always)]
    unsafe fn new(shape: &Shape) -> Self {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, &rows) in shape.0.iter().enumerate().filter(|(_, rows)| **rows > 0) {
            (config.row_bytes[i], config.rows[i]) = (ROW_BYTES as u16, rows);
        }
        // SAFETY: the caller vouches for the instruction; it reads the 64 bytes of `config`.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
        Self(())
    }
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: tiles are configured: `self` exists. They are in no register the compiler knows.
        unsafe { std::arch::asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem)) };
    }
    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        // SAFETY: as above; the caller vouches for the memory.
        unsafe {
            std::arch::asm!("tileloadd tmm{t}, [{p} + {stride}*1]", t = const T, p = in(reg) p, stride = in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, preserves_flags, nomem));
        }
    }
    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize) {
        // SAFETY: as above; the caller vouches for the memory.
        unsafe {
            std::arch::asm!("tilestored [{p} + {stride}*1], tmm{t}", t = const T, p = in(reg) p, stride = in(reg) stride,
                options(nostack, preserves_flags));
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Hardware {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: tiles are configured: `self` exists.
        unsafe { std::arch::asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// The same in plain code.
pub(crate) struct Emulated {
    rows: [u8; TILES],
    tiles: [[Line; TILE_ROWS]; TILES],
}

impl Tiles for Emulated {
    unsafe fn new(shape: &Shape) -> Self {
        Self { rows: shape.0, tiles: [[Line::default(); TILE_ROWS]; TILES] }
    }
    fn zero<const T: usize>(&mut self) {
        self.tiles[T] = [Line::default(); TILE_ROWS];
    }
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        self.zero::<T>();
        for row in 0..self.rows[T] as usize {
            // SAFETY: the caller vouches for the rows.
            self.tiles[T][row] = Line(unsafe { p.add(row * stride).cast::<[u32; LANES]>().read_unaligned() });
        }
    }
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        let half =
            |word: u32, high: bool| bf16::from_bits(if high { (word >> 16) as u16 } else { word as u16 }).to_f32();
        for m in 0..self.rows[C] as usize {
            for n in 0..LANES {
                let mut sums = [0.0f32; 2];
                for k in 0..self.rows[B] as usize {
                    let (a, b) = (self.tiles[A][m].0[k], self.tiles[B][k].0[n]);
                    sums[0] = half(a, false).mul_add(half(b, false), sums[0]);
                    sums[1] = half(a, true).mul_add(half(b, true), sums[1]);
                }
                let c = &mut self.tiles[C][m].0[n];
                *c = (f32::from_bits(*c) + (sums[0] + sums[1])).to_bits();
            }
        }
    }
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize) {
        for row in 0..self.rows[T] as usize {
            // SAFETY: the caller vouches for the rows.
            unsafe { p.add(row * stride).cast::<[u32; LANES]>().write_unaligned(self.tiles[T][row].0) };
        }
    }
}

/// Whether the processor has bf16 tiles, the kernel lets this process use them, and they compute as they should.
#[cfg(target_arch = "x86_64")]
pub(super) fn permitted() -> bool {
    // SAFETY of what follows: CPUID leaf 7 exists on every processor with AVX-512, which the caller asked for.
    let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
    let (bf16, tiles) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
    // SAFETY: the registers are plain numbers; on success the process may use tile data from now on.
    bf16 && tiles && unsafe { kernel_permits() } && self_check()
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: Linux gives tile data only to processes that ask.
///
/// # Safety
/// Linux on x86-64.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
unsafe fn kernel_permits() -> bool {
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut outcome = ARCH_PRCTL;
    // SAFETY: a system call with two numbers; it clobbers rcx and r11.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") outcome, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    outcome == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
unsafe fn kernel_permits() -> bool {
    false
}

/// A product of small whole numbers, which has one right answer.
#[cfg(target_arch = "x86_64")]
fn self_check() -> bool {
    // SAFETY: the processor has the instructions and the process may use them.
    let got = unsafe { sample_product::<Hardware>() };
    // SAFETY: plain code.
    let want = unsafe { sample_product::<Emulated>() };
    got == want
}

/// # Safety
/// As [`Tiles::new`].
pub(super) unsafe fn sample_product<T: Tiles>() -> [[u32; LANES]; TILE_ROWS] {
    let number = |i: usize| u32::from(bf16::from_f32((i * 7 % 11) as f32 - 5.0).to_bits());
    let line = |row: usize| Line(std::array::from_fn(|i| number(row * 3 + i) | number(row + 5 * i + 1) << 16));
    let a: [Line; TILE_ROWS] = std::array::from_fn(line);
    let b: [Line; TILE_ROWS] = std::array::from_fn(|row| line(row + 40));
    let mut c = [Line::default(); TILE_ROWS];
    // SAFETY: the caller vouches for the instructions; each array is 16 rows of 64 bytes.
    unsafe {
        let mut tiles = T::new(&Shape([16, 0, 0, 0, 16, 0, 16, 0]));
        tiles.zero::<0>();
        tiles.load::<4>(a.as_ptr().cast(), ROW_BYTES);
        tiles.load::<6>(b.as_ptr().cast(), ROW_BYTES);
        tiles.dot::<0, 4, 6>();
        tiles.dot::<0, 4, 6>();
        tiles.store::<0>(c.as_mut_ptr().cast(), ROW_BYTES);
    }
    c.map(|line| line.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_product_is_the_formula() {
        let number = |i: usize| ((i * 7 % 11) as f32) - 5.0;
        let a =
            |m: usize, k: usize| if k.is_multiple_of(2) { number(m * 3 + k / 2) } else { number(m + 5 * (k / 2) + 1) };
        // SAFETY: plain code.
        let got = unsafe { sample_product::<Emulated>() };
        for (m, row) in got.iter().enumerate() {
            for (n, &bits) in row.iter().enumerate() {
                // Row k of B holds inputs 2 k and 2 k + 1 of output n.
                let b = |k: usize| a(40 + k / 2, 2 * n + k % 2);
                let want: f32 = (0..32).map(|k| a(m, k) * b(k)).sum();
                assert_eq!(f32::from_bits(bits), 2.0 * want, "[{m}, {n}]");
            }
        }
    }

    #[test]
    fn the_kernels_permission_is_asked_without_harm() {
        let had = super::super::Isa::available().contains(&super::super::Isa::Amx);
        assert_eq!(permitted(), had);
    }
}
