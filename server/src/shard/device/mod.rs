//! The shard on a device: a GPU, or the host emulator in tests. The same steps as on the CPU, given to the device without
//! waiting for it, and their results read when they have come.

mod adapters;
mod bundle;
mod engine;
mod flight;
mod graphs;
mod lists;
mod load;
mod lora;
mod ops;
mod sampling;
mod sequence;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use loramux_kernels::cuda::{SampleOut, TOP_MAX, TopLogprob};
use loramux_kernels::device::step::BLOCK_TOKENS;
use loramux_kernels::device::{DeviceBuffer, Event, HostBuffer};
use loramux_proto::{Info, Step, StepResult};

use self::adapters::{ArenaPlace, DeviceAdapters};
use self::bundle::{Bundles, List};
use self::engine::Engine;
use self::flight::{Flight, Landing, PooledChunk};
use self::graphs::Graphs;
use self::lists::{ListLimits, Lists};
use self::ops::{Shape, StepOps};
use self::sampling::SampleLists;
use self::sequence::DeviceSequence;
use super::Execute;
use super::batch::{LogitRow, Want};
use super::run::ShardFault;
use super::slab::Slab;

/// Steps that the device may have been given and not finished.
const DEPTH: usize = 2;

/// Executes steps on a device.
pub(super) struct DeviceExecutor {
    engine: Engine,
    bundles: Bundles,
    graphs: Graphs,
    adapters: DeviceAdapters,
    arena: DeviceBuffer,
    place: ArenaPlace,
    slab: Arc<Slab>,
    sequences: HashMap<u64, DeviceSequence>,
    free_slots: Vec<u32>,
    lists: Lists,
    samples: SampleLists,
    list_limits: ListLimits,
    /// A block that no sequence has: where padding rows write.
    trash_block: u32,
    flights: VecDeque<Flight>,
    landings: Vec<Landing>,
    /// Set behind the last step that was launched.
    launched: Option<Event>,
    /// Page-locked memory of the slab.
    _pool: Option<HostBuffer<u8>>,
    info: Info,
}

impl Execute for DeviceExecutor {
    fn info(&self) -> &Info {
        &self.info
    }

    fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn submit(&mut self, step: &Step) -> Result<(), ShardFault> {
        let started = Instant::now();
        for seq in &step.finishes {
            if let Some(seq) = self.sequences.remove(seq) {
                self.free_slots.push(seq.slot);
            }
        }
        self.copy_blocks(step)?;
        let uploaded = self.upload(step)?;
        for start in &step.starts {
            let full = || ShardFault::Malformed("more sequences than the shard was made for".into());
            let slot = self.free_slots.pop().ok_or_else(full)?;
            self.sequences.insert(start.seq, DeviceSequence::new(start, slot));
        }
        let landing = match self.landings.pop() {
            Some(landing) => landing,
            None => return Err(ShardFault::Malformed(format!("more than {DEPTH} steps at a time"))),
        };
        let mut flight = Flight {
            id: step.id,
            rows: Vec::new(),
            refused: Vec::new(),
            pooled: Vec::new(),
            uploaded,
            landing,
            started,
        };
        if !step.chunks.is_empty() {
            self.launch(step, &mut flight)?;
        }
        self.engine.device.record(flight.landing.landed, self.engine.stream)?;
        self.flights.push_back(flight);
        Ok(())
    }

    fn poll(&mut self, wait: bool) -> Result<Option<StepResult>, ShardFault> {
        let Some(flight) = self.flights.front() else { return Ok(None) };
        let landed = flight.landing.landed;
        if wait {
            self.engine.device.synchronize(landed)?;
        } else if !self.engine.device.is_done(landed)? {
            return Ok(None);
        }
        let Some(flight) = self.flights.pop_front() else { return Ok(None) };
        self.land(flight).map(Some)
    }

    fn graph_nodes(&self, rows: usize, adapters: bool) -> Option<usize> {
        let (_, graph) = self.graphs.find(rows, adapters)?;
        Some(self.engine.device.graph_nodes(graph))
    }
}

impl Drop for DeviceExecutor {
    /// Whatever the device was given uses memory that goes away with this.
    fn drop(&mut self) {
        for stream in [self.engine.stream, self.engine.side, self.adapters.copy_stream()] {
            let device = &self.engine.device;
            let waited = device.event().and_then(|event| {
                device.record(event, stream)?;
                device.synchronize(event)
            });
            if waited.is_err() {
                return; // after a fault nothing runs any more
            }
        }
    }
}

impl DeviceExecutor {
    /// Copy-on-write, in the order of the list.
    fn copy_blocks(&mut self, step: &Step) -> Result<(), ShardFault> {
        let kv = self.engine.kv;
        for copy in &step.copies {
            if copy.src.max(copy.dst) >= self.list_limits.blocks_total {
                return Err(ShardFault::Malformed(format!("copy of block {} to {}", copy.src, copy.dst)));
            }
            if copy.src == copy.dst {
                continue;
            }
            let at = |block: u32| {
                let in_page = u64::from(block % kv.per_page) * u64::from(kv.block_bytes);
                self.arena.address() + u64::from(block / kv.per_page) * kv.page_bytes + in_page
            };
            let (to, from) = (at(copy.dst), at(copy.src));
            // SAFETY: both blocks are inside the arena and differ.
            unsafe { self.engine.device.copy(self.engine.stream, to, from, kv.block_bytes as usize)? };
        }
        Ok(())
    }

    /// Begins the step's uploads and publishes those of earlier steps that are done.
    fn upload(&mut self, step: &Step) -> Result<Vec<loramux_proto::SlotGeneration>, ShardFault> {
        for upload in &step.uploads {
            let unknown = || ShardFault::UnknownContent(upload.content_id.iter().map(|b| format!("{b:02x}")).collect());
            let image = self.slab.get(&upload.content_id).ok_or_else(unknown)?;
            self.adapters.begin(upload, image, self.place, self.launched)?;
        }
        self.adapters.publish(self.engine.stream)
    }

    /// Fills the lists, sends them and launches the step.
    fn launch(&mut self, step: &Step, flight: &mut Flight) -> Result<(), ShardFault> {
        self.lists.fill(step, &self.sequences, &self.adapters.table, &self.list_limits)?;
        let group_rows = self.engine.limits.logit_rows_max;
        self.samples.fill(
            &self.lists.logit_rows,
            &self.lists.masks,
            &self.sequences,
            (self.engine.spec.vocab, group_rows),
        )?;
        let with_adapters = !self.lists.items.is_empty();
        let one_pass = self.lists.passes.len() == 1 && self.lists.rows() <= group_rows;
        let graph = match self.lists.decode_only && one_pass && !self.lists.vectors {
            true => self.graphs.find(self.lists.rows(), with_adapters),
            false => None,
        };
        self.send(graph.map(|(bucket, _)| bucket), with_adapters)?;
        match graph {
            // SAFETY: the graph uses memory of this executor only, which lives as long as it.
            Some((_, graph)) => unsafe { self.engine.device.replay(self.engine.stream, graph)? },
            None => self.launch_eager(with_adapters, flight)?,
        }
        if graph.is_some() {
            self.download(flight, 0, self.lists.logit_rows.len())?;
        }
        self.download_states(step, flight)?;
        let launched = match self.launched.take() {
            // The copy stream was told to wait for what it held then: the event may be set anew.
            Some(event) => event,
            None => self.engine.device.event()?,
        };
        self.engine.device.record(launched, self.engine.stream)?;
        self.launched = Some(launched);
        flight.rows.clone_from(&self.lists.logit_rows);
        flight.refused.append(&mut self.samples.refused);
        for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
            if let Some(seq) = self.sequences.get_mut(&chunk.seq) {
                seq.pending += 1;
            }
        }
        Ok(())
    }

    /// Packs and sends the step's lists; padding rows of a bucket get a token, a position and a place that hurt nobody.
    fn send(&mut self, bucket: Option<usize>, with_adapters: bool) -> Result<(), ShardFault> {
        let rows = bucket.unwrap_or(0).max(self.lists.rows());
        let (block, lists) = (self.trash_block, &mut self.lists);
        let sample_rows = lists.logit_rows.len();
        let group_rows = self.engine.limits.logit_rows_max;
        let passes = if with_adapters { lists.passes.as_slice() } else { &[] };
        // The whole step, then one for each LoRA pass, then one for each group of logit rows.
        let mut counts = vec![lists.counts(passes.first(), sample_rows)];
        counts.extend(passes.iter().map(|pass| lists.counts(Some(pass), sample_rows)));
        for first in (0..sample_rows).step_by(group_rows) {
            counts.push(lists.counts(None, (sample_rows - first).min(group_rows)));
        }
        for row in lists.tokens.len()..rows {
            lists.tokens.push(0);
            lists.positions.push(0);
            lists.kv_slots.push([block, (row % BLOCK_TOKENS) as u32]);
        }
        let logit_rows: Vec<u32> = lists.logit_rows.iter().map(|row| row.row).collect();
        let mut packing = self.bundles.begin()?;
        packing.push(List::Counts, &counts)?;
        packing.push(List::Tokens, &lists.tokens)?;
        packing.push(List::Positions, &lists.positions)?;
        packing.push(List::KvSlots, &lists.kv_slots)?;
        if with_adapters {
            packing.push(List::RowTiles, &lists.row_tiles)?;
            packing.push(List::Items, &lists.items)?;
        }
        packing.push(List::DecodeUnits, &lists.decode_units)?;
        packing.push(List::PrefillTiles, &lists.prefill_tiles)?;
        packing.push(List::BlockTable, &lists.block_table)?;
        if bucket.is_none() {
            packing.push(List::LogitRows, &logit_rows)?;
        }
        packing.push(List::SampleRows, &self.samples.rows)?;
        packing.push(List::Edits, &self.samples.edits)?;
        packing.push(List::Masks, &self.samples.masks)?;
        packing.send(self.engine.stream)
    }

    /// A step that no graph was captured for.
    fn launch_eager(&self, with_adapters: bool, flight: &Flight) -> Result<(), ShardFault> {
        let rows = self.lists.rows();
        let passes = if with_adapters { self.lists.passes.as_slice() } else { &[] };
        let shape = Shape {
            rows,
            bucket: self.engine.plans.bucket(rows),
            tiles: usize::from(!self.lists.decode_only),
            passes,
            vectors: self.lists.vectors,
            prefill_tiles: self.lists.prefill_tiles.len(),
        };
        let mut ops = StepOps::new(&self.engine, &self.bundles, shape);
        ops.forward()?;
        let (total, group_rows) = (self.lists.logit_rows.len(), self.engine.limits.logit_rows_max);
        for first in (0..total).step_by(group_rows) {
            let count = (total - first).min(group_rows);
            ops.sample(first, count, true)?;
            self.download(flight, first, count)?;
        }
        Ok(())
    }

    /// Every launch of a step, with lists that are empty.
    fn launch_nothing(&mut self, tiles: usize) -> Result<(), ShardFault> {
        const PASS: [lists::LoraPass; 1] = [lists::LoraPass { first_tile: 0, tiles: 0, first_item: 0, items: 0 }];
        let mut packing = self.bundles.begin()?;
        packing.push(List::Counts, &[loramux_kernels::device::step::StepCounts::default(); 4])?;
        packing.push(List::Tokens, &[0u32])?;
        packing.push(List::Positions, &[0u32])?;
        packing.push(List::KvSlots, &[[self.trash_block, 0]])?;
        packing.push(List::LogitRows, &[0u32])?;
        packing.send(self.engine.stream)?;
        let bucket = self.engine.plans.bucket(1);
        let shape = Shape { rows: 1, bucket, tiles, passes: &PASS, vectors: true, prefill_tiles: tiles };
        let mut ops = StepOps::new(&self.engine, &self.bundles, shape);
        ops.forward()?;
        ops.sample(0, 1, true)?;
        let event = self.engine.device.event()?;
        self.engine.device.record(event, self.engine.stream)?;
        Ok(self.engine.device.synchronize(event)?)
    }

    /// Copies the samples of a group of rows to page-locked memory.
    fn download(&self, flight: &Flight, first: usize, count: usize) -> Result<(), ShardFault> {
        let Engine { device, stream, space, .. } = &self.engine;
        let rows = &self.lists.logit_rows[first..first + count];
        let Landing { out, top, .. } = &flight.landing;
        let (out_bytes, top_bytes) = (size_of::<SampleOut>(), TOP_MAX * size_of::<TopLogprob>());
        // SAFETY: the landing has room for every row of a step, and nobody reads it before its event has come.
        unsafe {
            let to = out.as_ptr().add(first * out_bytes);
            device.download(*stream, to, space.sample_out.address(), count * out_bytes)?;
            if rows.iter().any(|row| self.wants_top(row)) {
                let to = top.as_ptr().add(first * top_bytes);
                device.download(*stream, to, space.sample_top.address(), count * top_bytes)?;
            }
        }
        Ok(())
    }

    /// Copies the hidden states that embeddings are made of to page-locked memory.
    fn download_states(&self, step: &Step, flight: &mut Flight) -> Result<(), ShardFault> {
        let Engine { device, stream, space, spec, .. } = &self.engine;
        let (row_bytes, mut first_row) = (spec.hidden * size_of::<u16>(), 0);
        for chunk in &step.chunks {
            let pooler = self.sequences.get(&chunk.seq).and_then(|seq| seq.pooler.as_ref());
            if let Some(pooler) = pooler {
                let rows = pooler.rows(chunk.len);
                let at = (first_row + rows.start as usize) * row_bytes;
                // SAFETY: both have room for every row of a step, and nobody reads the landing before its event has come.
                unsafe {
                    let to = flight.landing.states.as_ptr().add(at);
                    device.download(*stream, to, space.normed.address() + at as u64, rows.len() * row_bytes)?;
                }
                let (start, len, is_last) = (chunk.start, chunk.len, chunk.pool);
                flight.pooled.push(PooledChunk { seq: chunk.seq, first_row, start, len, is_last });
            }
            first_row += chunk.len as usize;
        }
        Ok(())
    }

    /// Takes the hidden states that came back.
    fn pool(&mut self, chunks: &[PooledChunk], states: &[u16], result: &mut StepResult) -> Result<(), ShardFault> {
        let (hidden, elem) = (self.engine.spec.hidden, self.engine.elem);
        for chunk in chunks {
            let pooler = self.sequences.get_mut(&chunk.seq).and_then(|seq| seq.pooler.as_mut());
            let Some(pooler) = pooler else { continue };
            let rows = pooler.rows(chunk.len);
            let range =
                (chunk.first_row + rows.start as usize) * hidden..(chunk.first_row + rows.end as usize) * hidden;
            let values: Vec<f32> =
                states.get(range).unwrap_or_default().iter().map(|&bits| elem.from_bits(bits)).collect();
            pooler.add(chunk.start, chunk.len, hidden, &values)?;
            result.pooled.extend(chunk.is_last.then(|| pooler.report(chunk.seq)));
        }
        Ok(())
    }

    fn wants_top(&self, row: &LogitRow) -> bool {
        let Some(seq) = self.sequences.get(&row.seq) else { return false };
        match row.want {
            Want::Sample { .. } => seq.sampling.logprobs.is_some_and(|count| count > 0),
            Want::PromptLogprob { .. } => seq.sampling.prompt_logprobs.is_some_and(|count| count > 0),
        }
    }

    /// Reads the result of a step that is done.
    fn land(&mut self, flight: Flight) -> Result<StepResult, ShardFault> {
        let Flight { id, rows, refused, pooled, uploaded, landing, started } = flight;
        let mut result = StepResult { id, uploaded, ..StepResult::default() };
        let wants = |row: &LogitRow| self.sequences.get(&row.seq).is_some_and(|seq| seq.sampling.logprobs.is_some());
        sampling::read(&rows, landing.out.as_slice(), landing.top.as_slice(), wants, &mut result);
        for row in rows.iter().filter(|row| matches!(row.want, Want::Sample { .. })) {
            if let Some(seq) = self.sequences.get_mut(&row.seq) {
                seq.pending = seq.pending.saturating_sub(1);
            }
        }
        sampling::refuse(&refused, &mut result);
        for sample in &result.samples {
            if let Some(seq) = self.sequences.get_mut(&sample.seq) {
                seq.push(sample.token);
            }
        }
        self.pool(&pooled, landing.states.as_slice(), &mut result)?;
        self.landings.push(landing);
        result.compute_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(result)
    }
}
