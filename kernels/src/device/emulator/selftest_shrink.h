// A whole kernel for the emulator's self-test: a LoRA shrink in which every row of a batch may use another adapter, checked
// against double precision. V[row][rank] = sum over k of x[row][k] * A[rank][k]; x, A: elem, V: fp32. Rows of one adapter
// come as items of up to 8; k is cut into splits that write tiles of their own.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int RANK_BLOCK = 16;
constexpr int TILE_ROWS = 8;
constexpr int TILE = TILE_ROWS * RANK_BLOCK;
constexpr int SHRINK_WARPS = 4;
constexpr int SHRINK_THREADS = SHRINK_WARPS * 32;
constexpr int K_STEP = 32;                    // k values that one warp takes per step: 4 lanes x 8 values
constexpr u32 LOADS_AHEAD = 4;                // steps of a warp whose loads are in flight together
constexpr u32 ARENA_UNIT_BYTES = 256;         // descriptors count in these from the arena's start
constexpr u32 NOT_TARGETED = 0xffffffffu;     // the adapter leaves this slice alone

static_assert(SHRINK_THREADS == TILE, "each thread writes one element of a tile");

struct WorkItem {
    u32 block_row;  // row of the descriptor table: one rank block of one resident adapter
    u32 first_row;  // index into row_order
    u32 row_count;  // 1 ..= TILE_ROWS
    float scale;    // for the expand
};

struct StepCounts {
    u32 items;
    u32 splits;
};

/// Where one rank block of one slice lies: A as [16][K], B as [out][16].
struct BlockDesc {
    u32 a_unit, b_unit;
};

struct ShrinkArgs {
    const elem* x;             // [rows][K]
    const u32* row_order;      // rows of x, sorted so that each adapter is one run
    const WorkItem* items;
    const StepCounts* counts;
    const unsigned char* arena;
    const BlockDesc* descs;    // already moved to this layer and site: [block_row * desc_stride + slice]
    u32 desc_stride;
    u32 slices;                // outputs that share x: 3 for q, k, v; 2 for gate, up; else 1
    float* v_tiles;            // [item][slice][split][TILE_ROWS][RANK_BLOCK]
};

/// Adds one step of 32 k: two mma that see the same (permuted) order of k in A and in x.
DEVICE void add_step(float (&sum)[4], const Words4& low, const Words4& high, const Words4& x) {
    mma_16x8x16(sum, {low.x, high.x, low.y, high.y}, {x.x, x.y});
    mma_16x8x16(sum, {low.z, high.z, low.w, high.w}, {x.z, x.w});
}

/// The launch is 1-D with SHRINK_THREADS threads a block.
template <int K>
DEVICE void lora_shrink_body(const ShrinkArgs& args) {
    static_assert(K % K_STEP == 0, "K must be a multiple of 32");
    constexpr u32 STEPS = K / K_STEP;
    SHARED_ARRAY(float, partial, [SHRINK_WARPS][RANK_BLOCK][TILE_ROWS + 1]);

    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 group = lane / 4;       // the A rows group and group + 8, and the x row, that this lane loads
    const u32 offset = lane % 4 * 8;  // its 8 of the step's 32 k values

    const u32 slices = args.slices, splits = args.counts->splits;
    const u32 units = args.counts->items * slices * splits;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 split = unit % splits, slice = unit / splits % slices;
        const WorkItem item = args.items[unit / splits / slices];
        const BlockDesc desc = args.descs[u64(item.block_row) * args.desc_stride + slice];
        if (desc.a_unit == NOT_TARGETED) continue;  // the same for the whole block

        const elem* a = reinterpret_cast<const elem*>(args.arena + u64(desc.a_unit) * ARENA_UNIT_BYTES);
        const elem* a_low = a + u64(group) * K + offset;
        const elem* a_high = a_low + 8 * u64(K);
        // A short item repeats its last row: columns of a product do not mix, and what they hold is not written below.
        const u32 x_index = item.first_row + (group < item.row_count ? group : item.row_count - 1);
        const elem* x_row = args.x + u64(args.row_order[x_index]) * K + offset;

        // The loads of LOADS_AHEAD steps come before the first mma that uses them. Unrolling a plain loop does not give
        // that: its bounds are known at run time only, so every step keeps its own exit and waits for its own loads.
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const u32 end = STEPS * (split + 1) / splits;
        u32 step = STEPS * split / splits + warp;
        for (; step + (LOADS_AHEAD - 1) * SHRINK_WARPS < end; step += LOADS_AHEAD * SHRINK_WARPS) {
            Words4 low[LOADS_AHEAD], high[LOADS_AHEAD], x[LOADS_AHEAD];
            UNROLL
            for (u32 i = 0; i < LOADS_AHEAD; ++i) {
                const u32 k = (step + i * SHRINK_WARPS) * K_STEP;
                low[i] = load16_once(a_low + k);
                high[i] = load16_once(a_high + k);
                x[i] = load16(x_row + k);
            }
            UNROLL
            for (u32 i = 0; i < LOADS_AHEAD; ++i) add_step(sum, low[i], high[i], x[i]);
        }
        for (; step < end; step += SHRINK_WARPS) {
            const u32 k = step * K_STEP;
            add_step(sum, load16_once(a_low + k), load16_once(a_high + k), load16(x_row + k));
        }

        const u32 column = lane % 4 * 2;
        partial[warp][group][column] = sum[0];
        partial[warp][group][column + 1] = sum[1];
        partial[warp][group + 8][column] = sum[2];
        partial[warp][group + 8][column + 1] = sum[3];
        __syncthreads();
        const u32 row = thread / RANK_BLOCK, rank = thread % RANK_BLOCK;
        float total = 0.0f;
        for (int w = 0; w < SHRINK_WARPS; ++w) total += partial[w][rank][row];
        args.v_tiles[u64(unit) * TILE + thread] = row < item.row_count ? total : 0.0f;
        __syncthreads();  // `partial` is free for the next unit
    }
}

KERNEL_ENTRY(shrink_576, ShrinkArgs, SHRINK_THREADS, 4) { lora_shrink_body<576>(args); }
KERNEL_ENTRY(shrink_2048, ShrinkArgs, SHRINK_THREADS, 4) { lora_shrink_body<2048>(args); }

struct Segment {
    int rank;  // 0: rows without adapter
    int rows;
};

struct Mix {
    const char* name;
    std::vector<Segment> segments;
};

const Mix MIXES[] = {
    {"one row, rank 8", {{8, 1}}},
    {"one adapter, 19 rows, rank 64", {{64, 19}}},
    {"ranks 8 16 24 40, some rows without", {{8, 3}, {0, 4}, {16, 8}, {24, 9}, {0, 1}, {40, 1}}},
    {"nine adapters, a row each", {{16, 1}, {16, 1}, {8, 1}, {1, 1}, {16, 1}, {32, 1}, {16, 1}, {64, 1}, {17, 1}}},
    {"no adapter at all", {{0, 5}}},
};

constexpr float UNTOUCHED = -12345.0f;
constexpr double TOLERANCE = 1e-6;  // of the sum of |x a|: far above what fp32 sums of this length lose

/// What the host of a step would build, and the operands, with garbage wherever the kernel has no business.
struct Batch {
    int K;
    u32 slices, desc_stride;
    std::mt19937_64 random;
    std::vector<elem> x;
    std::vector<u32> row_order;
    std::vector<WorkItem> items;
    std::vector<BlockDesc> descs;
    unsigned char* arena = nullptr;
    std::vector<unsigned char> arena_bytes;

    Batch(const Mix& mix, int K, u32 slices) : K(K), slices(slices), desc_stride(slices + 2), random(K * 31 + slices) {
        u32 rows = 0;
        for (const Segment& segment : mix.segments) rows += segment.rows;
        row_order.resize(rows);
        std::iota(row_order.begin(), row_order.end(), 0u);
        std::shuffle(row_order.begin(), row_order.end(), random);
        x.assign(size_t(rows) * K, elem{0x7fff});  // NaN: rows without adapter must not leak into any tile

        u32 first = 0, block_rows = 0, next_unit = 0;
        for (const Segment& segment : mix.segments) {
            const u32 blocks = (segment.rank + RANK_BLOCK - 1) / RANK_BLOCK;
            for (int row = 0; segment.rank > 0 && row < segment.rows; ++row) fill(&x[size_t(row_order[first + row]) * K], K);
            for (u32 block = 0; block < blocks; ++block)
                for (u32 row = 0; row < u32(segment.rows); row += TILE_ROWS)
                    items.push_back({block_rows + block, first + row, std::min<u32>(TILE_ROWS, segment.rows - row), 1.0f});
            for (u32 block = 0; block < blocks; ++block)
                for (u32 slice = 0; slice < desc_stride; ++slice) {
                    const bool targeted = slice < slices && (slices == 1 || random() % 4 != 0);
                    descs.push_back({targeted ? next_unit : NOT_TARGETED, NOT_TARGETED});
                    if (!targeted) continue;
                    next_unit += RANK_BLOCK * K * sizeof(elem) / ARENA_UNIT_BYTES + 1;  // a gap after each block
                    arena_bytes.resize(size_t(next_unit) * ARENA_UNIT_BYTES, 0xff);
                    const u32 ranks = std::min<u32>(RANK_BLOCK, segment.rank - block * RANK_BLOCK);
                    auto* a = reinterpret_cast<elem*>(arena_bytes.data() + size_t(descs.back().a_unit) * ARENA_UNIT_BYTES);
                    std::fill(a, a + RANK_BLOCK * K, elem{0});
                    fill(a, size_t(ranks) * K);
                }
            block_rows += blocks;
            first += segment.rows;
        }
        arena = arena_bytes.data();
    }

    void fill(elem* values, size_t count) {
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
        for (size_t i = 0; i < count; ++i) values[i] = to_elem(uniform(random));
    }
};

/// Runs one launch; returns the largest error relative to the sum of |x a|. Counts what must not happen in `failures`.
template <int K>
double check_shrink(Batch& batch, u32 splits, u32 grid, u32 schedule, const std::string& name) {
    const size_t tiles = batch.items.size() * batch.slices * splits;
    std::vector<float> v(tiles * TILE, UNTOUCHED);
    const StepCounts counts{u32(batch.items.size()), splits};
    const ShrinkArgs args{batch.x.data(), batch.row_order.data(), batch.items.data(), &counts, batch.arena,
                          batch.descs.data(), batch.desc_stride, batch.slices, v.data()};
    LaunchFunction* shrink = K == 576 ? shrink_576__launch : shrink_2048__launch;
    const u32 flags = EMU_INSTRUMENTED ? EMU_RACES : 0;
    const std::string error = error_of(shrink, args, {grid, 1, SHRINK_THREADS, 0, schedule, flags, splits + grid});
    check(error.empty(), name + ": " + error);

    double worst = 0;
    for (size_t i = 0; i < batch.items.size(); ++i)
        for (u32 slice = 0; slice < batch.slices; ++slice) {
            const WorkItem& item = batch.items[i];
            const u32 unit = batch.descs[item.block_row * batch.desc_stride + slice].a_unit;
            const float* tile = &v[(i * batch.slices + slice) * splits * TILE];
            if (unit == NOT_TARGETED) {
                check(std::all_of(tile, tile + splits * TILE, [](float f) { return f == UNTOUCHED; }), name + ": wrote a tile of a slice that is not targeted");
                continue;
            }
            const auto* a = reinterpret_cast<const elem*>(batch.arena + size_t(unit) * ARENA_UNIT_BYTES);
            for (u32 row = 0; row < TILE_ROWS; ++row)
                for (u32 rank = 0; rank < RANK_BLOCK; ++rank) {
                    double want = 0, scale = 1e-30, got = 0;
                    for (u32 split = 0; split < splits; ++split) got += tile[split * TILE + row * RANK_BLOCK + rank];
                    if (row < item.row_count)
                        for (int k = 0; k < K; ++k) {
                            const double product = double(to_float(batch.x[size_t(batch.row_order[item.first_row + row]) * K + k])) * to_float(a[rank * K + k]);
                            want += product;
                            scale += std::fabs(product);
                        }
                    const double error = std::fabs(got - want) / scale;
                    if (!(error <= TOLERANCE)) check(false, name + ": wrong value");
                    worst = std::max(worst, error);
                }
        }
    return worst;
}

template <int K>
void check_all_mixes() {
    for (const Mix& mix : MIXES) {
        double worst = 0;
        int launches = 0;
        for (u32 slices : {1u, 3u}) {
            Batch batch(mix, K, slices);
            for (u32 splits : {1u, 4u, 7u})
                for (u32 grid : {1u, 5u, 400u})  // fewer blocks than units, and more
                    for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
                        if (grid == 400 && schedule != 0) continue;
                        worst = std::max(worst, check_shrink<K>(batch, splits, grid, schedule, mix.name));
                        ++launches;
                    }
        }
        std::printf("lora_shrink K=%-5d %-38s %3d launches, largest error %.1e of sum |x a|\n", K, mix.name, launches, worst);
    }
}

}  // namespace
