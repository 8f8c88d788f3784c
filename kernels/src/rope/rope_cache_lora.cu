// rope_cache with the LoRA deltas of q, k and v: what lora_expand_add and rope_cache give, without writing q, k and v and
// reading them again, and without rounding them in between.
//
//   h[i] = qkv[i] + delta[i] + bias[i]; q and k are rotated by pairs (i, i + D/2); q goes back, k and v into the cache
//
// One warp takes the unit (row tile, head): a head is 16 runs of RUN = D / 16 outputs, and expand_tile gives a lane the
// runs g and g + 8 for each of its two rows. They are D/2 apart, so a lane has both halves of every pair it rotates.
// Units are walked by stride, so any grid is right. Rows without items get the plain op's bits; rows of no tile, which
// padding is, are neither read nor written.
//
// Bound by B, 32 bytes an output and rank-16 item. A warp has 32 * D bytes of it in flight, and registers let a
// multiprocessor hold 16 warps for heads up to 64 (2 KiB each), 12 for 96 and 128 (3 and 4 KiB), 8 for 256 (8 KiB). What
// goes to the cache is a few hundred bytes a head and row, stored as rope_cache stores it.

#include "lora.cuh"
#include "kv.cuh"
#include "rope.cuh"

constexpr u32 ROPE_LORA_WARPS = 4;
constexpr u32 ROPE_LORA_THREADS = ROPE_LORA_WARPS * 32;
constexpr u32 RUN = HEAD_DIM / 16;                                   // consecutive outputs of a lane
constexpr u32 HALF = HEAD_DIM / 2;                                   // from one of a pair to the other
constexpr u32 ROPE_LORA_BLOCKS = RUN <= 4 ? 4 : RUN <= 8 ? 3 : 2;  // that a multiprocessor can hold

static_assert(TILE_ROWS == 8, "for steps that only decode");
static_assert(HEAD_DIM % 32 == 0, "a run is whole words");

struct RopeCacheLoraArgs {
    SiteWork site;           // slices: q, k, v
    elem* qkv;               // [rows][(heads + 2 kv_heads) * HEAD_DIM]; only its q part is written
    const float* bias;       // [(heads + 2 kv_heads) * HEAD_DIM], or null
    const float* cos_sin;    // [position][HEAD_DIM / 2][2]
    const u32* positions;    // [rows]
    const KvSlot* slots;     // [rows]
    u8* kv_arena;
    KvShape kv;
    u32 layer;
    u32 heads;
};

/// Runs of heads of 32, 96 and 256, beside those of lora.cuh. A run of 96 is 12 bytes, so only its words are aligned.
template <>
DEVICE void Run<2>::load(const elem* from) { words[0] = *reinterpret_cast<const u32*>(from); }
template <>
DEVICE void Run<2>::store(elem* to) const { *reinterpret_cast<u32*>(to) = words[0]; }
template <>
DEVICE void Run<6>::load(const elem* from) {
    UNROLL
    for (u32 w = 0; w < 3; ++w) words[w] = reinterpret_cast<const u32*>(from)[w];
}
template <>
DEVICE void Run<6>::store(elem* to) const {
    UNROLL
    for (u32 w = 0; w < 3; ++w) reinterpret_cast<u32*>(to)[w] = words[w];
}
template <>
DEVICE void Run<16>::load(const elem* from) {
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const Words4 w = load16_fresh(from + 8 * i);
        words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
    }
}
template <>
DEVICE void Run<16>::store(elem* to) const {
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        store16(to + 8 * i, {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
    }
}

/// Which matrix a head belongs to, and where it begins among that matrix's outputs.
struct HeadPlace {
    u32 slice;    // 0: q, 1: k, 2: v
    u32 in_slice;
    u32 heads;    // of the slice
};

DEVICE HeadPlace place_of(u32 head, u32 heads, u32 kv_heads) {
    if (head < heads) return {0, head, heads};
    const u32 kv_head = head - heads;
    return kv_head < kv_heads ? HeadPlace{1, kv_head, kv_heads} : HeadPlace{2, kv_head - kv_heads, kv_heads};
}

/// Adds delta and bias to two neighbours, those of word `w` of a lane's run. `bias` is that of the lane's first element;
/// the lane's other row takes the same, from L1.
DEVICE void complete_two(float (&two)[2], u32 word, const DeltaTile<RUN, 1>& delta, u32 w, u32 half, u32 odd,
                         const float* bias) {
    unpack2(word, two[0], two[1]);
    two[0] += delta.at(0, 2 * w, half, odd);
    two[1] += delta.at(0, 2 * w + 1, half, odd);
    if (bias) {
        const Words2 of_two = load8(bias + half * HALF + 2 * w);
        two[0] += bits_float(of_two.x);
        two[1] += bits_float(of_two.y);
    }
}

/// Writes a lane's part of one row: both halves of its pairs, `first` the element they begin at.
DEVICE void store_row(const RopeCacheLoraArgs& args, const HeadPlace& at, u32 row, u32 first, const Run<RUN> (&done)[2],
                      elem* q) {
    elem* to = q;
    if (at.slice > 0) {
        const KvSlot slot = args.slots[row];
        u8* keys = args.kv_arena + kv_key_offset(args.kv, args.layer, slot.block, at.in_slice);
        if (at.slice == 2) {
            elem* values = reinterpret_cast<elem*>(keys + kv_value_distance(args.kv)) + first * BLOCK_TOKENS + slot.offset;
            UNROLL
            for (u32 half = 0; half < 2; ++half) {
                UNROLL
                for (u32 w = 0; w < RUN / 2; ++w) {
                    elem* two = values + (half * HALF + 2 * w) * BLOCK_TOKENS;
                    two[0] = elem{u16(done[half].words[w])};
                    two[BLOCK_TOKENS] = elem{u16(done[half].words[w] >> 16)};
                }
            }
            return;
        }
        to = reinterpret_cast<elem*>(keys) + slot.offset * HEAD_DIM + first;
    }
    done[0].store(to);
    done[1].store(to + HALF);
}

DEVICE void rope_head(const RopeCacheLoraArgs& args, const RowTile& tile, u32 head) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 all_heads = args.heads + 2 * args.kv.kv_heads, first = g * RUN;
    const HeadPlace place = place_of(head, args.heads, args.kv.kv_heads);
    elem* of_tile = args.qkv + (u64(tile.first_row) * all_heads + head) * HEAD_DIM + first;
    Run<RUN> run[2][2];  // [row][half]
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        const u32 row = 2 * t + odd;
        if (row < tile.row_count) {
            run[odd][0].load(of_tile + u64(row) * all_heads * HEAD_DIM);
            run[odd][1].load(of_tile + u64(row) * all_heads * HEAD_DIM + HALF);
        }
    }
    const u32 d_out = place.heads * HEAD_DIM;
    const auto delta = expand_tile<RUN, 1>(args.site, tile, place.slice, 0, place.in_slice * HEAD_DIM, d_out);
    const float* bias = args.bias ? args.bias + head * HEAD_DIM + first : nullptr;
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        const u32 in_tile = 2 * t + odd, row = tile.first_row + in_tile;
        if (in_tile >= tile.row_count) continue;
        const float* cos_sin = place.slice < 2 ? args.cos_sin + (u64(args.positions[row]) * HALF + first) * 2 : nullptr;
        UNROLL
        for (u32 w = 0; w < RUN / 2; ++w) {
            float low[2], high[2];
            complete_two(low, run[odd][0].words[w], delta, w, 0, odd, bias);
            complete_two(high, run[odd][1].words[w], delta, w, 1, odd, bias);
            if (cos_sin) {
                const Float4 two = loadf4(cos_sin + 4 * w);
                rotate_pair(low[0], high[0], two.x, two.y);
                rotate_pair(low[1], high[1], two.z, two.w);
            }
            run[odd][0].words[w] = pack2(low[0], low[1]);
            run[odd][1].words[w] = pack2(high[0], high[1]);
        }
        store_row(args, place, row, first, run[odd], of_tile + u64(in_tile) * all_heads * HEAD_DIM);
    }
}

KERNEL_ENTRY(rope_cache_lora, RopeCacheLoraArgs, ROPE_LORA_THREADS, ROPE_LORA_BLOCKS) {
    const u32 per_tile = args.heads + 2 * args.kv.kv_heads;
    const u32 units = args.site.counts->row_tiles * per_tile;
    const u32 first = blockIdx.x * ROPE_LORA_WARPS + threadIdx.x / 32;
    for (u32 unit = first; unit < units; unit += gridDim.x * ROPE_LORA_WARPS) {
        rope_head(args, args.site.tiles[unit / per_tile], unit % per_tile);
    }
}
