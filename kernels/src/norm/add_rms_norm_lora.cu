// residual += y + its LoRA delta, rounded once, then out = norm(residual): what lora_expand_add and rms_norm give, without
// writing y and reading it again, and without rounding it in between.
//
// One block takes a row tile: its 8 warps take 16 * RUN columns each in turn, add the deltas and write the residual;
// then all 256 threads norm the tile's rows one after the other with the plain op's code, from L1. Rows without
// items get the plain op's bits; rows of no tile are neither read nor written.
//
// One multiprocessor for 8 rows: 8 warps with 4 KiB of B each in flight. The time is that of the longest tile, so
// with ranks of 64 and more the two kernels apart are the better choice.

#include "lora.cuh"
#include "norm.cuh"

constexpr u32 RUN = 8;             // consecutive columns of a lane
constexpr u32 COLUMNS = 16 * RUN;  // of a warp at a time

static_assert(TILE_ROWS == 8, "for steps that only decode");
static_assert(NORM_WIDTH % 16 == 0, "a lane's run is inside the row or outside");

struct AddRmsNormLoraArgs {
    SiteWork site;        // one slice
    elem* residual;       // [rows][NORM_WIDTH]
    const elem* y;        // [rows][NORM_WIDTH]
    const float* weight;  // [NORM_WIDTH]
    elem* out;            // [rows][NORM_WIDTH]
    float eps;
    u32 reserved;
};

/// residual += y + delta for one tile and COLUMNS columns.
DEVICE void add_columns(const AddRmsNormLoraArgs& args, const RowTile& tile, u32 column) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Run<RUN> residual[2][2], y[2][2];
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = 2 * t + odd, at = column + (half * 8 + g) * RUN;
            if (row < tile.row_count && at < NORM_WIDTH) {
                const u64 from = u64(tile.first_row + row) * NORM_WIDTH + at;
                residual[odd][half].load(args.residual + from);
                y[odd][half].load(args.y + from);
            }
        }
    }
    const auto delta = expand_tile<RUN, 1>(args.site, tile, 0, 0, column, NORM_WIDTH);
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = 2 * t + odd, at = column + (half * 8 + g) * RUN;
            if (row < tile.row_count && at < NORM_WIDTH) {
                Run<RUN> sum;
                UNROLL
                for (u32 w = 0; w < RUN / 2; ++w) {
                    float lo, hi, y_lo, y_hi;
                    unpack2(residual[odd][half].words[w], lo, hi);
                    unpack2(y[odd][half].words[w], y_lo, y_hi);
                    y_lo += delta.at(0, 2 * w, half, odd);
                    y_hi += delta.at(0, 2 * w + 1, half, odd);
                    sum.words[w] = pack2(lo + y_lo, hi + y_hi);
                }
                sum.store(args.residual + u64(tile.first_row + row) * NORM_WIDTH + at);
            }
        }
    }
}

KERNEL_ENTRY(add_rms_norm_lora, AddRmsNormLoraArgs, NORM_THREADS, 1) {
    for (u32 index = blockIdx.x; index < args.site.counts->row_tiles; index += gridDim.x) {
        const RowTile tile = args.site.tiles[index];
        for (u32 column = threadIdx.x / 32 * COLUMNS; column < NORM_WIDTH; column += NORM_WARPS * COLUMNS) {
            add_columns(args, tile, column);
        }
        __syncthreads();  // the residual is complete for every thread of the block
        for (u32 i = 0; i < tile.row_count; ++i) {
            const u64 at = u64(tile.first_row + i) * NORM_WIDTH;
            norm_row<NORM_WIDTH>(args.residual + at, nullptr, args.weight, args.out + at, args.eps);
        }
    }
}
