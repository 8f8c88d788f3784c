// out[row][i] = silu(gate + d_gate) * (up + d_up) with the LoRA deltas of gate and up: what lora_expand_add and silu_mul give,
// without writing gate_up and reading it again, and without rounding it in between. Of the expand's traffic for a layer
// two thirds are gate_up.
//
// One warp takes the unit (row tile, 16 * RUN columns of gate and of up); units are walked by stride, so any grid is
// right. Rows without items get the plain op's bits; rows of no tile are neither read nor written. Bound by B, 64 bytes
// a column and rank-16 item: a warp has 2 KiB of it in flight, and the 16 warps that fit a multiprocessor 32 KiB. RUN 8
// would have 4 KiB in each of fewer warps, as it holds both deltas.

#include "lora.cuh"
#include "silu.cuh"

constexpr u32 SILU_LORA_WARPS = 4;
constexpr u32 SILU_LORA_THREADS = SILU_LORA_WARPS * 32;
constexpr u32 RUN = 4;            // consecutive columns of a lane
constexpr u32 COLUMNS = 16 * RUN;  // of a unit

static_assert(TILE_ROWS == 8, "for steps that only decode");

struct SiluMulLoraArgs {
    SiteWork site;        // slices: gate, up
    const elem* gate_up;  // [rows][2 * width]
    elem* out;            // [rows][width]
    u32 width;            // a multiple of 16
    u32 reserved;
};

DEVICE void silu_tile(const SiluMulLoraArgs& args, const RowTile& tile, u32 column) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Run<RUN> gate[2][2], up[2][2];
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = 2 * t + odd, at = column + (half * 8 + g) * RUN;
            if (row < tile.row_count && at < args.width) {
                const elem* from = args.gate_up + u64(tile.first_row + row) * 2 * args.width + at;
                gate[odd][half].load(from);
                up[odd][half].load(from + args.width);
            }
        }
    }
    const auto gate_delta = expand_tile<RUN, 1>(args.site, tile, 0, 0, column, args.width);
    const auto up_delta = expand_tile<RUN, 1>(args.site, tile, 1, 0, column, args.width);
    UNROLL
    for (u32 odd = 0; odd < 2; ++odd) {
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = 2 * t + odd, at = column + (half * 8 + g) * RUN;
            if (row < tile.row_count && at < args.width) {
                Run<RUN> out;
                UNROLL
                for (u32 w = 0; w < RUN / 2; ++w) {
                    float gate_lo, gate_hi, up_lo, up_hi;
                    unpack2(gate[odd][half].words[w], gate_lo, gate_hi);
                    unpack2(up[odd][half].words[w], up_lo, up_hi);
                    gate_lo += gate_delta.at(0, 2 * w, half, odd);
                    gate_hi += gate_delta.at(0, 2 * w + 1, half, odd);
                    up_lo += up_delta.at(0, 2 * w, half, odd);
                    up_hi += up_delta.at(0, 2 * w + 1, half, odd);
                    out.words[w] = pack2(swiglu(gate_lo, up_lo), swiglu(gate_hi, up_hi));
                }
                out.store(args.out + u64(tile.first_row + row) * args.width + at);
            }
        }
    }
}

KERNEL_ENTRY(silu_mul_lora, SiluMulLoraArgs, SILU_LORA_THREADS, 4) {
    const u32 per_tile = (args.width + COLUMNS - 1) / COLUMNS;
    const u32 units = args.site.counts->row_tiles * per_tile;
    const u32 first = blockIdx.x * SILU_LORA_WARPS + threadIdx.x / 32;
    for (u32 unit = first; unit < units; unit += gridDim.x * SILU_LORA_WARPS) {
        silu_tile(args, args.site.tiles[unit / per_tile], unit % per_tile * COLUMNS);
    }
}
