//! Adapters and batches for the tests of both halves of the delta.

use super::*;
use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::error::OpError;
use crate::rows::Rows;
use crate::test_support::Random;
use std::ops::Range;

pub(crate) const LAYERS: usize = 2;
pub(crate) const LAYER: usize = 1;
pub(crate) const RANKS: [usize; 7] = [1, 8, 16, 33, 64, 128, 512];
const PAGE_BYTES: usize = 8192;

/// `(d_in, d_out)` of a matrix of the tests' model; most are no whole vectors.
fn extents(slice: Slice) -> (usize, usize) {
    match slice {
        Slice::Q => (40, 48),
        Slice::K | Slice::V => (40, 20),
        Slice::O => (48, 40),
        // Whole vectors, but no whole tiles of them.
        Slice::Gate | Slice::Up => (40, 80),
        _ => (80, 40),
    }
}

pub(crate) fn sites() -> [LoraSite; 4] {
    let site = |slices: &'static [Slice]| {
        let mut first = 0;
        let cols = slices.iter().map(|&slice| {
            let d_out = extents(slice).1;
            first += d_out;
            (first - d_out, d_out)
        });
        LoraSite { slices, cols: cols.collect(), d_in: extents(slices[0]).0 }
    };
    [site(&[Slice::Q, Slice::K, Slice::V]), site(&[Slice::O]), site(&[Slice::Gate, Slice::Up]), site(&[Slice::Down])]
}

/// A and B of one matrix in [`LAYER`], rounded to the storage type.
pub(crate) struct Pair {
    pub(crate) slice: Slice,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) a: Vec<f32>,
    pub(crate) b: Vec<f32>,
}

/// Published adapters, one for each rank asked for.
pub(crate) struct World {
    pub(crate) arena: Arena,
    pub(crate) table: AdapterTable,
    pub(crate) adapters: Vec<(SlotScale, Vec<Pair>)>,
}

impl World {
    /// Adapter `i` has rank `ranks[i]`; every other one leaves V and Up alone and has another rank on K and Gate.
    pub(crate) fn new(seed: u64, dtype: Dtype, ranks: &[usize]) -> Self {
        let mut random = Random::new(seed);
        let mut world = Self {
            arena: Arena::new(PAGE_BYTES, 4096).unwrap(),
            table: AdapterTable::new(ranks.len()),
            adapters: Vec::new(),
        };
        world.arena.bytes_mut().fill(0xff); // NaN in either type
        let mut next_page = 0;
        for (i, &rank) in ranks.iter().enumerate() {
            let pairs = pairs(&mut random, dtype, rank, i % 2 == 1);
            let image = image(dtype, &pairs).unwrap();
            let mut pages: Vec<u32> = (next_page..).take(image.pages_needed()).collect();
            pages.reverse();
            next_page += pages.len() as u32;
            let (slot, generation) = ((ranks.len() - 1 - i) as u32, 100 + i as u64);
            world.table.publish(&mut world.arena, slot, generation, &image, &pages).unwrap();
            world.adapters.push((SlotScale { slot, generation, scale: 1.0 }, pairs));
        }
        world
    }

    /// The batch's segments by the adapters' numbers and scales.
    pub(crate) fn work(&self, mix: &Mix) -> WorkList {
        let named: Vec<(Range<usize>, Vec<SlotScale>)> = mix
            .segments
            .iter()
            .map(|(rows, used)| {
                let used = used.iter().map(|&(n, scale)| SlotScale { scale, ..self.adapters[n].0 });
                (rows.clone(), used.collect())
            })
            .collect();
        let mut work = WorkList::default();
        let segments = named.iter().map(|(rows, adapters)| Segment { rows: rows.clone(), adapters });
        work.build(&self.table, segments).unwrap();
        work
    }
}

fn pairs(random: &mut Random, dtype: Dtype, rank: usize, partial: bool) -> Vec<Pair> {
    let all = [Slice::Q, Slice::K, Slice::V, Slice::O, Slice::Gate, Slice::Up, Slice::Down];
    let kept = all.into_iter().filter(|slice| !(partial && matches!(slice, Slice::V | Slice::Up)));
    kept.map(|slice| {
        let rank = if partial && matches!(slice, Slice::K | Slice::Gate) { rank / 2 + 1 } else { rank };
        let (d_in, d_out) = extents(slice);
        let mut rounded = |n| random.values(n).into_iter().map(|v| dtype.round(v)).collect();
        Pair { slice, rank, scale: 2.0 / rank as f32, a: rounded(rank * d_in), b: rounded(d_out * rank) }
    })
    .collect()
}

/// An image with `pairs` in both layers, so that a wrong layer shows by its other scale.
pub(crate) fn image(dtype: Dtype, pairs: &[Pair]) -> Result<AdapterImage, OpError> {
    let part = |(layer, pair): (usize, _)| {
        let Pair { slice, rank, scale, a, b }: &Pair = pair;
        let (d_in, d_out) = extents(*slice);
        let scale = if layer == LAYER { *scale } else { 77.0 };
        LoraPart { layer, slice: *slice, rank: *rank, a, b, d_in, d_out, scale }
    };
    let both = (0..LAYERS).flat_map(|layer| pairs.iter().map(move |pair| (layer, pair)));
    let parts: Vec<LoraPart> = both.map(part).collect();
    AdapterImage::pack(dtype, PAGE_BYTES, LAYERS, &parts)
}

/// Numbers of adapters and the scales they run at.
type Used = Vec<(usize, f32)>;

/// Which rows use which adapters.
pub(crate) struct Mix {
    pub(crate) name: &'static str,
    pub(crate) rows: usize,
    pub(crate) segments: Vec<(Range<usize>, Used)>,
}

impl Mix {
    /// `runs`: rows and `(adapter, scale)` of each segment, in order.
    fn new(name: &'static str, runs: impl IntoIterator<Item = (usize, Used)>) -> Self {
        let mut rows = 0;
        let segments = runs.into_iter().map(|(count, used)| {
            rows += count;
            (rows - count..rows, used)
        });
        let segments = segments.collect();
        Self { name, rows, segments }
    }

    /// The adapters of a row.
    pub(crate) fn adapters_of(&self, row: usize) -> &[(usize, f32)] {
        self.segments.iter().find(|(rows, _)| rows.contains(&row)).map_or(&[], |(_, used)| used)
    }
}

/// The popularity mixes of Punica's tests, and what breaks indices: base rows, empty segments, several adapters a row.
pub(crate) fn mixes() -> Vec<Mix> {
    let one = |n: usize| vec![(n, 1.0)];
    vec![
        Mix::new("distinct", (0..7).map(|n| (1, one(n)))),
        Mix::new("uniform", [(3, one(3)), (3, one(0)), (2, one(5))]),
        Mix::new("zipf", [(13, one(2)), (6, one(1)), (4, one(4)), (1, one(6)), (1, one(0))]),
        Mix::new("identical", [(61, one(3))]),
        Mix::new("skewed", [(21, one(4)), (1, one(2)), (1, one(1))]),
        Mix::new("with base rows", [(2, vec![]), (5, one(2)), (1, vec![]), (1, one(3)), (3, vec![])]),
        Mix::new("empty segments", [(0, one(1)), (4, one(5)), (0, vec![]), (0, one(2)), (2, one(0)), (0, one(3))]),
        Mix::new(
            "several a row",
            [(3, vec![(0, 0.5), (3, -1.5), (0, 2.0)]), (1, one(1)), (7, vec![(6, 0.25), (1, 1.0)])],
        ),
        Mix::new(
            "prompts and tokens",
            [
                (1, one(1)),
                (130, one(3)),
                (2, vec![]),
                (9, vec![(2, 1.0), (4, 0.5)]),
                (1, one(0)),
                (75, one(6)),
                (1, one(2)),
            ],
        ),
        Mix::new("base only", [(4, vec![])]),
    ]
}

/// Activations of a site for a mix.
pub(crate) fn activations(seed: u64, mix: &Mix, site: &LoraSite) -> (Rows, Rows) {
    let mut random = Random::new(seed);
    let width = site.cols.iter().map(|(_, d_out)| d_out).sum();
    (random.rows(mix.rows, site.d_in), random.rows(mix.rows, width))
}
