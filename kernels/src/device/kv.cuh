// Where keys and values of a block lie; see KvShape in step.cuh. Wants -DHEAD_DIM.
#pragma once

constexpr u32 KV_HEAD_BYTES = BLOCK_TOKENS * HEAD_DIM * 2;  // K or V of one head in one block

/// Offset of a block from the arena's start, at the K of head `kv_head` of `layer`.
DEVICE u64 kv_key_offset(const KvShape& kv, u32 layer, u32 block, u32 kv_head) {
    return u64(block / kv.per_page) * kv.page_bytes + u64(block % kv.per_page) * kv.block_bytes +
           u64(layer * 2 * kv.kv_heads + kv_head) * KV_HEAD_BYTES;
}

/// From a head's K to its V.
DEVICE u64 kv_value_distance(const KvShape& kv) { return u64(kv.kv_heads) * KV_HEAD_BYTES; }
