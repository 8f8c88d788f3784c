// The second half of y += s * (x A^T) B^T, in place on the output of the base product:
//
//   y[row][first_col + o] = elem(y + sum over the row's items of item.scale * desc.scale * sum over rank of V[rank] B[o][rank])
//
// The delta is summed in f32 and y is rounded once. Rows without adapter, and slices that no item of a row targets, keep
// their bits. One warp takes the unit (row tile, 16 * RUN outputs of one slice); units are walked by stride, so any
// grid is right, and a block's warps take neighbouring outputs of one row tile: they share its V in L1. No barrier, no
// shared memory.
//
// Bytes per unit with one rank-16 item and RUN 8: 4 KiB of B, 512 * LORA_SPLITS of V from L1 or L2, and 512 of y for each
// row (read and written). One row per adapter (decode) is bound by B: 2 * RUN loads of 8 bytes a lane are 4 KiB in
// flight a warp. 64 rows per adapter (prefill) are bound by y: a lane's accesses of it are RUN elements wide, so with
// RUN 8 eight lanes cover a line of 128 bytes.

#include "lora.cuh"

constexpr u32 EXPAND_WARPS = 4;
constexpr u32 EXPAND_THREADS = EXPAND_WARPS * 32;
constexpr u32 RUN = EXPAND_RUN;                       // 4 or 8 consecutive outputs of a lane
constexpr u32 COLUMNS = 16 * RUN;                     // of a unit
// Groups of 8 rows that share one read of B, as far as registers allow; a tile's other groups find B in L1.
constexpr u32 GROUPS = TILE_ROWS == 8 || RUN == 8 ? 1 : 2;
constexpr u32 EXPAND_BLOCKS = TILE_ROWS == 8 ? 4 : 3;  // that a multiprocessor can hold

struct LoraExpandAddArgs {
    SiteWork site;
    elem* y;                            // [rows][y_stride]
    u32 y_stride;                       // elements, a multiple of 8
    u32 first_col[SITE_SLICES_MAX];     // multiples of 8
    u32 d_out[SITE_SLICES_MAX];         // multiples of 16
    u32 reserved;
};

/// Which outputs a unit has.
struct Place {
    u32 slice;
    u32 column;     // of the slice
    u32 first_col;  // of the slice in y
    u32 d_out;
};

/// Units of a row tile: those of one slice after those of another. Slices that a site does not have are 0 wide.
DEVICE u32 units_of_slice(const LoraExpandAddArgs& args, u32 slice) { return (args.d_out[slice] + COLUMNS - 1) / COLUMNS; }

/// The place of unit `part` of a row tile. Unrolled, since an argument indexed at run time is copied to local memory.
DEVICE Place place_of(const LoraExpandAddArgs& args, u32 part) {
    Place at = {0, part * COLUMNS, args.first_col[0], args.d_out[0]};
    u32 before = 0;
    UNROLL
    for (u32 slice = 1; slice < SITE_SLICES_MAX; ++slice) {
        before += units_of_slice(args, slice - 1);
        if (part >= before) at = {slice, (part - before) * COLUMNS, args.first_col[slice], args.d_out[slice]};
    }
    return at;
}

/// Adds the delta of GROUPS groups of rows and COLUMNS outputs. `y` is the element of the tile's first row and of the first
/// of these outputs.
DEVICE void add_delta(const SiteWork& site, const RowTile& tile, const Place& at, u32 first_n, elem* y, u32 y_stride) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Where the lane's runs lie, and y as it is: asked for before the delta's own loads.
    Run<RUN> old[GROUPS][2][2];
    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        UNROLL
        for (u32 odd = 0; odd < 2; ++odd) {
            UNROLL
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = (first_n + n) * 8 + 2 * t + odd, run = (half * 8 + g) * RUN;
                if (row < tile.row_count && at.column + run < at.d_out) {
                    old[n][odd][half].load(y + u64(row) * y_stride + run);
                }
            }
        }
    }
    const auto delta = expand_tile<RUN, GROUPS>(site, tile, at.slice, first_n, at.column, at.d_out);
    if (!delta.touched) return;
    UNROLL
    for (u32 n = 0; n < GROUPS; ++n) {
        UNROLL
        for (u32 odd = 0; odd < 2; ++odd) {
            UNROLL
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = (first_n + n) * 8 + 2 * t + odd, run = (half * 8 + g) * RUN;
                if (row < tile.row_count && at.column + run < at.d_out) {
                    Run<RUN> sum;
                    UNROLL
                    for (u32 w = 0; w < RUN / 2; ++w) {
                        float lo, hi;
                        unpack2(old[n][odd][half].words[w], lo, hi);
                        sum.words[w] = pack2(lo + delta.at(n, 2 * w, half, odd), hi + delta.at(n, 2 * w + 1, half, odd));
                    }
                    sum.store(y + u64(row) * y_stride + run);
                }
            }
        }
    }
}

KERNEL_ENTRY(lora_expand_add, LoraExpandAddArgs, EXPAND_THREADS, EXPAND_BLOCKS) {
    u32 per_tile = 0;
    UNROLL
    for (u32 slice = 0; slice < SITE_SLICES_MAX; ++slice) per_tile += units_of_slice(args, slice);
    const u32 units = args.site.counts->row_tiles * per_tile;
    const u32 first = blockIdx.x * EXPAND_WARPS + threadIdx.x / 32;
    for (u32 unit = first; unit < units; unit += gridDim.x * EXPAND_WARPS) {
        const RowTile tile = args.site.tiles[unit / per_tile];
        if (tile.item_count == 0) continue;  // rows of the base model
        const Place at = place_of(args, unit % per_tile);
        elem* y = args.y + u64(tile.first_row) * args.y_stride + at.first_col + at.column;
        for (u32 n = 0; n * 8 < tile.row_count; n += GROUPS) add_delta(args.site, tile, at, n, y, args.y_stride);
    }
}
