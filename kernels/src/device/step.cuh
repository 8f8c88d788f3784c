// What a step tells the kernels. Plain data behind fixed addresses, the same in `step.rs`; `u32` everywhere so that both
// sides agree on the layout without looking.
#pragma once

constexpr u32 BLOCK_TOKENS = 16;             // positions of a KV block
constexpr u32 RANK_BLOCK = 16;               // ranks of a LoRA block
constexpr u32 ARENA_UNIT_BYTES = 256;        // descriptors count in these from the arena's start
constexpr u32 NOT_TARGETED = 0xffffffffu;    // the adapter leaves this slice alone
constexpr u32 FROM_DEVICE = 0x80000000u;     // a token that only the device knows: the rest is its sequence's slot

/// How much there is to do: read on the device, so that one captured graph serves every step of its bucket.
struct StepCounts {
    u32 rows;           // rows that mean something; those after them are padding
    u32 lora_items;     // LoraItem
    u32 row_tiles;      // RowTile
    u32 decode_units;   // DecodeUnit
    u32 prefill_tiles;  // PrefillTile
    u32 sample_rows;    // SampleRow
    u32 reserved0, reserved1;
};

/// Where one row's key and value go.
struct KvSlot {
    u32 block;
    u32 offset;  // position inside the block
};

/// One rank block of one slice of one resident adapter: A as [16][d_in], B as [d_out][16].
struct BlockDesc {
    u32 a_unit, b_unit;  // NOT_TARGETED: this slice is left alone
    float scale;         // alpha / r of this module
    u32 vectors;         // unit + 1 of gains and shifts [2][d_out] f32; 0: none
};

/// Rows that use one rank block of one adapter: what shrink walks. At most LORA_TILE_ROWS rows.
struct LoraItem {
    u32 block_row;  // row of the descriptor table
    u32 first_row;
    u32 row_count;
    float scale;    // the request's factor, on top of the module's
};

/// Rows and the items that act on them, in the order in which their deltas are added. Covers every row, adapter or not.
struct RowTile {
    u32 first_row;
    u32 row_count;
    u32 first_item;
    u32 item_count;
};

/// A stretch of one decoding row's keys: `part` of `parts` consecutive units. Every kv head takes every unit.
struct DecodeUnit {
    u32 row;
    u32 blocks;    // first entry in the block table
    u32 kv_begin;  // positions, a multiple of BLOCK_TOKENS
    u32 kv_end;
    u32 part, parts;
    u32 reserved0, reserved1;
};

/// Consecutive rows of one prefill chunk. Row i is at `position + i` and sees the positions up to its own.
struct PrefillTile {
    u32 first_row;
    u32 row_count;
    u32 position;  // of the first row
    u32 blocks;    // first entry in the block table
};

/// How KV blocks lie in the arena: block b is at (b / per_page) * page_bytes + (b % per_page) * block_bytes. Inside: layer,
/// then K and V, then kv head. A head's K is [16 tokens][head_dim]; its V is [head_dim][16 tokens], so that a product over
/// tokens reads both from front to back.
struct KvShape {
    u64 page_bytes;
    u32 block_bytes;
    u32 per_page;
    u32 kv_heads;
    u32 reserved;
};
