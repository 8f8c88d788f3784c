//! Products of the emulated device: plain sums in index order.

use super::super::{Elem, GemmOut, GemmShape};
use crate::parallel;

/// Computes `y = x W^T`.
///
/// # Safety
/// The addresses hold what the shape says.
pub(super) unsafe fn run(shape: GemmShape, y: u64, x: u64, weight: u64) {
    let GemmShape { rows, d_out, d_in, elem, out } = shape;
    // SAFETY: the caller vouches for the extents.
    let (x, weight) = unsafe {
        (
            std::slice::from_raw_parts(x as *const u16, rows * d_in),
            std::slice::from_raw_parts(weight as *const u16, d_out * d_in),
        )
    };
    let x: Vec<f32> = x.iter().map(|&bits| elem.from_bits(bits)).collect();
    let mut columns: Vec<Vec<f32>> = vec![Vec::new(); d_out];
    parallel::for_each_chunk(&mut columns, 1, rows * d_in * d_out, |output, column| {
        let w: Vec<f32> = weight[output * d_in..][..d_in].iter().map(|&bits| elem.from_bits(bits)).collect();
        column[0] = x.chunks_exact(d_in).map(|x| dot(x, &w)).collect();
    });
    for (output, column) in columns.iter().enumerate() {
        for (row, &value) in column.iter().enumerate() {
            let at = row * d_out + output;
            // SAFETY: the caller vouches for `rows * d_out` elements of the type.
            unsafe {
                match out {
                    GemmOut::Elem => (y as *mut u16).add(at).write(round(elem, value)),
                    GemmOut::F32 => (y as *mut f32).add(at).write(value),
                }
            }
        }
    }
}

fn round(elem: Elem, value: f32) -> u16 {
    elem.to_bits(value)
}

/// Eight chains, added in a fixed order.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a_whole, a_rest) = a.as_chunks::<8>();
    let (b_whole, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
