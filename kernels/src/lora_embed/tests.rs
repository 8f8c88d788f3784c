use super::*;
use crate::dtype::Dtype;
use crate::lora::{AdapterImage, AdapterParts, END_TILE, HeadWork, LoraPart, Segment, Slice, SlotScale, WorkList};
use crate::lora_expand::lora_expand;
use crate::lora_shrink::{lora_identity_shrink, lora_shrink};
use crate::test_support::{Random, assert_close};

const VOCAB: usize = END_TILE + 300;
const HIDDEN: usize = 20;
const RANK: usize = 18;
const PAGE_BYTES: usize = 1 << 20;

/// What one adapter is made of.
struct Whole {
    a: Vec<f32>,
    b: Vec<f32>,
    head_a: Vec<f32>,
    head_b: Vec<f32>,
    embed_rows: Vec<f32>,
    head_rows: Vec<f32>,
}

/// An adapter with everything outside the layers in slot 0, and one with a pair of a layer alone in slot 1.
fn world(dtype: Dtype) -> (Arena, AdapterTable, Whole) {
    let mut random = Random::new(1);
    let mut values = |n| random.values(n).into_iter().map(|v| dtype.round(v)).collect::<Vec<f32>>();
    let whole = Whole {
        a: values(RANK * VOCAB),
        b: values(HIDDEN * RANK),
        head_a: values(RANK * HIDDEN),
        head_b: values(VOCAB * RANK),
        embed_rows: values(VOCAB * HIDDEN),
        head_rows: values(VOCAB * HIDDEN),
    };
    let embed = LoraPart {
        layer: 0,
        slice: Slice::Embed,
        rank: RANK,
        a: &whole.a,
        b: &whole.b,
        d_in: VOCAB,
        d_out: HIDDEN,
        scale: 0.5,
    };
    let head = LoraPart { slice: Slice::Head, a: &whole.head_a, b: &whole.head_b, d_in: HIDDEN, d_out: VOCAB, ..embed };
    let extents = Some((VOCAB, HIDDEN));
    let parts = AdapterParts { lora: &[embed, head], vectors: &[], embed_rows: extents, head_rows: extents };
    let mut image = AdapterImage::pack_parts(dtype, PAGE_BYTES, 1, &parts).unwrap();
    for (slice, rows) in [(Slice::Embed, &whole.embed_rows), (Slice::Head, &whole.head_rows)] {
        for (piece, rows) in rows.chunks(1000 * HIDDEN).enumerate() {
            image.set_rows(slice, 1000 * piece, rows).unwrap();
        }
    }
    let q =
        LoraPart { layer: 0, slice: Slice::Q, rank: 1, a: &[1.0; 16], b: &[1.0; 16], d_in: 16, d_out: 16, scale: 1.0 };
    let plain = AdapterImage::pack(dtype, PAGE_BYTES, 1, &[q]).unwrap();
    let pages = (image.pages_needed() + 1) as u32;
    let (mut arena, mut table) = (Arena::new(PAGE_BYTES, pages as usize).unwrap(), AdapterTable::new(2));
    table.publish(&mut arena, 0, 3, &image, &(1..pages).rev().collect::<Vec<u32>>()).unwrap();
    table.publish(&mut arena, 1, 3, &plain, &[0]).unwrap();
    (arena, table, whole)
}

fn slot(slot: u32, scale: f32) -> SlotScale {
    SlotScale { slot, generation: 3, scale }
}

fn work(table: &AdapterTable) -> WorkList {
    let (one, other, twice) = ([slot(0, 1.0)], [slot(1, 1.0)], [slot(0, 0.5), slot(1, 1.0), slot(0, -2.0)]);
    let segments = [(0..2, &one[..]), (3..4, &other[..]), (4..6, &twice[..])];
    let mut work = WorkList::default();
    work.build(table, segments.into_iter().map(|(rows, adapters)| Segment { rows, adapters })).unwrap();
    work
}

/// Total factor of the adapter in slot 0 on each row of [`work`].
const FACTORS: [f64; 6] = [1.0, 1.0, 0.0, 0.0, -1.5, -1.5];
const TOKENS: [u32; 6] = [0, (VOCAB - 1) as u32, 5, 6, END_TILE as u32, 17];

#[test]
fn a_pair_and_rows_at_the_embedding_add_what_the_tokens_say() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (arena, table, whole) = world(dtype);
        let work = work(&table);
        let y = Random::new(7).rows(6, HIDDEN);
        let site = LoraSite { slices: &[Slice::Embed], cols: vec![(0, HIDDEN)], d_in: VOCAB };
        let (mut got, mut v) = (y.clone(), LoraScratch::default());
        lora_embed_shrink(&mut v, &arena, &table, &site, &TOKENS, &work).unwrap();
        lora_expand(&mut got, &v, &arena, &table, 0, &site, &work).unwrap();
        lora_embed_rows(&mut got, &arena, &table, &TOKENS, &work).unwrap();
        let mut want = Vec::new();
        for (t, (&token, factor)) in TOKENS.iter().zip(FACTORS).enumerate() {
            for k in 0..HIDDEN {
                let pair: f64 = (0..RANK)
                    .map(|r| f64::from(whole.b[k * RANK + r]) * f64::from(whole.a[r * VOCAB + token as usize]))
                    .sum();
                let row = f64::from(whole.embed_rows[token as usize * HIDDEN + k]);
                want.push(f64::from(y.row(t)[k]) + factor * (0.5 * pair + row));
            }
        }
        let tolerance = if dtype == Dtype::F32 { 1e-5 } else { 3e-2 };
        assert_close(got.as_f32(), &want, tolerance, &format!("{dtype:?}"));
        let outside = [VOCAB as u32; 6];
        assert!(matches!(lora_embed_rows(&mut got, &arena, &table, &outside, &work), Err(OpError::Limit { .. })));
        let refused = lora_embed_shrink(&mut v, &arena, &table, &site, &outside, &work);
        assert!(matches!(refused, Err(OpError::Limit { .. })));
    }
}

#[test]
fn a_pair_and_a_whole_matrix_at_the_head_act_on_the_rows_asked_for() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (arena, table, whole) = world(dtype);
        let step = work(&table);
        let rows = [5u32, 0, 1, 2, 3];
        let x = Random::new(8).rows(rows.len(), HIDDEN);
        let mut got = Rows::zeros(rows.len(), VOCAB);
        let (mut v, mut work) = (LoraScratch::default(), WorkList::default());
        for head in [HeadWork::Pairs, HeadWork::Rows] {
            work.select(&table, &step, &rows, head).unwrap();
            for tile in 0..2 {
                let slices: &[Slice] = if head == HeadWork::Pairs { &[Slice::Head] } else { &[Slice::HeadDelta] };
                let cols = vec![(tile * END_TILE, if tile == 0 { END_TILE } else { VOCAB - END_TILE })];
                let site = LoraSite { slices, cols, d_in: HIDDEN };
                match head {
                    HeadWork::Pairs => lora_shrink(&mut v, &x, &arena, &table, tile, &site, &work).unwrap(),
                    HeadWork::Rows => lora_identity_shrink(&mut v, &x, &table, tile, &site, &work).unwrap(),
                }
                lora_expand(&mut got, &v, &arena, &table, tile, &site, &work).unwrap();
            }
        }
        for (i, &row) in rows.iter().enumerate() {
            let x: Vec<f64> = x.row(i).iter().map(|&x| f64::from(x)).collect();
            let dot = |w: &[f32]| w.iter().zip(&x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
            let v: Vec<f64> = whole.head_a.chunks(HIDDEN).map(dot).collect();
            let want: Vec<f64> = (0..VOCAB)
                .map(|o| {
                    let pair: f64 = v.iter().enumerate().map(|(r, v)| v * f64::from(whole.head_b[o * RANK + r])).sum();
                    FACTORS[row as usize] * (0.5 * pair + dot(&whole.head_rows[o * HIDDEN..][..HIDDEN]))
                })
                .collect();
            let tolerance = if dtype == Dtype::F32 { 1e-4 } else { 3e-2 };
            assert_close(got.row(i), &want, tolerance, &format!("{dtype:?} row {row}"));
        }
    }
}

#[test]
fn rows_that_are_not_there_are_refused_and_no_block_crosses_a_page() {
    let parts = AdapterParts { embed_rows: Some((7, 4)), ..AdapterParts::default() };
    let mut image = AdapterImage::pack_parts(Dtype::F32, 4096, 1, &parts).unwrap();
    let mut set = |slice, first, n| image.set_rows(slice, first, &vec![1.0; n]);
    assert!(matches!(set(Slice::Head, 0, 4), Err(OpError::Shape { .. })));
    assert!(matches!(set(Slice::Embed, 0, 5), Err(OpError::Shape { .. })));
    assert!(matches!(set(Slice::Embed, 6, 8), Err(OpError::Limit { .. })));
    set(Slice::Embed, 5, 8).unwrap();
    let parts = AdapterParts { head_rows: Some((VOCAB, HIDDEN)), ..AdapterParts::default() };
    let small = AdapterImage::pack_parts(Dtype::F32, 64 << 10, 1, &parts);
    assert!(matches!(small, Err(OpError::BlockOverPage { .. })), "a tile of the head is larger than the page");
}
