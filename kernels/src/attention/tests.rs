use super::*;
use crate::dtype::ArenaDtype;
use crate::kv_cache::{KvSlot, WORD_BYTES};
use crate::rope::{RopeAngles, rope_store};
use crate::simd::LANES;
use crate::test_support::{Random, assert_close, bits, decode};

/// The definition.
fn reference(out: &mut [f32], a: &cpu::Attention) {
    let (layout, head_dim, width) = (a.layout, a.layout.head_dim, a.qkv.width());
    let per = layout.dtype.per_word();
    let group = a.spec.heads / layout.kv_heads;
    let stored = |block: u32, words: usize, element: usize| {
        let bytes = layout.dtype.bytes();
        let at = (layout.block_offset(block) + words) * WORD_BYTES + element * bytes;
        decode(layout.dtype, &a.arena[at..][..bytes])[0]
    };
    // Sums run over words; of a pair the second comes first.
    let chain = |count: usize, factors: &dyn Fn(usize) -> (f32, f32)| {
        let order = (0..count.div_ceil(per)).flat_map(|word| (word * per..((word + 1) * per).min(count)).rev());
        order.map(factors).fold(0.0f32, |sum, (x, y)| layout.dtype.round(x).mul_add(y, sum))
    };
    for chunk in a.chunks {
        let blocks = &a.block_table[chunk.blocks.clone()];
        for (row, head) in (0..chunk.len).flat_map(|row| (0..a.spec.heads).map(move |head| (row, head))) {
            let (position, kv_head) = (chunk.start + row, head / group);
            let q = &a.qkv.as_f32()[(chunk.first_row + row) * width + head * head_dim..][..head_dim];
            let first = a.spec.window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)));
            let place = |j: usize| (blocks[j / layout.block_tokens], j % layout.block_tokens);
            let key = |j: usize, d: usize| {
                let (block, token) = place(j);
                stored(block, layout.k_offset(a.layer, kv_head), layout.k_element(d, token))
            };
            let value = |j: usize, d: usize| {
                let (block, token) = place(j);
                stored(block, layout.v_offset(a.layer, kv_head), layout.v_element(d, token))
            };
            let score = |j: usize| chain(head_dim, &|d| (q[d], key(j, d))) * a.spec.scale;
            let scores: Vec<f32> = (first..=position).map(score).collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|s| crate::simd::exp_one(s - max)).collect();
            let mut lanes = [0.0f32; LANES];
            for (j, weight) in (first..).zip(&weights) {
                lanes[j % layout.block_tokens % LANES] += weight;
            }
            let total = crate::simd::sum_lanes(&lanes);
            for d in 0..head_dim {
                let mut sum = 0.0f32;
                for block in first / layout.block_tokens..=position / layout.block_tokens {
                    let start = block * layout.block_tokens;
                    let seen = first.max(start)..(position + 1).min(start + layout.block_tokens);
                    let words = (seen.start - start) / per..(seen.end - start).div_ceil(per);
                    for j in words.flat_map(|word| (start + word * per..start + (word + 1) * per).rev()) {
                        if seen.contains(&j) {
                            sum = layout.dtype.round(weights[j - first]).mul_add(value(j, d), sum);
                        }
                    }
                }
                out[((chunk.first_row + row) * a.spec.heads + head) * head_dim + d] = sum / total + 0.0;
            }
        }
    }
}

/// A cache with one or more sequences in it, their blocks scattered.
struct World {
    layout: KvLayout,
    spec: AttnSpec,
    arena: Arena,
    /// Each sequence's rows `[positions, qkv width]` and blocks.
    sequences: Vec<(Rows, Vec<u32>)>,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
    dtype: ArenaDtype,
    window: Option<usize>,
}

const SHAPES: [Shape; 8] = [
    shape(9, 3, 64, 16, ArenaDtype::Bf16, None),
    shape(4, 4, 32, 16, ArenaDtype::F32, None),
    shape(8, 1, 80, 32, ArenaDtype::Bf16, None),
    shape(6, 2, 8, 4, ArenaDtype::F32, None),
    shape(32, 8, 64, 16, ArenaDtype::Bf16, Some(40)),
    shape(3, 1, 20, 24, ArenaDtype::Bf16, Some(1)),
    shape(64, 2, 16, 16, ArenaDtype::F32, Some(17)),
    shape(2, 1, 9, 3, ArenaDtype::Bf16, Some(7)),
];

const fn shape(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
    dtype: ArenaDtype,
    window: Option<usize>,
) -> Shape {
    Shape { heads, kv_heads, head_dim, block_tokens, dtype, window }
}

const LAYER: usize = 1;

impl World {
    fn new(seed: u64, shape: Shape, lengths: &[usize]) -> Self {
        let Shape { heads, kv_heads, head_dim, block_tokens, dtype, window } = shape;
        let mut layout = KvLayout { layers: 2, kv_heads, head_dim, block_tokens, dtype, page_bytes: 0 };
        layout.page_bytes = (3 * layout.block_bytes()).next_multiple_of(256);
        let mut random = Random::new(seed);
        let blocks: usize = lengths.iter().map(|n| n.div_ceil(block_tokens)).sum();
        let mut arena = Arena::new(layout.page_bytes, blocks.div_ceil(layout.blocks_per_page()) + 1).unwrap();
        arena.bytes_mut().fill(0xff); // NaN in either type: what a row may not see must not show
        let mut ids: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, random.below(i + 1));
        }
        let mut ids = ids.into_iter();
        let sequences = lengths.iter().map(|&n| {
            let rows = random.rows(n, (heads + 2 * kv_heads) * head_dim);
            (rows, ids.by_ref().take(n.div_ceil(block_tokens)).collect())
        });
        let sequences = sequences.collect();
        let spec = AttnSpec { heads, scale: 3.0 / (head_dim as f32).sqrt(), window };
        Self { layout, spec, arena, sequences }
    }

    /// Runs the given `(sequence, start, rows)` as one step and returns its output rows.
    fn step(&mut self, isa: Option<Isa>, parts: &[(usize, usize, usize)]) -> Rows {
        let width = self.sequences[0].0.width();
        let rows: usize = parts.iter().map(|part| part.2).sum();
        let (mut qkv, mut slots, mut table, mut chunks) = (Rows::zeros(rows, width), vec![], vec![9999; 3], vec![]);
        let mut first_row = 0;
        for &(sequence, start, len) in parts {
            let (values, blocks) = &self.sequences[sequence];
            let from = &values.as_f32()[start * width..(start + len) * width];
            qkv.as_f32_mut()[first_row * width..][..len * width].copy_from_slice(from);
            let bt = self.layout.block_tokens;
            slots.extend((start..start + len).map(|p| KvSlot { block: blocks[p / bt], offset: (p % bt) as u32 }));
            let from = table.len();
            table.extend(&blocks[..(start + len).div_ceil(bt)]);
            chunks.push(AttnChunk { first_row, len, start, blocks: from..table.len() });
            first_row += len;
        }
        let mut rope = RopeAngles::new(vec![], 1.0, rows);
        rope.fill(&vec![0; rows]).unwrap();
        rope_store(&mut qkv, self.spec.heads, &rope, &mut self.arena, &self.layout, LAYER, &slots).unwrap();
        let mut out = Rows::zeros(rows, self.spec.heads * self.layout.head_dim);
        out.as_f32_mut().fill(f32::NAN);
        let Self { layout, spec, arena, .. } = &*self;
        match isa {
            None => paged_attention(&mut out, &qkv, arena, layout, LAYER, spec, &chunks, &table).unwrap(),
            Some(isa) => {
                let bytes = arena.bytes();
                let a = cpu::Attention {
                    qkv: &qkv,
                    arena: bytes,
                    layout,
                    layer: LAYER,
                    spec,
                    chunks: &chunks,
                    block_table: &table,
                };
                let mut want = vec![f32::NAN; out.as_f32().len()];
                reference(&mut want, &a);
                cpu::paged_attention(isa, &mut out, &a);
                assert_eq!(bits(out.as_f32()), bits(&want), "{isa:?}");
            }
        }
        out
    }

    /// Plain causal attention in f64.
    fn dense(&self, sequence: usize) -> Vec<f64> {
        let (values, _) = &self.sequences[sequence];
        let Self { layout, spec, .. } = self;
        let (dim, group) = (layout.head_dim, spec.heads / layout.kv_heads);
        let rounded = |p: usize, at: usize| f64::from(layout.dtype.round(values.row(p)[at]));
        let mut out = Vec::new();
        for p in 0..values.rows() {
            for head in 0..spec.heads {
                let k_at = (spec.heads + head / group) * dim;
                let v_at = (spec.heads + layout.kv_heads + head / group) * dim;
                let first = spec.window.map_or(0, |w| (p + 1).saturating_sub(w));
                let q = |d: usize| rounded(p, head * dim + d);
                let score = |j| (0..dim).map(|d| q(d) * rounded(j, k_at + d)).sum::<f64>() * f64::from(spec.scale);
                let scores: Vec<f64> = (first..=p).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let sum: f64 = (first..=p).zip(&weights).map(|(j, w)| w * rounded(j, v_at + d)).sum();
                    out.push(sum / total);
                }
            }
        }
        out
    }
}

#[test]
fn every_instruction_set_equals_the_definition() {
    for shape in SHAPES {
        for isa in Isa::available() {
            let mut world = World::new(1, shape, &[70, 1, 19]);
            world.step(Some(isa), &[(0, 0, 53), (1, 0, 1), (2, 0, 18)]);
            world.step(Some(isa), &[(0, 53, 17), (2, 18, 1)]);
        }
    }
}

#[test]
fn it_is_attention() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let mut world = World::new(seed as u64, shape, &[45, 100]);
        let out = world.step(None, &[(0, 0, 45), (1, 0, 100)]);
        let want: Vec<f64> = world.dense(0).into_iter().chain(world.dense(1)).collect();
        // Weights are rounded as the cache is.
        let tolerance = if shape.dtype == ArenaDtype::F32 { 1e-5 } else { 2e-3 };
        assert_close(out.as_f32(), &want, tolerance, &format!("{shape:?}"));
    }
}

#[test]
fn chunked_prefill_and_decode_step_by_step_equal_one_shot() {
    const N: usize = 90;
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let one_shot = World::new(seed as u64, shape, &[N, 33]).step(None, &[(0, 0, N)]);
        for cuts in [vec![0, 31, 32, 64, N], vec![0, 1, 90], (0..=N).collect()] {
            // The neighbour is decoded beside it and must make no difference.
            let mut world = World::new(seed as u64, shape, &[N, 33]);
            let mut rows = Vec::new();
            for (i, cut) in cuts.windows(2).enumerate() {
                let len = cut[1] - cut[0];
                let with_neighbour = [(1, i % 33, 1), (0, cut[0], len)];
                let parts = if i < 33 { &with_neighbour[..] } else { &with_neighbour[1..] };
                let out = world.step(None, parts);
                rows.extend_from_slice(&out.as_f32()[(out.rows() - len) * out.width()..]);
            }
            assert_eq!(bits(&rows), bits(one_shot.as_f32()), "{shape:?} cuts {}", cuts.len());
        }
    }
}

#[test]
fn where_blocks_lie_makes_no_difference() {
    let shape = SHAPES[0];
    let first = World::new(4, shape, &[64]).step(None, &[(0, 0, 64)]);
    let mut other = World::new(4, shape, &[64]);
    other.sequences[0].1.reverse();
    assert_eq!(bits(other.step(None, &[(0, 0, 64)]).as_f32()), bits(first.as_f32()));
}

#[test]
fn chunks_that_are_not_there_are_refused() {
    let mut world = World::new(5, SHAPES[0], &[20]);
    world.step(None, &[(0, 0, 20)]);
    let World { layout, spec, arena, sequences } = &world;
    let (qkv, table) = (&sequences[0].0, &sequences[0].1);
    let good = AttnChunk { first_row: 0, len: 20, start: 0, blocks: 0..2 };
    let run = |chunks: &[AttnChunk], table: &[u32], layer| {
        let mut out = Rows::zeros(20, spec.heads * layout.head_dim);
        paged_attention(&mut out, qkv, arena, layout, layer, spec, chunks, table)
    };
    run(std::slice::from_ref(&good), table, 0).unwrap();
    let limit = |result| assert!(matches!(result, Err(OpError::Limit { .. })), "{result:?}");
    limit(run(&[AttnChunk { len: 21, ..good.clone() }], table, 0));
    limit(run(&[AttnChunk { start: 13, ..good.clone() }], table, 0));
    limit(run(&[AttnChunk { start: usize::MAX, ..good.clone() }], table, 0));
    limit(run(&[AttnChunk { blocks: 0..3, ..good.clone() }], table, 0));
    limit(run(&[AttnChunk { blocks: 1..2, ..good.clone() }], table, 0));
    limit(run(&[good.clone(), good.clone()], table, 0));
    limit(run(std::slice::from_ref(&good), &[0, 9999], 0));
    limit(run(&[good], table, 2));
}

#[test]
fn the_decode_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(super::check::check_decode);
}

#[test]
fn the_prefill_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(super::check::check_prefill);
}
