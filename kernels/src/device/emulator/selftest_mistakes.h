// Planted mistakes that every build of the emulator must find.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <cmath>
#include <set>
#include <string>
#include <vector>

namespace {

struct Probe {
    u32 which;
    float* out;  // 64 values, at a multiple of 16
};

constexpr u32 ALL_LANES = 0xffffffffu;

enum Mistake : u32 {
    LANE_MISSING,
    WARP_MISSING,
    MIXED_COLLECTIVES,
    MIXED_BARRIERS,
    TWO_SHUFFLES,
    TWO_BARRIERS,
    PARTIAL_MASK,
    MISALIGNED_LOAD,
    LOAD_OF_SHARED,
    MISALIGNED_SHARED,
    COPIES_AT_THE_END,
    SHARED_TOO_LARGE,
};

KERNEL_ENTRY(mistake, Probe, 64, 1) {
    const u32 thread = threadIdx.x;
    SHARED_ARRAY(float, plain, [64]);
    SHARED_ARRAY(Words4, rows, [64]);
    if (args.which == LANE_MISSING && thread != 7) __syncwarp();
    if (args.which == WARP_MISSING && thread < 32) __syncthreads();
    // In one line each, or the line alone would tell.
    if (args.which == MIXED_COLLECTIVES) thread % 2 ? __syncwarp() : void(__any_sync(ALL_LANES, true));
    if (args.which == MIXED_BARRIERS) thread < 32 ? __syncthreads() : void(__syncthreads_or(1));
    if (args.which == TWO_SHUFFLES) {
        if (thread % 2) args.out[thread] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
        else args.out[thread] = __shfl_xor_sync(ALL_LANES, 2.0f, 1);
    }
    if (args.which == TWO_BARRIERS) {
        if (thread < 32) __syncthreads();
        else __syncthreads();
    }
    if (args.which == PARTIAL_MASK) __shfl_sync(0xffffu, 1, 0);
    if (args.which == MISALIGNED_LOAD) load16(args.out + 1);
    if (args.which == LOAD_OF_SHARED) load16(&rows[thread]);
    if (args.which == MISALIGNED_SHARED) store16(&plain[thread % 16 * 4], Words4{0, 0, 0, 0});
    if (args.which == COPIES_AT_THE_END) {
        cp_async16(&rows[thread], args.out);
        cp_async_commit();
    }
    if (args.which == SHARED_TOO_LARGE) {
        SHARED_ARRAY(float, large, [48 << 8]);
        large[thread] = 0;
    }
}

struct Expected {
    Mistake mistake;
    const char *text, *what;
};

const Expected EXPECTED[] = {
    {LANE_MISSING, "deadlock", "lane missing from a collective"},
    {WARP_MISSING, "deadlock", "warp missing from a barrier"},
    {MIXED_COLLECTIVES, "while another lane", "lanes in different collectives"},
    {MIXED_BARRIERS, "while another thread", "threads in different barriers"},
    {TWO_SHUFFLES, "in line", "lanes at two shuffles"},
    {TWO_BARRIERS, "in line", "threads at two barriers"},
    {PARTIAL_MASK, "full-warp", "partial mask"},
    {MISALIGNED_LOAD, "multiple of 16", "misaligned load"},
    {LOAD_OF_SHARED, "shared memory", "load16 of a shared address"},
    {MISALIGNED_SHARED, "multiple of 16", "wide access to an array of floats"},
    {COPIES_AT_THE_END, "in flight", "kernel ends with copies in flight"},
    {SHARED_TOO_LARGE, "48 KiB", "too much static shared memory"},
};

// Thread 0 reads what no one wrote, then what a copy that has not landed will bring, then the landed copy.
KERNEL_ENTRY(reads_unwritten, Probe, 64, 1) {
    SHARED_ARRAY(float, tile, [64]);
    SHARED_ARRAY(Float4, row, [1]);
    if (threadIdx.x == 0) args.out[0] = tile[3];
    if (threadIdx.x == 0 && args.which == 1) {
        row[0] = Float4{1, 1, 1, 1};
        cp_async16(row, args.out + 32);
        cp_async_commit();
        cp_async_commit();
        cp_async_wait<2>();
        args.out[1] = row[0].x;
        cp_async_wait<1>();
        args.out[2] = row[0].x;
        cp_async16(row, nullptr, false);
        cp_async_commit();
        cp_async_wait<0>();
        args.out[3] = row[0].x;
    }
}

// Warp 0 writes, warp 1 reads, no barrier between: without the race check only some schedules show it.
KERNEL_ENTRY(barrier_missing, Probe, 64, 1) {
    SHARED_ARRAY(float, tile, [32]);
    if (threadIdx.x < 32) tile[threadIdx.x] = 1.0f;
    if (threadIdx.x == 32) args.out[0] = tile[0];
}

// Lane 0 of each warp notes when it passes.
KERNEL_ENTRY(notes_order, Probe, 64, 1) {
    const u32 warp = threadIdx.x / 32;
    u32* next = reinterpret_cast<u32*>(args.out + 63);
    if (threadIdx.x % 32 == 0) args.out[atomicAdd(next, 1u)] = float(2 * warp);
    __syncwarp();
    if (threadIdx.x % 32 == 0) args.out[atomicAdd(next, 1u)] = float(2 * warp + 1);
}

void check_schedules() {
    const float ORDERS[3][4] = {{0, 2, 1, 3}, {0, 1, 2, 3}, {2, 3, 0, 1}};
    const auto order = [](u32 schedule, u64 seed) {
        alignas(16) float out[64] = {};
        check(error_of(notes_order__launch, Probe{0, out}, {1, 1, 64, 0, schedule, 0, seed}).empty(), "noting runs");
        return std::vector<float>(out, out + 4);
    };
    for (u32 schedule = 0; schedule < 3; ++schedule)
        check(order(schedule, 1) == std::vector<float>(ORDERS[schedule], ORDERS[schedule] + 4), "schedule " + std::to_string(schedule));
    std::set<std::vector<float>> orders;
    for (u64 seed = 0; seed < 32; ++seed) {
        orders.insert(order(3, seed));
        check(order(3, seed) == order(3, seed), "a seed repeats its order");
    }
    check(orders.size() >= 4, "seeds give different orders");
}

void check_mistakes() {
    alignas(16) float out[64] = {};
    for (const Expected& expected : EXPECTED)
        for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
            const std::string error = error_of(mistake__launch, Probe{expected.mistake, out}, {1, 1, 64, 0, schedule, 0, 1});
            check(contains(error, expected.text), std::string(expected.what) + ": " + error);
            check(contains(error, "kernel mistake, block (0,0)"), "the error names kernel and block");
        }
    out[32] = 5;
    check(error_of(reads_unwritten__launch, Probe{1, out}, {1, 1, 64, 0, 0, 0, 1}).empty(), "copies run");
    check(std::isnan(out[0]), "unwritten shared memory reads as NaN");
    check(std::isnan(out[1]) && out[2] == 5 && out[3] == 0, "a copy lands at its wait, not before");

    bool shown = false;
    for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
        error_of(barrier_missing__launch, Probe{0, out}, {1, 1, 64, 0, schedule, 0, 1});
        shown |= std::isnan(out[0]);
    }
    check(shown, "a missing barrier shows under some schedule");

    check_schedules();

    const Probe probe{99, out};
    check(contains(error_of(mistake__launch, probe, {1, 1, 96, 0, 0, 0, 1}), "KERNEL_ENTRY"), "block larger than stated");
    check(contains(error_of(mistake__launch, probe, {1, 1, 48, 0, 0, 0, 1}), "32, 64"), "block of no whole warps");
    check(contains(error_of(mistake__launch, probe, {1, 1, 64, 0, 4, 0, 1}), "schedule"), "unknown schedule");
    check(mistake__args_bytes() == sizeof(Probe), "args_bytes");
    if (!EMU_INSTRUMENTED)
        check(contains(error_of(mistake__launch, probe, {1, 1, 64, 0, 0, EMU_RACES, 1}), "-fsanitize=thread"), "no false safety");
}

}  // namespace
