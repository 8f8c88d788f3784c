//! Tier A: the products and the LoRA kernels of each site of a layer, one by one, in graphs of many launches. What they
//! read goes round more memory than the cache has.

use std::rc::Rc;

use anyhow::ensure;
use loramux_kernels::RANK_BLOCK;
use loramux_kernels::cuda::{ExpandAddKernel, ShrinkKernel};
use loramux_kernels::device::lora::{DECODE_TILE_ROWS, SiteShape, SiteWork};
use loramux_kernels::device::step::{BlockDesc, LoraItem, RowTile, StepCounts};
use loramux_kernels::device::{
    Device, DeviceBuffer, DeviceError, Elem, Event, GemmOut, GemmShape, Priority, SharedDevice, Stream, probe,
};
use loramux_models::DecoderSpec;

use super::{Setting, Times};
use crate::doctor::report::{Section, Status};

/// Memory that rotating operands fill: several times what a GPU's cache holds.
const ROTATED_BYTES: usize = 256 << 20;

/// One site: matrices that share an input.
struct SiteWidths {
    name: &'static str,
    d_in: usize,
    /// First column and outputs of each matrix.
    cols: Vec<(usize, usize)>,
}

impl SiteWidths {
    fn d_out(&self) -> usize {
        self.cols.iter().map(|(_, outputs)| outputs).sum()
    }
}

fn sites(spec: &DecoderSpec) -> [SiteWidths; 4] {
    let (hidden, wide) = (spec.hidden, spec.intermediate);
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    [
        SiteWidths { name: "qkv", d_in: hidden, cols: vec![(0, q), (q, kv), (q + kv, kv)] },
        SiteWidths { name: "output", d_in: q, cols: vec![(0, hidden)] },
        SiteWidths { name: "gate_up", d_in: hidden, cols: vec![(0, wide), (wide, wide)] },
        SiteWidths { name: "down", d_in: wide, cols: vec![(0, hidden)] },
    ]
}

/// How much is measured.
struct Grid {
    product_rows: &'static [usize],
    lora_rows: &'static [usize],
    ranks: &'static [usize],
    rotated_bytes: usize,
    /// Launches in a graph: as many as there are copies to go round, within these.
    launches: (usize, usize),
    replays: usize,
}

/// A device and what times it.
struct Bench {
    device: SharedDevice,
    stream: Stream,
    start: Event,
    end: Event,
    elem: Elem,
    grid: Grid,
}

/// Measures every site.
pub(super) fn measure(setting: &Setting, elem: Elem, sections: &mut Vec<Section>) -> anyhow::Result<()> {
    let device = setting.device;
    let grid = if setting.is_emulated {
        let (product_rows, lora_rows, ranks): (&[_], &[_], &[_]) = (&[1, 3], &[1, 9], &[16]);
        Grid { product_rows, lora_rows, ranks, rotated_bytes: 1 << 16, launches: (2, 4), replays: 2 }
    } else {
        Grid {
            product_rows: &[1, 8, 16, 32, 64, 128, 256, 2048],
            lora_rows: &[1, 8, 64, 256],
            ranks: &[8, 16, 64],
            rotated_bytes: ROTATED_BYTES,
            launches: (20, 2048),
            replays: 50,
        }
    };
    let bench = Bench {
        stream: device.stream(Priority::High)?,
        start: device.timed_event()?,
        end: device.timed_event()?,
        device: Rc::clone(device),
        elem,
        grid,
    };
    let spec = setting.model.spec()?;
    let mut section = Section::new("products");
    for site in &sites(&spec) {
        bench.products(setting, site.name, (site.d_out(), site.d_in), GemmOut::Elem, &mut section)?;
    }
    let head = (spec.vocab.next_multiple_of(16), spec.hidden);
    bench.products(setting, "head", head, GemmOut::F32, &mut section)?;
    sections.push(section);
    let mut section = Section::new("LoRA kernels of decodes");
    for site in &sites(&spec) {
        for &rows in bench.grid.lora_rows {
            for &rank in bench.grid.ranks {
                // One adapter for each row, and one for all.
                for adapters in if rows == 1 { vec![1] } else { vec![rows, 1] } {
                    if setting.has_time(&mut section, site.name) {
                        bench.lora(setting, site, (rows, rank, adapters), &mut section)?;
                    }
                }
            }
        }
    }
    sections.push(section);
    Ok(())
}

impl Bench {
    fn products(
        &self,
        setting: &Setting,
        name: &str,
        (d_out, d_in): (usize, usize),
        out: GemmOut,
        section: &mut Section,
    ) -> anyhow::Result<()> {
        let copies = self.copies(d_out * d_in * 2);
        let weights = probe::random(&self.device, self.stream, self.elem, copies * d_out * d_in)?;
        for &rows in self.grid.product_rows {
            if !setting.has_time(section, name) {
                return Ok(());
            }
            let x = probe::random(&self.device, self.stream, self.elem, rows * d_in)?;
            let out_bytes = if out == GemmOut::F32 { 4 } else { 2 };
            let y = DeviceBuffer::new(&self.device, rows * d_out * out_bytes)?;
            let plan = self.device.gemm_plan(GemmShape { rows, d_out, d_in, elem: self.elem, out })?;
            let times = self.time(copies, |turn| {
                let weight = weights.address() + (turn % copies * d_out * d_in * 2) as u64;
                // SAFETY: the buffers are what the plan's shape says, and live until the times have come.
                unsafe { self.device.gemm(self.stream, plan, y.address(), x.address(), weight) }
            })?;
            let bytes = 2 * d_out * d_in + 2 * rows * d_in + out_bytes * rows * d_out;
            let flop = 2 * rows * d_out * d_in;
            push(setting, section, format!("{name} {rows} x {d_out} x {d_in}"), &times, (bytes, flop))
                .field("kind", "product")
                .field("site", name)
                .field("rows", rows)
                .field("d_out", d_out)
                .field("d_in", d_in);
        }
        Ok(())
    }

    /// Copies of an operand that fill the memory to go round.
    fn copies(&self, bytes: usize) -> usize {
        self.grid.rotated_bytes.div_ceil(bytes.max(1)).clamp(1, 4096)
    }

    fn lora(
        &self,
        setting: &Setting,
        site: &SiteWidths,
        (rows, rank, adapters): (usize, usize, usize),
        section: &mut Section,
    ) -> anyhow::Result<()> {
        let lists = LoraLists::new(self, site, rows, rank, adapters)?;
        let shape = SiteShape { d_in: site.d_in, cols: &site.cols, tile_rows: DECODE_TILE_ROWS };
        let shrink = ShrinkKernel::load(&*self.device, self.elem, shape, lists.items)?;
        let expand = ExpandAddKernel::load(&*self.device, self.elem, shape, lists.tiles)?;
        let (x, y) = (&lists.x, &lists.y);
        let blocks = rank.div_ceil(RANK_BLOCK) * RANK_BLOCK * adapters;
        let name = |kernel: &str| format!("{} {kernel}, {rows} rows, {adapters} x r{rank}", site.name);
        let times = self.time(lists.copies, |turn| {
            // SAFETY: the lists name rows and blocks that are there; the buffers live until the times have come.
            unsafe { shrink.launch(&*self.device, self.stream, &lists.work(turn), x.address(), site.d_in) }
        })?;
        let slices = site.cols.len();
        let (bytes, flop) = (2 * site.d_in * (blocks * slices + rows), 2 * rows * site.d_in * rank * slices);
        let line = push(setting, section, name("shrink"), &times, (bytes, flop));
        line.field("kind", "lora_shrink").field("site", site.name).field("rows", rows);
        line.field("rank", rank).field("adapters", adapters);
        let times = self.time(lists.copies, |turn| {
            // SAFETY: as above; the tiles between shrink and expand were written by the launches before.
            unsafe { expand.launch(&*self.device, self.stream, &lists.work(turn), y.address(), site.d_out()) }
        })?;
        let (bytes, flop) = (2 * site.d_out() * (blocks + 2 * rows), 2 * rows * site.d_out() * rank);
        let line = push(setting, section, name("expand"), &times, (bytes, flop));
        line.field("kind", "lora_expand_add").field("site", site.name).field("rows", rows);
        line.field("rank", rank).field("adapters", adapters);
        Ok(())
    }

    /// Times of one launch, from replays of a graph in which each launch takes the next copy of its operands.
    fn time(&self, copies: usize, launch: impl Fn(usize) -> Result<(), DeviceError>) -> anyhow::Result<Times> {
        let (device, stream) = (&*self.device, self.stream);
        let launches = copies.clamp(self.grid.launches.0, self.grid.launches.1);
        launch(0)?; // loads what is loaded at the first launch, which a capture must not
        self.wait()?;
        device.begin_capture(stream)?;
        let launched = (0..launches).try_for_each(&launch);
        let graph = device.end_capture(stream)?;
        launched?;
        let mut us = Vec::with_capacity(self.grid.replays);
        for run in 0..=self.grid.replays {
            device.record(self.start, stream)?;
            // SAFETY: the caller's buffers live until this function returns, which waits for every replay.
            unsafe { device.replay(stream, graph)? };
            device.record(self.end, stream)?;
            device.synchronize(self.end)?;
            if run > 0 {
                us.push(f64::from(device.elapsed_ms(self.start, self.end)?) * 1e3 / launches as f64);
            }
        }
        ensure!(us.iter().all(|us| us.is_finite() && *us > 0.0), "a time of zero was measured");
        Ok(Times::new(us))
    }

    fn wait(&self) -> Result<(), DeviceError> {
        let event: Event = self.device.event()?;
        Device::record(&*self.device, event, self.stream)?;
        self.device.synchronize(event)
    }
}

/// A line with rates over counted bytes and operations.
fn push<'a>(
    setting: &Setting,
    section: &'a mut Section,
    name: String,
    times: &Times,
    (bytes, flop): (usize, usize),
) -> &'a mut super::Line {
    let seconds = times.at(0.5) / 1e6;
    let (bandwidth, rate) = (bytes as f64 / seconds, flop as f64 / seconds);
    let bound = (bytes as f64 / setting.ceilings.bytes_per_s).max(flop as f64 / setting.ceilings.flop_per_s);
    let text = format!(
        "{:9.2} us p50 {:9.2} p99 {:8.1} GB/s {:8.2} TFLOP/s  {:5.1} % of what the device reaches",
        times.at(0.5),
        times.at(0.99),
        bandwidth / 1e9,
        rate / 1e12,
        100.0 * bound / seconds
    );
    let line = section.push(Status::Info, name, text);
    times.fields(line);
    line.field("gb_per_s", bandwidth / 1e9).field("tflop_per_s", rate / 1e12).field("ceiling_part", bound / seconds)
}

/// The lists of a step and adapters of random numbers, as often as needed to go round the memory.
struct LoraLists {
    tiles: usize,
    items: usize,
    x: DeviceBuffer,
    y: DeviceBuffer,
    v: DeviceBuffer,
    row_tiles: DeviceBuffer,
    lora_items: DeviceBuffer,
    counts: DeviceBuffer,
    descs: DeviceBuffer,
    arena: DeviceBuffer,
    slices: usize,
    /// Descriptors of one copy of all adapters, and how many copies there are.
    copy_descs: usize,
    copies: usize,
}

impl LoraLists {
    fn new(bench: &Bench, site: &SiteWidths, rows: usize, rank: usize, adapters: usize) -> Result<Self, DeviceError> {
        let (device, stream, slices) = (&bench.device, bench.stream, site.cols.len());
        let per_adapter = rank.div_ceil(RANK_BLOCK);
        // Bytes of one rank block of all matrices: A `[16][d_in]` and B `[d_out][16]` of each.
        let unit = |values: usize| (values * RANK_BLOCK * 2).next_multiple_of(256);
        let block_bytes: usize = site.cols.iter().map(|(_, outputs)| unit(site.d_in) + unit(*outputs)).sum();
        let block_rows = adapters * per_adapter;
        let copies = bench.copies(block_rows * block_bytes);
        let mut descs = Vec::with_capacity(copies * block_rows * slices);
        let mut at = 0;
        for _ in 0..copies * block_rows {
            for (_, outputs) in &site.cols {
                let (a_unit, b_unit) = ((at / 256) as u32, ((at + unit(site.d_in)) / 256) as u32);
                descs.push(BlockDesc { a_unit, b_unit, scale: 0.01, vectors: 0 });
                at += unit(site.d_in) + unit(*outputs);
            }
        }
        let (mut tiles, mut items) = (Vec::new(), Vec::new());
        for adapter in 0..adapters {
            let (first, end) = (adapter * rows / adapters, (adapter + 1) * rows / adapters);
            for first_row in (first..end).step_by(DECODE_TILE_ROWS) {
                let (first_row, row_count) = (first_row as u32, (end - first_row).min(DECODE_TILE_ROWS) as u32);
                let (first_item, item_count) = (items.len() as u32, per_adapter as u32);
                tiles.push(RowTile { first_row, row_count, first_item, item_count });
                let block_row = |block| (adapter * per_adapter + block) as u32;
                let item = |block| LoraItem { block_row: block_row(block), first_row, row_count, scale: 1.0 };
                items.extend((0..per_adapter).map(item));
            }
        }
        let counts = StepCounts {
            rows: rows as u32,
            lora_items: items.len() as u32,
            row_tiles: tiles.len() as u32,
            ..StepCounts::default()
        };
        let shape = SiteShape { d_in: site.d_in, cols: &site.cols, tile_rows: DECODE_TILE_ROWS };
        Ok(Self {
            tiles: tiles.len(),
            items: items.len(),
            x: probe::random(device, stream, bench.elem, rows * site.d_in)?,
            y: probe::random(device, stream, bench.elem, rows * site.d_out())?,
            v: DeviceBuffer::new(device, shape.v_bytes(items.len()))?,
            row_tiles: DeviceBuffer::of(device, stream, &tiles)?,
            lora_items: DeviceBuffer::of(device, stream, &items)?,
            counts: DeviceBuffer::of(device, stream, &[counts])?,
            descs: DeviceBuffer::of(device, stream, &descs)?,
            arena: probe::random(device, stream, bench.elem, at / 2)?,
            slices,
            copy_descs: block_rows * slices,
            copies,
        })
    }

    /// The site's work under one copy of the adapters.
    fn work(&self, turn: usize) -> SiteWork {
        let first = turn % self.copies * self.copy_descs;
        SiteWork {
            v: self.v.address(),
            tiles: self.row_tiles.address(),
            items: self.lora_items.address(),
            counts: self.counts.address(),
            descs: self.descs.address() + (first * size_of::<BlockDesc>()) as u64,
            arena: self.arena.address(),
            desc_stride: self.slices as u32,
            desc_first: 0,
            slices: self.slices as u32,
            reserved: 0,
        }
    }
}
