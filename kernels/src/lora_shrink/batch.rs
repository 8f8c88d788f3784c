//! Adapters and batches for the checks of the LoRA kernels: mixed ranks, matrices left alone, compositions and rows of the
//! base model, in an arena that holds NaN wherever no kernel may read.

use crate::device::check::{CheckError, Checker, Random};
use crate::device::lora::{SiteShape, SiteWork, splits};
use crate::device::step::{BlockDesc, LoraItem, NOT_TARGETED, RowTile, StepCounts};
use crate::device::{DeviceBuffer, Elem};
use crate::lora::RANK_BLOCK;

use super::cuda::ShrinkKernel;

/// Elements of an arena unit.
const UNIT: usize = 128;

/// Rank of each adapter, and which of a site's matrices it targets, as bits.
const ADAPTERS: &[(usize, u32)] = &[(16, 0b111), (8, 0b001), (40, 0b101), (33, 0b110), (1, 0b111), (64, 0b011)];

/// Rows in a row of the batch that use the same adapters.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) rows: usize,
    pub(crate) adapters: Vec<usize>,
    pub(crate) scale: f32,
}

/// Rows of the batches that the checks compute.
pub(crate) fn mixes(tile_rows: usize) -> Vec<Vec<Run>> {
    let run = |rows, adapters: &[usize], scale| Run { rows, adapters: adapters.to_vec(), scale };
    let long = tile_rows + tile_rows / 8 + 2; // a full tile and one that ends inside a group of 8
    vec![
        vec![],
        vec![run(3, &[], 1.0)],
        vec![run(1, &[2], 1.5)],
        vec![
            run(1, &[0], 1.0),
            run(1, &[5], 0.5),
            run(2, &[], 1.0),
            run(3, &[2, 0], 2.0),
            run(long, &[3], 1.0),
            run(1, &[1], -1.0),
            run(tile_rows, &[4, 1, 3], 0.25),
            run(1, &[], 1.0),
        ],
    ]
}

/// Resident adapters of one site.
pub(crate) struct Site<'a> {
    pub(crate) checker: &'a Checker,
    pub(crate) elem: Elem,
    pub(crate) shape: SiteShape<'a>,
    arena: Vec<u16>,
    descs: Vec<BlockDesc>,
    desc_stride: usize,
    desc_first: usize,
    /// Rows of the descriptor table of each adapter.
    blocks: Vec<Vec<u32>>,
    on_device: (DeviceBuffer, DeviceBuffer),
}

impl<'a> Site<'a> {
    /// Packs [`ADAPTERS`] with random values.
    pub(crate) fn new(checker: &'a Checker, elem: Elem, shape: SiteShape<'a>) -> Result<Self, CheckError> {
        let mut random = Random::new(shape.d_in as u64);
        let mut rows: Vec<u32> = (0..32).collect();
        for i in (1..rows.len()).rev() {
            rows.swap(i, random.below(i + 1));
        }
        // Other layers' and sites' descriptors lie around the site's own and point at NaN.
        let (desc_stride, desc_first) = (shape.cols.len() + 4, 3);
        let nan = BlockDesc { a_unit: 0, b_unit: 0, scale: f32::NAN, vectors: 1 };
        let mut descs = vec![nan; rows.len() * desc_stride];
        let mut arena = vec![0xffff; UNIT];
        let mut blocks = Vec::new();
        for (adapter, &(rank, targets)) in ADAPTERS.iter().enumerate() {
            let own: Vec<u32> = rows.drain(..rank.div_ceil(RANK_BLOCK)).collect();
            for (i, &block_row) in own.iter().enumerate() {
                let ranks = (rank - i * RANK_BLOCK).min(RANK_BLOCK);
                for (slice, &(_, d_out)) in shape.cols.iter().enumerate() {
                    // A site with one matrix would otherwise be left alone by some adapters in all their rows.
                    let targeted = shape.cols.len() == 1 || targets >> slice & 1 == 1;
                    let desc = if targeted {
                        let a: Vec<u16> = random.elems(elem, ranks * shape.d_in, 1.0);
                        let mut b = random.elems(elem, d_out * RANK_BLOCK, 0.5);
                        b.chunks_mut(RANK_BLOCK).for_each(|row| row[ranks..].fill(0));
                        let a_unit = push(&mut arena, a, RANK_BLOCK * shape.d_in);
                        let b_unit = push(&mut arena, b, d_out * RANK_BLOCK);
                        BlockDesc { a_unit, b_unit, scale: 0.25 + 0.5 * random.uniform().abs(), vectors: 0 }
                    } else {
                        BlockDesc::ABSENT
                    };
                    // Every other adapter has gains and shifts, and one of them on a matrix that it leaves alone.
                    let has_vectors = i == 0 && adapter % 2 == 0 && (slice != 1 || adapter == 2);
                    let vectors = match has_vectors {
                        true => 1 + push_vectors(&mut arena, &mut random, d_out),
                        false => 0,
                    };
                    descs[block_row as usize * desc_stride + desc_first + slice] = BlockDesc { vectors, ..desc };
                }
            }
            blocks.push(own);
        }
        arena.truncate(arena.len() - UNIT); // the arena ends with a block, so that a sanitizer sees reads behind it
        let on_device = (checker.buffer(&arena)?, checker.buffer(&descs)?);
        Ok(Self { checker, elem, shape, arena, descs, desc_stride, desc_first, blocks, on_device })
    }

    /// The descriptor, or none if the item leaves the matrix alone.
    pub(crate) fn desc(&self, item: &LoraItem, slice: usize) -> Option<BlockDesc> {
        let desc = self.descs[item.block_row as usize * self.desc_stride + self.desc_first + slice];
        (desc.a_unit != NOT_TARGETED).then_some(desc)
    }

    /// Gains and shifts, `[2][d_out]`, of an item's adapter if its first rank block is this one and it has any.
    pub(crate) fn vectors(&self, item: &LoraItem, slice: usize) -> Option<Vec<f32>> {
        let desc = self.descs[item.block_row as usize * self.desc_stride + self.desc_first + slice];
        let unit = desc.vectors.checked_sub(1)? as usize;
        let halves = &self.arena[unit * UNIT..][..4 * self.shape.cols[slice].1];
        let value = |half: &[u16; 2]| f32::from_bits(u32::from(half[0]) | u32::from(half[1]) << 16);
        Some(halves.as_chunks::<2>().0.iter().map(value).collect())
    }

    /// `A[rank][k]` of a block.
    pub(crate) fn a(&self, desc: &BlockDesc, rank: usize) -> impl Iterator<Item = f64> {
        let d_in = self.shape.d_in;
        let row = &self.arena[desc.a_unit as usize * UNIT + rank * d_in..][..d_in];
        row.iter().map(|&bits| f64::from(self.elem.from_bits(bits)))
    }

    /// `B[output]` of a block: its 16 ranks.
    pub(crate) fn b(&self, desc: &BlockDesc, output: usize) -> impl Iterator<Item = f64> {
        let row = &self.arena[desc.b_unit as usize * UNIT + output * RANK_BLOCK..][..RANK_BLOCK];
        row.iter().map(|&bits| f64::from(self.elem.from_bits(bits)))
    }

    /// Work lists of a batch.
    pub(crate) fn batch(&'a self, runs: &[Run]) -> Result<Batch<'a>, CheckError> {
        let (mut tiles, mut items) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for run in runs {
            for start in (0..run.rows).step_by(self.shape.tile_rows) {
                let row_count = (run.rows - start).min(self.shape.tile_rows) as u32;
                let first_item = items.len() as u32;
                for &block_row in run.adapters.iter().flat_map(|&adapter| &self.blocks[adapter]) {
                    items.push(LoraItem { block_row, first_row: first_row as u32, row_count, scale: run.scale });
                }
                let item_count = items.len() as u32 - first_item;
                tiles.push(RowTile { first_row: first_row as u32, row_count, first_item, item_count });
                first_row += row_count as usize;
            }
        }
        Batch::new(self, first_row, tiles, items)
    }
}

/// Adds gains and shifts of `d_out` outputs, then a unit of NaN; returns their unit.
fn push_vectors(arena: &mut Vec<u16>, random: &mut Random, d_out: usize) -> u32 {
    let values = (0..2 * d_out).map(|_| random.uniform().to_bits());
    let halves: Vec<u16> = values.flat_map(|bits| [bits as u16, (bits >> 16) as u16]).collect();
    let elements = halves.len().next_multiple_of(UNIT);
    push(arena, halves, elements)
}

/// Adds a block that is filled up with zeros (whole units, as its extents are multiples of 16), then a unit of NaN.
fn push(arena: &mut Vec<u16>, mut block: Vec<u16>, elements: usize) -> u32 {
    block.resize(elements, 0);
    let unit = arena.len() / UNIT;
    arena.append(&mut block);
    arena.resize(arena.len() + UNIT, 0xffff);
    unit as u32
}

/// A step's lists and the workspace between the two halves.
pub(crate) struct Batch<'a> {
    site: &'a Site<'a>,
    pub(crate) rows: usize,
    pub(crate) tiles: Vec<RowTile>,
    pub(crate) items: Vec<LoraItem>,
    lists: (DeviceBuffer, DeviceBuffer, DeviceBuffer),
    pub(crate) v: DeviceBuffer,
}

impl<'a> Batch<'a> {
    fn new(site: &'a Site<'a>, rows: usize, tiles: Vec<RowTile>, items: Vec<LoraItem>) -> Result<Self, CheckError> {
        let checker = site.checker;
        let counts = StepCounts {
            rows: rows as u32,
            lora_items: items.len() as u32,
            row_tiles: tiles.len() as u32,
            ..StepCounts::default()
        };
        // One entry more than the counts say: whoever walks too far finds work there and leaves a trace.
        let more_items: Vec<_> =
            items.iter().copied().chain([LoraItem { row_count: 1, ..LoraItem::default() }]).collect();
        let more = RowTile { row_count: 1, item_count: 1, ..RowTile::default() };
        let more_tiles: Vec<_> = tiles.iter().copied().chain([more]).collect();
        let lists = (checker.buffer(&more_tiles)?, checker.buffer(&more_items)?, checker.buffer(&[counts])?);
        let v = checker.poisoned(site.shape.v_bytes(items.len() + 1))?;
        Ok(Self { site, rows, tiles, items, lists, v })
    }

    /// What the kernels get.
    pub(crate) fn work(&self) -> SiteWork {
        SiteWork {
            v: self.v.address(),
            tiles: self.lists.0.address(),
            items: self.lists.1.address(),
            counts: self.lists.2.address(),
            descs: self.site.on_device.1.address(),
            arena: self.site.on_device.0.address(),
            desc_stride: self.site.desc_stride as u32,
            desc_first: self.site.desc_first as u32,
            slices: self.site.shape.cols.len() as u32,
            reserved: 0,
        }
    }

    /// Where `V[item][slice][split][row]` begins in `v`, elements.
    pub(crate) fn v_at(&self, item: usize, slice: usize, split: usize, row: usize) -> usize {
        let shape = &self.site.shape;
        let tile = (item * shape.cols.len() + slice) * splits(shape.d_in) + split;
        (tile * shape.tile_rows + row) * RANK_BLOCK
    }

    /// Inputs `[rows][stride]`: NaN in rows without items and behind `d_in`.
    pub(crate) fn inputs(&self, stride: usize, seed: u64) -> Vec<u16> {
        let mut random = Random::new(seed);
        let mut x = vec![0xffff; self.rows * stride];
        for row in self.tiles.iter().filter(|tile| tile.item_count > 0).flat_map(rows_of) {
            let values = random.elems(self.site.elem, self.site.shape.d_in, 1.0);
            x[row * stride..][..values.len()].copy_from_slice(&values);
        }
        x
    }

    /// `sum over k of x[row][k] * A[rank][k]` for the 16 ranks, and the same of absolute values, in double precision.
    pub(crate) fn products(&self, desc: &BlockDesc, x_row: &[u16]) -> Vec<(f64, f64)> {
        let x: Vec<f64> = x_row.iter().map(|&bits| f64::from(self.site.elem.from_bits(bits))).collect();
        let of_rank = |rank| {
            let terms = self.site.a(desc, rank).zip(&x).map(|(a, x)| a * x);
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
        };
        (0..RANK_BLOCK).map(of_rank).collect()
    }
}

/// What the items of a batch hand to the expand: `[item][slice][row of the tile][16]`, summed over splits, scaled and
/// rounded as the kernels must.
pub(crate) struct Deltas(Vec<f64>);

impl Batch<'_> {
    /// Fills V with random values, NaN wherever the shrink writes nothing.
    pub(crate) fn random_v(&self, seed: u64) -> Result<Deltas, CheckError> {
        let (site, shape) = (self.site, &self.site.shape);
        let splits = splits(shape.d_in);
        let mut random = Random::new(seed);
        let mut v = vec![f32::NAN; self.v.bytes() / 4];
        let mut deltas = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            for slice in 0..shape.cols.len() {
                let scale = site.desc(item, slice).map(|desc| item.scale * desc.scale);
                for row in 0..shape.tile_rows {
                    let mut sums = [0.0; RANK_BLOCK];
                    for split in (0..splits).filter(|_| scale.is_some() && row < item.row_count as usize) {
                        let at = self.v_at(index, slice, split, row);
                        for (v, sum) in v[at..].iter_mut().zip(&mut sums) {
                            *v = random.uniform();
                            *sum += *v;
                        }
                    }
                    let rounded = |sum: f32| site.elem.from_bits(site.elem.to_bits(sum * scale.unwrap_or(0.0)));
                    deltas.extend(sums.map(|sum| f64::from(rounded(sum))));
                }
            }
        }
        self.v.write(site.checker.stream, 0, &v)?;
        Ok(Deltas(deltas))
    }

    /// What the items of a tile add to one output of one of its rows, and the sum of the absolute terms. None if no item
    /// targets the slice.
    pub(crate) fn delta(
        &self,
        deltas: &Deltas,
        tile: &RowTile,
        slice: usize,
        row: usize,
        output: usize,
    ) -> Option<(f64, f64)> {
        let shape = &self.site.shape;
        let mut delta = None;
        for index in tile.first_item as usize..(tile.first_item + tile.item_count) as usize {
            let Some(desc) = self.site.desc(&self.items[index], slice) else { continue };
            let row = row - tile.first_row as usize;
            let v =
                &deltas.0[((index * shape.cols.len() + slice) * shape.tile_rows + row) * RANK_BLOCK..][..RANK_BLOCK];
            let terms = self.site.b(&desc, output).zip(v).map(|(b, v)| b * v);
            let before = delta.unwrap_or((0.0, 0.0));
            delta = Some(terms.fold(before, |(sum, size), term| (sum + term, size + term.abs())));
        }
        delta
    }

    /// Fills V from inputs `[rows][stride]`.
    pub(crate) fn shrink(&self, x: &[u16], stride: usize) -> Result<(), CheckError> {
        let (site, checker) = (self.site, self.site.checker);
        let kernel = ShrinkKernel::load(&*checker.device, site.elem, site.shape, self.items.len())?;
        let x = checker.buffer(x)?;
        // SAFETY: the lists are this batch's own; x has its rows of `stride` elements and lives until the launch is done.
        unsafe { kernel.launch(&*checker.device, checker.stream, &self.work(), x.address(), stride)? };
        Ok(checker.wait()?)
    }
}

/// The rows of a tile.
pub(crate) fn rows_of(tile: &RowTile) -> std::ops::Range<usize> {
    tile.first_row as usize..(tile.first_row + tile.row_count) as usize
}
