// A pipelined matrix product, the hardest user of the emulator: cp.async over three stages, ldmatrix, mma, four warps.
// Right in every mode; with a mistake planted in its pipeline, wrong or an error, in the races mode always an error.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr u32 PIPE_ROWS = 64, PIPE_COLUMNS = 64, PIPE_K = 32 * 7, PIPE_STEP = 32, PIPE_STAGES = 3, PIPE_THREADS = 128;
constexpr u32 PIPE_CHUNKS = PIPE_STEP / 8;  // of 16 bytes, in a row of a stage

struct PipelineArgs {
    u32 mistake;
    const elem *a, *b;  // [64][K] each
    float* c;           // [64][64] = a b^T
};

enum PipelineMistake : u32 { NONE, WAITS_FOR_TOO_FEW, NO_BARRIER_IN_LOOP, REFILLS_WHAT_IT_READS, NO_EMPTY_GROUPS, PIPELINE_MISTAKES };

struct Stage {
    Words4 a[PIPE_ROWS][PIPE_CHUNKS], b[PIPE_COLUMNS][PIPE_CHUNKS];
};

/// Two rows fill the 32 banks once, so eight rows that ldmatrix takes together turn their chunks every second row.
DEVICE u32 turned(u32 row, u32 chunk) { return chunk ^ (row / 2 % PIPE_CHUNKS); }

DEVICE void fetch(Stage& stage, const PipelineArgs& args, u32 step) {
    for (u32 i = threadIdx.x; i < PIPE_ROWS * PIPE_CHUNKS; i += PIPE_THREADS) {
        const u32 row = i / PIPE_CHUNKS, chunk = i % PIPE_CHUNKS, from = row * PIPE_K + step * PIPE_STEP + chunk * 8;
        cp_async16(&stage.a[row][turned(row, chunk)], args.a + from);
        cp_async16(&stage.b[row][turned(row, chunk)], args.b + from);
    }
}

DEVICE void multiply(float (&sums)[8][4], const Stage& stage) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    UNROLL
    for (u32 half = 0; half < 2; ++half) {
        u32 a[4], b[4];
        const u32 a_row = warp * 16 + lane % 16;
        ldmatrix_x4(a, &stage.a[a_row][turned(a_row, 2 * half + lane / 16)]);
        UNROLL
        for (u32 n = 0; n < 8; n += 2) {
            const u32 b_row = n * 8 + lane % 8 + lane / 16 * 8;
            ldmatrix_x4(b, &stage.b[b_row][turned(b_row, 2 * half + lane / 8 % 2)]);
            mma_16x8x16(sums[n], a, {b[0], b[1]});
            mma_16x8x16(sums[n + 1], a, {b[2], b[3]});
        }
    }
}

KERNEL_ENTRY(pipeline, PipelineArgs, PIPE_THREADS, 1) {
    DYNAMIC_SHARED(Stage, stages);
    constexpr u32 STEPS = PIPE_K / PIPE_STEP;
    float sums[8][4] = {};
    for (u32 step = 0; step + 1 < PIPE_STAGES; ++step) {
        fetch(stages[step], args, step);
        cp_async_commit();
    }
    for (u32 step = 0; step < STEPS; ++step) {
        if (args.mistake == WAITS_FOR_TOO_FEW) cp_async_wait<PIPE_STAGES - 1>();
        else cp_async_wait<PIPE_STAGES - 2>();
        if (args.mistake != NO_BARRIER_IN_LOOP) __syncthreads();
        const u32 next = step + PIPE_STAGES - 1;
        const u32 into = args.mistake == REFILLS_WHAT_IT_READS ? step % PIPE_STAGES : next % PIPE_STAGES;
        if (next < STEPS) fetch(stages[into], args, next);
        if (next < STEPS || args.mistake != NO_EMPTY_GROUPS) cp_async_commit();
        multiply(sums, stages[step % PIPE_STAGES]);
    }
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 n = 0; n < 8; ++n)
        for (u32 e = 0; e < 4; ++e)
            args.c[(warp * 16 + lane / 4 + e / 2 * 8) * PIPE_COLUMNS + n * 8 + lane % 4 * 2 + e % 2] = sums[n][e];
}

/// The error of a launch, or "wrong" if the product is.
std::string pipeline_result(u32 mistake, u32 schedule, u32 flags, const std::vector<Block>& operands) {
    const elem* a = reinterpret_cast<const elem*>(operands.data());
    const elem* b = a + PIPE_ROWS * PIPE_K;
    std::vector<float> c(PIPE_ROWS * PIPE_COLUMNS);
    const PipelineArgs args{mistake, a, b, c.data()};
    const std::string error = error_of(pipeline__launch, args, {1, 1, PIPE_THREADS, PIPE_STAGES * sizeof(Stage), schedule, flags, 1});
    if (!error.empty()) return error;
    for (u32 i = 0; i < c.size(); ++i) {
        double want = 0, scale = 0;
        for (u32 k = 0; k < PIPE_K; ++k) {
            const double product = double(to_float(a[i / 64 * PIPE_K + k])) * to_float(b[i % 64 * PIPE_K + k]);
            want += product, scale += std::fabs(product);
        }
        if (!(std::fabs(c[i] - want) <= 1e-6 * scale)) return "wrong";
    }
    return "";
}

void check_pipeline() {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<Block> operands((PIPE_ROWS + PIPE_COLUMNS) * PIPE_K * sizeof(elem) / sizeof(Block));
    elem* values = reinterpret_cast<elem*>(operands.data());
    for (u32 i = 0; i < (PIPE_ROWS + PIPE_COLUMNS) * PIPE_K; ++i) values[i] = to_elem(uniform(random));
    const u32 races = EMU_INSTRUMENTED ? EMU_RACES : 0;
    for (u32 mistake = 0; mistake < PIPELINE_MISTAKES; ++mistake) {
        u32 found = 0;
        for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
            const std::string result = pipeline_result(mistake, schedule, races, operands);
            if (mistake == NONE) check(result.empty(), "pipeline: " + result);
            found += EMU_INSTRUMENTED ? contains(result, "race") : !result.empty();
        }
        if (mistake != NONE)
            check(found >= (EMU_INSTRUMENTED ? SCHEDULES : 1), "pipeline mistake " + std::to_string(mistake) + " is found");
    }
    check(pipeline_result(NONE, 0, EMU_COUNT, operands).empty(), "pipeline, counted");
    EmuCounters counters;
    emu_counters(&counters);
    check(counters.shared_wavefronts == counters.shared_wavefronts_least, "the turned chunks have no bank conflicts");
    check(counters.global_load_sectors * 32 == counters.global_load_bytes, "and whole sectors are read");
}

}  // namespace
