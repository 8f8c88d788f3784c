//! A shard that keeps what was really written where. Its output depends on all of it, so stale memory shows.

use std::collections::BTreeMap;

use loramux_proto::{
    AdapterUpload, Chunk, Pooled, Pooling, PositionLogprobs, PromptLogprobs, Sample, Sampling, SlotGeneration, Step,
    StepResult,
};

use super::grammar::words_of;
use super::marker::{POISON, adapters_mark, attend, average, draw, image_mark, kv_mark, logprob, page_mark, pooled};
use crate::engine::ContentId;

struct Sequence {
    tokens: Vec<u32>,
    prompt_tokens: usize,
    sampling: Sampling,
    pooling: Pooling,
    /// Positions in it, and their mark.
    mean: (usize, u64),
}

#[derive(Clone, Default)]
struct Slot {
    generation: u64,
    pages: Vec<u32>,
    published: bool,
}

pub(super) struct FakeShard {
    block_tokens: usize,
    blocks_per_page: usize,
    /// KV marks, `block_tokens` per block.
    kv: Vec<u64>,
    /// Mark of each page as part of an adapter.
    images: Vec<u64>,
    slots: Vec<Slot>,
    sequences: BTreeMap<u64, Sequence>,
    /// Contents in the host slab and their pages.
    pub(super) host: BTreeMap<ContentId, u32>,
    /// Uploads whose copies still run; pages are written when they end.
    copying: Vec<(u32, AdapterUpload)>,
    /// (step, sequence) that wrote a block last.
    writer: Vec<(u64, u64)>,
}

impl FakeShard {
    pub(super) fn new(pages: u32, blocks_per_page: u32, block_tokens: u32, slots: u32) -> Self {
        let blocks = (pages * blocks_per_page) as usize;
        Self {
            block_tokens: block_tokens as usize,
            blocks_per_page: blocks_per_page as usize,
            kv: vec![POISON; blocks * block_tokens as usize],
            images: vec![POISON; pages as usize],
            slots: vec![Slot::default(); slots as usize],
            sequences: BTreeMap::new(),
            host: BTreeMap::new(),
            copying: Vec::new(),
            writer: vec![(0, 0); blocks],
        }
    }

    /// Executes one step. Every panic in here is a contract that the scheduler broke. `owner_of` tells whose a sequence
    /// is; an upload ends `delay()` steps later.
    pub(super) fn run(
        &mut self,
        step: &Step,
        owner_of: impl Fn(u64) -> u64,
        mut delay: impl FnMut() -> u32,
    ) -> StepResult {
        let mut result = StepResult { id: step.id, ..StepResult::default() };
        for seq in &step.finishes {
            assert!(self.sequences.remove(seq).is_some(), "finish of the unknown sequence {seq}");
        }
        for copy in &step.copies {
            let (src, dst) = (copy.src as usize * self.block_tokens, copy.dst as usize * self.block_tokens);
            self.kv.copy_within(src..src + self.block_tokens, dst);
        }
        for upload in &step.uploads {
            let content = ContentId(upload.content_id.as_slice().try_into().expect("32 bytes"));
            assert_eq!(
                self.host.get(&content),
                Some(&(upload.pages.len() as u32)),
                "upload of what is not in the slab"
            );
            let slot = &mut self.slots[upload.slot as usize];
            assert!(upload.generation > slot.generation, "generations never repeat");
            *slot = Slot { generation: upload.generation, pages: upload.pages.clone(), published: false };
            self.copying.push((delay(), upload.clone()));
        }
        self.publish(&mut result);
        for start in &step.starts {
            let sampling = start.sampling.clone().expect("sampling is set");
            let new = Sequence {
                tokens: start.tokens.clone(),
                prompt_tokens: start.prompt_tokens as usize,
                sampling,
                pooling: start.pooling(),
                mean: (0, 0),
            };
            assert!(self.sequences.insert(start.seq, new).is_none(), "sequence {} started twice", start.seq);
        }
        for chunk in &step.chunks {
            self.compute(step.id, chunk, owner_of(chunk.seq), &mut result);
        }
        self.check_writers(step);
        result
    }

    fn publish(&mut self, result: &mut StepResult) {
        let copying = std::mem::take(&mut self.copying);
        for (delay, upload) in copying {
            if delay > 0 {
                self.copying.push((delay - 1, upload));
                continue;
            }
            let content = ContentId(upload.content_id.as_slice().try_into().expect("32 bytes"));
            for (at, page) in upload.pages.iter().enumerate() {
                self.images[*page as usize] = page_mark(&content, at);
                // An adapter's bytes lie over whatever KV was there.
                let words = self.blocks_per_page * self.block_tokens;
                self.kv[*page as usize * words..][..words].fill(POISON ^ 1);
            }
            self.slots[upload.slot as usize].published = true;
            result.uploaded.push(SlotGeneration { slot: upload.slot, generation: upload.generation });
        }
    }

    fn compute(&mut self, step: u64, chunk: &Chunk, owner: u64, result: &mut StepResult) {
        let (start, end) = (chunk.start as usize, (chunk.start + chunk.len) as usize);
        assert!(chunk.len > 0 && chunk.blocks.len() == end.div_ceil(self.block_tokens), "block table of {chunk:?}");
        let adapters = adapters_mark(chunk.adapters.iter().map(|used| {
            let slot = &self.slots[used.slot as usize];
            assert!(slot.published && slot.generation == used.generation, "stale or unpublished slot in {chunk:?}");
            (used.scale, image_mark(slot.pages.iter().map(|page| self.images[*page as usize])))
        }));
        let seq = self.sequences.get_mut(&chunk.seq).expect("the chunk's sequence was started");
        assert!(end <= seq.tokens.len(), "chunk of tokens nobody knows");
        let at = |position: usize| {
            chunk.blocks[position / self.block_tokens] as usize * self.block_tokens + position % self.block_tokens
        };
        let (mut attended, mut before) = (0, 0);
        let mut positions = Vec::new();
        for position in 0..end {
            if position >= start {
                let block = chunk.blocks[position / self.block_tokens] as usize;
                self.writer[block] = (step, chunk.seq);
                self.images[block / self.blocks_per_page] = POISON ^ 2;
                self.kv[at(position)] = kv_mark(before, seq.tokens[position], position, adapters, owner);
            }
            before = self.kv[at(position)];
            attended = attend(attended, position, before);
            if position >= start && seq.pooling == Pooling::Mean {
                assert_eq!(seq.mean.0, position, "a mean takes every position once, in order");
                seq.mean = (position + 1, average(seq.mean.1, before));
            }
            if chunk.prompt_logprobs && position >= start && position + 1 < seq.prompt_tokens {
                let logprob = logprob(attended, seq.tokens[position + 1]);
                positions.push(PositionLogprobs { position: position as u32 + 1, logprob, top: Vec::new() });
            }
        }
        if !positions.is_empty() {
            result.prompt_logprobs.push(PromptLogprobs { seq: chunk.seq, positions });
        }
        if chunk.pool {
            assert_eq!(end, seq.prompt_tokens, "an embedding is of the whole prompt");
            let values = pooled(if seq.pooling == Pooling::Mean { seq.mean.1 } else { attended });
            result.pooled.push(Pooled { seq: chunk.seq, values });
        }
        assert!(chunk.sample || chunk.mask.is_none(), "a mask of nothing");
        if chunk.sample {
            assert_eq!(end, seq.tokens.len(), "a sample follows the last known token");
            let generated = end - seq.prompt_tokens;
            let sampling = &seq.sampling;
            let forbidden: &[u32] = if generated < sampling.min_tokens as usize { &sampling.end_tokens } else { &[] };
            let mask = chunk.mask.as_deref().map(words_of);
            let token = draw(attended, sampling.seed, end, forbidden, mask.as_deref());
            seq.tokens.push(token);
            result.samples.push(Sample { seq: chunk.seq, token, logprob: logprob(attended, token), top: Vec::new() });
        }
    }

    /// Rows of one step run at the same time: nobody may read a block that another sequence writes.
    fn check_writers(&self, step: &Step) {
        for chunk in &step.chunks {
            for block in &chunk.blocks {
                let (at, seq) = self.writer[*block as usize];
                assert!(at != step.id || seq == chunk.seq, "block {block} is written and shared in one step");
            }
        }
    }

    /// Fills a block that nobody may read any more.
    pub(super) fn poison_block(&mut self, block: usize) {
        self.kv[block * self.block_tokens..][..self.block_tokens].fill(POISON);
    }

    pub(super) fn poison_page(&mut self, page: usize) {
        self.images[page] = POISON;
    }

    /// Pages that a copy still writes.
    pub(super) fn copying_pages(&self) -> impl Iterator<Item = u32> {
        self.copying.iter().flat_map(|(_, upload)| upload.pages.iter().copied())
    }
}
