// The first half of y += s * (x A^T) B^T, for a batch in which every row may use another adapter:
//
//   V[item][slice][split][row][rank] = sum over the split's k of x[row][k] * A[rank][k]        x, A: elem   V: f32
//
// Work comes as items: up to TILE_ROWS rows that share one rank block (16 ranks) of one adapter. An adapter of rank 40
// gives three items for the same rows; a row without adapter is in no item. The number of items is read from device
// memory, so one captured launch serves every mix; any grid size is right.
//
// The tensor core sees the problem transposed: 16 ranks are the M side and 8 rows the N side of m16n8k16, so a single
// row wastes 7/8 of an instruction that is free anyway (decode is bound by reading A), not 15/16 of it. A and x are both
// contiguous in k. A dot product does not care in which order k is visited if both sides agree, so each lane loads 16
// bytes (8 values) of its A rows and of its x rows straight into fragment registers: words 0 and 1 feed one mma, words 2
// and 3 the next. No transposition, no staging in shared memory: the warps of a block take different k, so neither A nor x
// has a second reader there. Tiles of 64 rows (prefill) use each A fragment for 8 groups of rows.
//
// k is cut into LORA_SPLITS parts to fill the GPU; each part writes a tile of its own and the reader adds the parts in
// order. So nothing needs zeroing, nothing is atomic. A row's sums run in the same order in tiles of 8 and of 64 rows
// and whatever its place in them: its bits do not depend on its batch.

#include "lora.cuh"

constexpr u32 SHRINK_WARPS = 4;
constexpr u32 SHRINK_THREADS = SHRINK_WARPS * 32;
constexpr u32 K_STEP = 32;  // k values that one warp takes per step: 4 lanes x 8 values
constexpr u32 WARPS_STEP = SHRINK_WARPS * K_STEP;  // from one step of a warp to its next
constexpr u32 STEPS = SHRINK_K / K_STEP;

static_assert(SHRINK_K % K_STEP == 0, "K must be a multiple of 32");
static_assert(STEPS >= LORA_SPLITS, "no split may be empty");
static_assert(SHRINK_THREADS == 8 * RANK_BLOCK, "each thread writes one element of 8 rows");

struct LoraShrinkArgs {
    SiteWork site;  // groups of 8 rows of `v` without a row are not written
    const elem* x;  // [rows][x_stride]
    u32 x_stride;   // elements, a multiple of 8
    u32 reserved;
};

/// Adds AHEAD steps of one warp, from `k` on; those from `k_end` on are left out, of which the compiler knows that there
/// are none if WHOLE. sum[n][i] is, for lane (g, t), ranks {g, g, g + 8, g + 8} and rows 8 n + {2 t, 2 t + 1, 2 t, 2 t + 1}.
/// (2 + GROUPS) * AHEAD loads of 16 bytes a lane come before the first mma that uses one: 12 of them (GROUPS 1, AHEAD 4)
/// are 6 KiB a warp and, with 16 warps, 96 KiB a multiprocessor; 26 KiB are needed to cover 4.3 TB/s at 800 ns. GROUPS 8
/// has 10 with AHEAD 1.
template <u32 GROUPS, u32 AHEAD, bool WHOLE>
DEVICE void add_steps(float (&sum)[GROUPS][4], const elem* a, const elem* const (&x_rows)[GROUPS], u32 k, u32 k_end) {
    Words4 low[AHEAD], high[AHEAD], x[AHEAD][GROUPS];
    UNROLL
    for (u32 i = 0; i < AHEAD; ++i) {
        const u32 at = k + i * WARPS_STEP;
        if (WHOLE || at < k_end) {
            low[i] = load16_once(a + at);
            high[i] = load16_once(a + at + 8 * SHRINK_K);
            UNROLL
            for (u32 n = 0; n < GROUPS; ++n) x[i][n] = load16(x_rows[n] + at);
        }
    }
    UNROLL
    for (u32 i = 0; i < AHEAD; ++i) {
        if (WHOLE || k + i * WARPS_STEP < k_end) {
            // Two mma that see the same (permuted) order of k in A and in x.
            const u32 a_first[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
            const u32 a_second[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
            UNROLL
            for (u32 n = 0; n < GROUPS; ++n) {
                const u32 x_first[2] = {x[i][n].x, x[i][n].y}, x_second[2] = {x[i][n].z, x[i][n].w};
                mma_16x8x16(sum[n], a_first, x_first);
                mma_16x8x16(sum[n], a_second, x_second);
            }
        }
    }
}

/// One unit: 8 * GROUPS rows of an item, one slice, one split. The whole block calls it.
template <u32 GROUPS, u32 AHEAD>
DEVICE void shrink_unit(const LoraShrinkArgs& args, const LoraItem& item, const elem* a, u32 split, float* v,
                        float (&partial)[SHRINK_WARPS][RANK_BLOCK][TILE_ROWS + 1]) {
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 group = lane / 4;       // the A rows group and group + 8, and the x rows 8 n + group, that this lane loads
    const u32 offset = lane % 4 * 8;  // its 8 of the step's 32 k values
    const elem* x_rows[GROUPS];
    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        // A short item repeats its last row: columns of a product do not mix, and what they hold is not written below.
        const u32 row = n * 8 + group < item.row_count ? n * 8 + group : item.row_count - 1;
        x_rows[n] = args.x + u64(item.first_row + row) * args.x_stride + offset;
    }
    const elem* a_row = a + u64(group) * SHRINK_K + offset;
    float sum[GROUPS][4];
    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        UNROLL
        for (u32 i = 0; i < 4; ++i) sum[n][i] = 0.0f;
    }
    // A plain unrolled loop would not keep the loads of AHEAD steps together: its bounds are known at run time only, so
    // every step would keep its own exit and wait for its own loads.
    const u32 k_end = STEPS * (split + 1) / LORA_SPLITS * K_STEP;
    u32 k = (STEPS * split / LORA_SPLITS + warp) * K_STEP;
    ROLLED
    for (; k + (AHEAD - 1) * WARPS_STEP < k_end; k += AHEAD * WARPS_STEP) {
        add_steps<GROUPS, AHEAD, true>(sum, a_row, x_rows, k, k_end);
    }
    if (AHEAD > 1 && k < k_end) add_steps<GROUPS, AHEAD, false>(sum, a_row, x_rows, k, k_end);

    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        const u32 row = n * 8 + lane % 4 * 2;
        partial[warp][group][row] = sum[n][0];
        partial[warp][group][row + 1] = sum[n][1];
        partial[warp][group + 8][row] = sum[n][2];
        partial[warp][group + 8][row + 1] = sum[n][3];
    }
    __syncthreads();
    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        const u32 row = n * 8 + thread / RANK_BLOCK, rank = thread % RANK_BLOCK;
        float total = 0.0f;
        UNROLL
        for (u32 w = 0; w < SHRINK_WARPS; ++w) total += partial[w][rank][row];
        if (n * 8 < item.row_count) v[row * RANK_BLOCK + rank] = row < item.row_count ? total : 0.0f;
    }
    __syncthreads();  // `partial` is free for the next unit
}

// The blocks that a multiprocessor must be able to hold matter: without that number ptxas saves registers by moving each
// load down to its mma, 3 in flight instead of 12. 8 groups of rows need more than the 128 registers that 4 blocks leave.
constexpr u32 SHRINK_BLOCKS = TILE_ROWS == 8 ? 4 : 3;

KERNEL_ENTRY(lora_shrink, LoraShrinkArgs, SHRINK_THREADS, SHRINK_BLOCKS) {
    // One column more than rows, so that the 16 ranks of a row, read together, lie in different banks.
    SHARED_ARRAY(float, partial, [SHRINK_WARPS][RANK_BLOCK][TILE_ROWS + 1]);
    const SiteWork& site = args.site;
    const u32 units = site.counts->lora_items * site.slices * LORA_SPLITS;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 split = unit % LORA_SPLITS, slice = unit / LORA_SPLITS % site.slices;
        const LoraItem item = site.items[unit / LORA_SPLITS / site.slices];
        const BlockDesc desc = lora_desc(site, item, slice);
        if (desc.a_unit == NOT_TARGETED) continue;  // the same for the whole block
        const elem* a = reinterpret_cast<const elem*>(site.arena + u64(desc.a_unit) * ARENA_UNIT_BYTES);
        float* v = site.v + u64(unit) * V_TILE;
        if (TILE_ROWS == 8 || item.row_count <= 8) {
            shrink_unit<1, 4>(args, item, a, split, v, partial);
        } else {
            shrink_unit<TILE_ROWS / 8, 1>(args, item, a, split, v, partial);
        }
    }
}
