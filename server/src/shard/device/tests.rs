//! The lists of a step: what no kernel could check.

use std::collections::HashMap;

use loramux_kernels::cuda::NONE;
use loramux_kernels::device::step::FROM_DEVICE;
use loramux_proto::{AdapterRef, Chunk, Sampling, SeqStart, Step};

use super::super::batch::{LogitRow, Want};
use super::super::run::ShardFault;
use super::adapters::SlotTable;
use super::lists::{ListLimits, Lists, LoraPass};
use super::sampling::SampleLists;
use super::sequence::DeviceSequence;

const LIMITS: ListLimits =
    ListLimits { blocks_total: 64, step_tokens_max: 200, prefill_rows: 40, items_max: [6, 3], window: None, vocab: 40 };

/// Slots 0, 1, 2 with 1, 2, 4 rank blocks.
fn slots() -> SlotTable {
    let mut slots = SlotTable::new(4, 16);
    for (slot, blocks) in [(0, 1), (1, 2), (2, 4)] {
        slots.replace(slot, 10 + u64::from(slot), blocks).expect("there is room");
    }
    slots
}

fn sequences(lens: &[(u64, usize, usize)]) -> HashMap<u64, DeviceSequence> {
    let make = |&(seq, tokens, pending): &(u64, usize, usize)| {
        let start = SeqStart {
            seq,
            tokens: (0..tokens as u32).collect(),
            prompt_tokens: tokens as u32,
            sampling: None,
            pooling: 0,
        };
        (seq, DeviceSequence { pending, ..DeviceSequence::new(&start, 7 + seq as u32) })
    };
    lens.iter().map(make).collect()
}

fn chunk(seq: u64, start: u32, len: u32, slots: &[u32]) -> Chunk {
    let adapter = |&slot: &u32| AdapterRef { slot, generation: 10 + u64::from(slot), scale: 0.5 };
    Chunk {
        seq,
        start,
        len,
        blocks: (0..(start + len).div_ceil(16)).collect(),
        adapters: slots.iter().map(adapter).collect(),
        sample: true,
        prompt_logprobs: false,
        mask: None,
        pool: false,
        blocks_from: 0,
    }
}

fn fill(lists: &mut Lists, chunks: Vec<Chunk>, limits: &ListLimits) -> Result<(), ShardFault> {
    let sequences = sequences(&[(0, 20, 1), (1, 33, 0), (2, 100, 0), (3, 16, 0)]);
    lists.fill(&Step { id: 1, chunks, ..Step::default() }, &sequences, &slots(), limits)
}

#[test]
fn a_token_that_the_host_has_not_read_comes_from_the_device() {
    let mut lists = Lists::default();
    fill(&mut lists, vec![chunk(0, 20, 1, &[]), chunk(1, 32, 1, &[])], &LIMITS).expect("a good step");
    assert_eq!(lists.tokens, [FROM_DEVICE | 7, 32]);
    assert_eq!(lists.positions, [20, 32]);
    assert_eq!(lists.kv_slots, [[1, 4], [2, 0]]);
    assert!(lists.decode_only && lists.prefill_tiles.is_empty() && lists.items.is_empty());
    // The one after it is nobody's yet.
    assert!(matches!(fill(&mut lists, vec![chunk(0, 21, 1, &[])], &LIMITS), Err(ShardFault::Malformed(_))));
}

#[test]
fn prompts_are_cut_into_the_attention_kernels_tiles_and_windows_into_units() {
    let mut lists = Lists::default();
    let limits = ListLimits { window: Some(10), ..LIMITS };
    fill(&mut lists, vec![chunk(3, 15, 1, &[]), chunk(2, 10, 90, &[])], &limits).expect("a good step");
    let tiles: Vec<_> = lists.prefill_tiles.iter().map(|t| (t.first_row, t.row_count, t.position, t.blocks)).collect();
    assert_eq!(tiles, [(1, 40, 10, 1), (41, 40, 50, 1), (81, 10, 90, 1)]);
    let units: Vec<_> = lists.decode_units.iter().map(|u| (u.row, u.kv_begin, u.kv_end)).collect();
    assert_eq!(units, [(0, 0, 16)], "position 15 sees 6..=15, from the start of its block on");
    let rows: Vec<_> = lists.logit_rows.iter().map(|row| row.row).collect();
    assert_eq!(rows, [0, 90]);
}

#[test]
fn work_that_does_not_fit_one_pass_is_cut_between_tiles() {
    let mut lists = Lists::default();
    let chunks = vec![chunk(0, 20, 1, &[2]), chunk(1, 32, 1, &[0, 1]), chunk(3, 15, 1, &[])];
    fill(&mut lists, chunks, &LIMITS).expect("a good step");
    let pass = |first_tile, tiles, first_item, items| LoraPass { first_tile, tiles, first_item, items };
    assert_eq!(lists.passes, [pass(0, 1, 0, 4), pass(1, 2, 4, 3)]);
    let tiles: Vec<_> = lists.row_tiles.iter().map(|t| (t.first_row, t.first_item, t.item_count)).collect();
    assert_eq!(tiles, [(0, 0, 4), (1, 0, 3), (2, 3, 0)], "items count from their pass");
    assert!(lists.items.iter().all(|item| item.scale == 0.5 && item.row_count == 1));
    // Runs of the same adapters share tiles.
    fill(&mut lists, vec![chunk(0, 20, 1, &[0]), chunk(1, 32, 1, &[0])], &LIMITS).expect("a good step");
    assert_eq!((lists.row_tiles.len(), lists.items.len()), (1, 1));
}

#[test]
fn what_the_scheduler_must_not_say_is_refused_before_a_launch() {
    let mut lists = Lists::default();
    let stale = Chunk { adapters: vec![AdapterRef { slot: 0, generation: 9, scale: 1.0 }], ..chunk(3, 15, 1, &[]) };
    assert!(matches!(fill(&mut lists, vec![stale], &LIMITS), Err(ShardFault::Op(_))));
    assert!(matches!(fill(&mut lists, vec![chunk(9, 0, 1, &[])], &LIMITS), Err(ShardFault::UnknownSequence(9))));
    let good = || chunk(3, 15, 1, &[]);
    let bad = [
        Chunk { len: 0, ..good() },
        Chunk { blocks: vec![64], ..good() },
        Chunk { blocks: vec![0, 1], ..good() },
        chunk(2, 0, 101, &[]),
    ];
    for chunk in bad {
        assert!(matches!(fill(&mut lists, vec![chunk.clone()], &LIMITS), Err(ShardFault::Malformed(_))), "{chunk:?}");
    }
    let too_many = vec![chunk(2, 0, 2, &[2])];
    assert!(matches!(fill(&mut lists, too_many, &LIMITS), Err(ShardFault::Malformed(_))), "4 items, 3 allowed");
}

#[test]
fn masks_lie_one_behind_the_other_and_a_wrong_length_is_refused_before_a_launch() {
    let bytes = |words: &[u32]| Some(words.iter().flat_map(|word| word.to_le_bytes()).collect());
    let masked = |seq, start, mask| Chunk { mask, ..chunk(seq, start, 1, &[]) };
    let mut lists = Lists::default();
    let chunks = vec![masked(0, 20, bytes(&[5])), masked(1, 32, None), masked(3, 15, bytes(&[6, u32::MAX]))];
    fill(&mut lists, chunks, &LIMITS).expect("a good step");
    let rows: Vec<_> = lists.logit_rows.iter().map(|row| row.want).collect();
    assert_eq!(rows, [Some(0), None, Some(2)].map(|mask| Want::Sample { mask }));
    assert_eq!(lists.masks, [5, 0, 6, 0xff], "two words each, and no bit beyond the 40 tokens");
    let mut samples = SampleLists::default();
    let sequences = sequences(&[(0, 20, 1), (1, 33, 0), (3, 16, 0)]);
    samples.fill(&lists.logit_rows, &lists.masks, &sequences, (40, 8)).expect("known sequences");
    let masks: Vec<_> = samples.rows.iter().map(|row| row.mask).collect();
    assert_eq!((masks, samples.masks.as_slice()), (vec![0, NONE, 2], [5, 0, 6, 0xff].as_slice()));
    assert!(lists.decode_only, "a mask is data: the same graph is replayed");
    for wrong in [bytes(&[1, 2, 3]), Some(vec![1; 7])] {
        let refused = fill(&mut lists, vec![masked(3, 15, wrong)], &LIMITS);
        assert!(matches!(refused, Err(ShardFault::Malformed(_))));
    }
}

#[test]
fn an_end_token_before_min_tokens_is_banned_unless_the_mask_has_nothing_else() {
    let sampling = Sampling { min_tokens: 3, end_tokens: vec![1], repetition_penalty: 1.0, ..Sampling::default() };
    let start = SeqStart { seq: 7, tokens: vec![0; 4], prompt_tokens: 4, sampling: Some(sampling), pooling: 0 };
    let sequences = HashMap::from([(7, DeviceSequence::new(&start, 0))]);
    let mut samples = SampleLists::default();
    for (words, edits) in [([0b10, 0], 0), ([0b110, 0], 1), ([0b10, 1], 1)] {
        let row = LogitRow { seq: 7, row: 0, want: Want::Sample { mask: Some(0) } };
        samples.fill(&[row], &words, &sequences, (40, 8)).expect("a known sequence");
        assert_eq!(samples.edits.len(), edits, "{words:?}");
    }
}

#[test]
fn rows_of_the_table_go_back_when_a_slot_changes_hands() {
    let mut slots = slots();
    for generation in 20..60 {
        slots.replace(1, generation, 9).expect("16 rows: 1 + 9 + 4");
        assert_eq!(slots.block_rows(1, generation).expect("published").len(), 9);
        assert!(slots.block_rows(1, generation - 1).is_err());
    }
    assert!(slots.replace(3, 60, 3).is_err(), "two rows are left");
    assert!(slots.replace(4, 60, 1).is_err(), "no such slot");
}
