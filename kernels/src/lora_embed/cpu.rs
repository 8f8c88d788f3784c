//! Reads of single columns and rows: a few cache lines a token, so one thread does them.

use crate::arena::Arena;
use crate::dtype::{Dtype, Element};
use crate::lora::{AdapterTable, RANK_BLOCK, WorkList};
use crate::rows::Rows;
use crate::simd::{Kernel, LANES, Simd};
use half::bf16;

/// `v` of every item that has a pair at the embedding.
pub(super) fn shrink(v: &mut [f32], arena: &Arena, table: &AdapterTable, tokens: &[u32], work: &WorkList) {
    for item in &work.items {
        for t in 0..item.rows as usize {
            let token = tokens[item.first_row as usize + t] as usize;
            let Some((dtype, unit, place)) = table.embed_column(item, token).ok().flatten() else { break };
            let bytes = RANK_BLOCK * dtype.bytes();
            let column = &arena.at_unit(unit, (place + 1) * bytes)[place * bytes..];
            let v = &mut v[(item.plane as usize + t) * RANK_BLOCK..][..RANK_BLOCK];
            decode(dtype, column, v);
        }
    }
}

fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_ne_bytes(*bytes);
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_ne_bytes(*bytes).to_f32();
            }
        }
    }
}

/// Checked arguments of [`super::lora_embed_rows`].
pub(super) struct AddRows<'a> {
    pub(super) y: &'a mut Rows,
    pub(super) arena: &'a Arena,
    pub(super) table: &'a AdapterTable,
    pub(super) tokens: &'a [u32],
    pub(super) work: &'a WorkList,
}

impl Kernel for AddRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { y, arena, table, tokens, work } = self;
        let hidden = y.width();
        // The first item of an adapter stands for all: its rows are added once.
        for item in work.items.iter().filter(|item| item.rank_block == 0) {
            let first = item.first_row as usize;
            for (row, &token) in tokens.iter().enumerate().skip(first).take(item.rows as usize) {
                let found = table.embed_row(item, token as usize).ok().flatten();
                let Some((dtype, unit, place, width)) = found.filter(|&(.., width)| width == hidden) else { break };
                let bytes = width * dtype.bytes();
                let delta = &arena.at_unit(unit, (place + 1) * bytes)[place * bytes..];
                let y = &mut y.as_f32_mut()[row * hidden..][..hidden];
                match dtype {
                    Dtype::F32 => add::<S, f32>(s, y, delta, item.scale),
                    Dtype::Bf16 => add::<S, bf16>(s, y, delta, item.scale),
                }
            }
        }
    }
}

/// `y += factor * delta`
#[inline(always)]
fn add<S: Simd, E: Element>(s: S, y: &mut [f32], delta: &[u8], factor: f32) {
    assert!(delta.len() == y.len() * E::BYTES);
    let whole = y.len() / LANES * LANES;
    let splat = s.splat(factor);
    for at in (0..whole).step_by(LANES) {
        // SAFETY: 16 elements from `at` on are in both.
        unsafe {
            let delta = E::load(s, delta.as_ptr().add(at * E::BYTES));
            let y = y.as_mut_ptr().add(at);
            s.store(y, s.fma(splat, delta, s.load(y)));
        }
    }
    if whole < y.len() {
        let mut last = [0u8; LANES * 4];
        let (count, bytes) = (y.len() - whole, &delta[whole * E::BYTES..]);
        last[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: `last` has 16 elements of either type, `y` has `count` from `whole` on.
        unsafe {
            let delta = E::load(s, last.as_ptr());
            let y = y.as_mut_ptr().add(whole);
            s.store_part(y, s.fma(splat, delta, s.load_part(y, count)), count);
        }
    }
}
