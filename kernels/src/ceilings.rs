//! What the machine can do at most with the team's threads: the measure of every op's speed.

use crate::error::OpError;
use crate::pages::Lines;
use crate::parallel::{self, SharedMut};
use crate::simd::{Isa, Kernel, LANES, Line, Simd};
use std::time::Instant;

/// Memory that is read: more than caches hold.
const READ_LINES: usize = (256 << 20) / size_of::<Line>();
/// Units of a measurement for each thread, so that one that comes late does not count for all.
const UNITS_PER_THREAD: usize = 16;
/// Measurements; the fastest counts.
const REPEATS: usize = 9;
/// Multiply-adds of a chain in one unit.
const STEPS: usize = 100_000;
/// Independent sums.
const CHAINS: usize = 12;

/// Rates of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes read from memory a second.
    pub bytes_per_second: f64,
    /// Operations a second of f32 multiply-adds, two each.
    pub f32_per_second: f64,
    /// Operations a second of products of bf16 pairs, four each; `None` if the instruction set has none.
    pub pairs_per_second: Option<f64>,
}

impl Ceilings {
    /// Measures, in some tenths of a second.
    ///
    /// # Errors
    /// [`OpError::OutOfMemory`] if 256 MiB cannot be had.
    pub fn measure() -> Result<Self, OpError> {
        let isa = Isa::best();
        let units = parallel::threads() * UNITS_PER_THREAD;
        let mut results = vec![0.0f32; units];
        let mut lines = Lines::new(READ_LINES)?;
        // Memory that was never written is one page of zeroes, which caches hold.
        parallel::for_each_chunk(lines.as_mut(), READ_LINES / 1024, usize::MAX, |_, lines| {
            lines.fill(Line([1; LANES]))
        });
        let results = SharedMut::new(&mut results);
        let read = fastest(units, |unit| {
            let lines = &lines[READ_LINES * unit / units..READ_LINES * (unit + 1) / units];
            // SAFETY: each unit has its own result.
            isa.run(Read { lines, sum: unsafe { &mut *results.at(unit) } });
        });
        let operations = |pairs: bool, each: usize| {
            let seconds = fastest(units, |unit| {
                // SAFETY: each unit has its own result.
                isa.run(MultiplyAdd { pairs, sum: unsafe { &mut *results.at(unit) } });
            });
            (units * STEPS * CHAINS * LANES * each) as f64 / seconds
        };
        Ok(Self {
            bytes_per_second: (READ_LINES * size_of::<Line>()) as f64 / read,
            f32_per_second: operations(false, 2),
            pairs_per_second: isa.takes_pairs().then(|| operations(true, 4)),
        })
    }
}

/// Seconds of the fastest of some regions.
fn fastest(units: usize, body: impl Fn(usize) + Sync) -> f64 {
    let once = || {
        let begin = Instant::now();
        parallel::for_each(units, usize::MAX, &body);
        begin.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(|_| once()).fold(f64::INFINITY, f64::min)
}

struct Read<'a> {
    lines: &'a [Line],
    sum: &'a mut f32,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [s.splat(0.0); 8];
        for lines in self.lines.chunks_exact(sums.len()) {
            for (sum, line) in sums.iter_mut().zip(lines) {
                // SAFETY: a line is 16 f32.
                *sum = s.max(*sum, unsafe { s.load(std::ptr::from_ref(line).cast()) });
            }
        }
        let all = sums.into_iter().fold(s.splat(0.0), |all, sum| s.max(all, sum));
        *self.sum = s.sum(all);
    }
}

struct MultiplyAdd<'a> {
    pairs: bool,
    sum: &'a mut f32,
}

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // What the compiler does not know it cannot compute beforehand.
        let [a, b] = std::hint::black_box([0.999_f32, 1.001]);
        let (word, weights) = (a.to_bits() & 0xffff_0000 | b.to_bits() >> 16, s.splat(b));
        let mut sums: [S::V; CHAINS] = std::array::from_fn(|chain| s.splat(chain as f32));
        if self.pairs {
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = s.dot(*sum, word, weights);
                }
            }
        } else {
            let factor = s.splat(a);
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = s.fma(factor, weights, *sum);
                }
            }
        }
        let all = sums.into_iter().fold(s.splat(0.0), |all, sum| s.add(all, sum));
        *self.sum = s.sum(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_product_of_pairs_is_slower_than_f32_and_nothing_is_free() {
        // Other tests use the cores at the same time: one of some measurements is as it should be.
        let all: Vec<Ceilings> = (0..5).map(|_| Ceilings::measure().unwrap()).collect();
        for ceilings in &all {
            assert!((1e8..1e13).contains(&ceilings.bytes_per_second), "{ceilings:?}");
            assert!((1e8..1e14).contains(&ceilings.f32_per_second), "{ceilings:?}");
        }
        let is_faster = |one: &Ceilings| one.pairs_per_second.is_none_or(|pairs| pairs > one.f32_per_second);
        assert!(all.iter().any(is_faster), "{all:?}");
    }
}
