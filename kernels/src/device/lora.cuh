// What the LoRA kernels share: where a step's work lies, and the delta of one tile of outputs.
//
//   y[row][col] += item.scale * desc.scale * sum over rank of V[row][rank] * B[col][rank]
//
// A RowTile is up to TILE_ROWS rows with the same adapters; its items are the rank blocks of those adapters, and the
// shrink has left one tile of V for each (item, slice, split).
#pragma once

#include "portable.cuh"
#include "step.cuh"

#ifndef TILE_ROWS
#define TILE_ROWS 8
#endif
#ifndef LORA_SPLITS
#define LORA_SPLITS 1
#endif

// A loop that ptxas must not unroll: with all bounds known it would, and run out of registers.
#ifdef __CUDACC__
#define ROLLED _Pragma("unroll 1")
#else
#define ROLLED
#endif

static_assert(TILE_ROWS % 8 == 0, "a tile is cut into the 8 columns of an mma");
constexpr u32 V_TILE = TILE_ROWS * RANK_BLOCK;  // floats that the shrink writes for one (item, slice, split)
constexpr u32 SITE_SLICES_MAX = 3;              // q, k and v

/// The deltas of one site (matrices that share an input) of one layer.
struct SiteWork {
    float* v;                   // [item][slice][split][TILE_ROWS][RANK_BLOCK]: the shrink writes it, the expand reads it
    const RowTile* tiles;
    const LoraItem* items;
    const StepCounts* counts;   // row_tiles, lora_items
    const BlockDesc* descs;     // [block_row * desc_stride + desc_first + slice]
    const unsigned char* arena;
    u32 desc_stride;
    u32 desc_first;             // of this layer and site
    u32 slices;                 // 1 ..= SITE_SLICES_MAX
    u32 reserved;
};

/// 8 bytes of B. In a tile of 8 rows one warp reads them once and L1 is left to V and y; a larger tile comes back to them.
DEVICE Words2 load_b(const elem* from) { return TILE_ROWS == 8 ? load8_once(from) : load8(from); }

DEVICE void add(Float4& sum, const Float4& v) {
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
}

DEVICE BlockDesc lora_desc(const SiteWork& site, const LoraItem& item, u32 slice) {
    return site.descs[u64(item.block_row) * site.desc_stride + site.desc_first + slice];
}

/// MT consecutive elements, two to a word: what a lane reads or writes of y at once.
template <u32 MT>
struct Run {
    u32 words[MT / 2];

    DEVICE void load(const elem* from);
    DEVICE void store(elem* to) const;
};

/// y is written by these kernels, so it is never read through the read-only path.
template <>
DEVICE void Run<4>::load(const elem* from) {
    const Words2 w = load8_fresh(from);
    words[0] = w.x, words[1] = w.y;
}
template <>
DEVICE void Run<4>::store(elem* to) const { store8(to, {words[0], words[1]}); }
template <>
DEVICE void Run<8>::load(const elem* from) {
    const Words4 w = load16_fresh(from);
    words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
}
template <>
DEVICE void Run<8>::store(elem* to) const { store16(to, {words[0], words[1], words[2], words[3]}); }

/// The delta of 16 * MT outputs for 8 * NT rows, as one warp holds it. mma sees Y^T = B V^T: outputs are its 16 rows,
/// batch rows its 8 columns. Row r of mma j is output r * MT + j, so lane (g = lane / 4, t = lane % 4) holds
/// in value[n][j][0..3] the outputs {g * MT + j, (g + 8) * MT + j} x {rows 8 n + 2 t, 8 n + 2 t + 1}: for each of its rows
/// two runs of MT consecutive outputs, which one wide access of y covers.
template <u32 MT, u32 NT>
struct DeltaTile {
    float value[NT][MT][4];
    bool touched;  // false: no item targets this slice, and y is to keep its bits

    /// The delta of the lane's `half` (0: outputs g * MT .., 1: (g + 8) * MT ..), batch row 8 n + 2 t + `odd`.
    DEVICE float at(u32 n, u32 j, u32 half, u32 odd) const { return value[n][j][half * 2 + odd]; }
};

/// Adds the items of `tile` in order. `first_n` is the first group of 8 rows, `column` the first output of the slice and
/// `d_out` its number of outputs, a multiple of MT; what lies behind it is not read. All lanes of a warp call it together.
/// Without items the delta is -0, which changes no number that it is added to, not even -0.
///
/// The kernels that use it are bound by reading B once (32 bytes an output and item). A lane reads ranks 4 t .. 4 t + 3
/// of one output with 8 bytes, so four lanes read one output's 32-byte sector. mma wants ranks 2 t, 2 t + 1 and 2 t + 8,
/// 2 t + 9 there; a sum over ranks does not care for their order if B and V agree, so V is read at 4 t .. 4 t + 3 too.
/// All loads of an item (2 * MT of B, NT * LORA_SPLITS of V) come before its first mma.
template <u32 MT, u32 NT>
DEVICE DeltaTile<MT, NT> expand_tile(const SiteWork& site, const RowTile& tile, u32 slice, u32 first_n, u32 column, u32 d_out) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    DeltaTile<MT, NT> delta;
    UNROLL
    for (u32 n = 0; n < NT; ++n) {
        UNROLL
        for (u32 j = 0; j < MT; ++j) {
            UNROLL
            for (u32 i = 0; i < 4; ++i) delta.value[n][j][i] = -0.0f;
        }
    }
    delta.touched = false;
    const bool low_in = column + g * MT < d_out, high_in = column + (g + 8) * MT < d_out;
    for (u32 i = 0; i < tile.item_count; ++i) {
        const u32 index = tile.first_item + i;
        const LoraItem item = site.items[index];
        const BlockDesc desc = lora_desc(site, item, slice);
        if (desc.b_unit == NOT_TARGETED) continue;  // the same for the whole warp
        delta.touched = true;

        const elem* b = reinterpret_cast<const elem*>(site.arena + u64(desc.b_unit) * ARENA_UNIT_BYTES) +
                        u64(column) * RANK_BLOCK + 4 * t;
        Words2 low[MT], high[MT];
        UNROLL
        for (u32 j = 0; j < MT; ++j) {
            low[j] = high[j] = {0, 0};
            if (low_in) low[j] = load_b(b + (g * MT + j) * RANK_BLOCK);
            if (high_in) high[j] = load_b(b + ((g + 8) * MT + j) * RANK_BLOCK);
        }
        const float* v = site.v + (u64(index) * site.slices + slice) * (LORA_SPLITS * V_TILE) + (first_n * 8 + g) * RANK_BLOCK + 4 * t;
        Float4 sum[NT];
        UNROLL
        for (u32 n = 0; n < NT; ++n) {
            sum[n] = {0.0f, 0.0f, 0.0f, 0.0f};
            if ((first_n + n) * 8 < tile.row_count) {  // the shrink writes no group without rows
                sum[n] = loadf4(v + n * 8 * RANK_BLOCK);
                UNROLL
                for (u32 s = 1; s < LORA_SPLITS; ++s) add(sum[n], loadf4(v + s * V_TILE + n * 8 * RANK_BLOCK));
            }
        }
        const float scale = item.scale * desc.scale;
        UNROLL
        for (u32 n = 0; n < NT; ++n) {
            const u32 v_pairs[2] = {pack2(sum[n].x * scale, sum[n].y * scale), pack2(sum[n].z * scale, sum[n].w * scale)};
            UNROLL
            for (u32 j = 0; j < MT; ++j) {
                const u32 b_pairs[4] = {low[j].x, high[j].x, low[j].y, high[j].y};
                mma_16x8x16(delta.value[n][j], b_pairs, v_pairs);
            }
        }
    }
    return delta;
}
