// Planted races, each of which the races mode must find under every schedule, and their corrected forms, which must pass.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <string>
#include <vector>

namespace {

struct RaceArgs {
    u32 which;
    bool correct;
    const float* in;  // 64 x 4 values
    float* out;       // 64 x 4
    u32* words;       // 64 zeros
};

// ---- Shared memory ------------------------------------------------------------------------------------------------

enum SharedRace : u32 {
    NO_BARRIER,          // write, read by another warp
    NO_BARRIER_BEFORE_REFILL,  // read, write by another warp
    NO_WARP_BARRIER,
    SHUFFLE_IS_NO_BARRIER,
    TWO_WARPS_WRITE,
    HALVES_OF_A_WORD,
    ATOMIC_AND_PLAIN,
    LDMATRIX_OF_OWN_ROWS,
    NO_COPY_WAIT,
    COPY_WAIT_NO_BARRIER,
    COPY_INTO_WHAT_IS_READ,
    SHARED_RACES,
};

const char* const SHARED_NAMES[] = {
    "missing __syncthreads between write and read", "missing __syncthreads between read and write", "missing __syncwarp",
    "a shuffle in place of __syncwarp", "two warps write one word", "two warps write one half of a word",
    "atomic and plain read", "ldmatrix right after the stores", "missing cp_async_wait", "cp_async_wait without a barrier",
    "cp_async into rows that others still read",
};

DEVICE void race_of_copies(const RaceArgs& args, float (&tile)[64], Float4 (&rows)[64]) {
    const u32 thread = threadIdx.x;
    if (args.which == COPY_INTO_WHAT_IS_READ) {
        rows[thread] = Float4{1, 2, 3, 4};
        __syncthreads();
        if (thread < 32) tile[thread] = rows[thread].x;
        if (args.correct) __syncthreads();
        if (thread >= 32) cp_async16(&rows[thread - 32], args.in);
        cp_async_commit();
        cp_async_wait<0>();
        return;
    }
    cp_async16(&rows[thread], args.in + 4 * thread);
    cp_async_commit();
    if (args.correct || args.which != NO_COPY_WAIT) cp_async_wait<0>();
    if (args.correct || args.which != COPY_WAIT_NO_BARRIER) __syncthreads();
    args.out[thread] = rows[63 - thread].y;
    if (!args.correct) cp_async_wait<0>();
}

KERNEL_ENTRY(shared_race, RaceArgs, 64, 1) {
    const u32 thread = threadIdx.x;
    SHARED_ARRAY(float, tile, [64]);
    SHARED_ARRAY(Float4, rows, [64]);
    SHARED_ARRAY(u16, halves, [2]);
    SHARED_ARRAY(u32, count, [1]);
    switch (args.which) {
        case NO_BARRIER:
            tile[thread] = float(thread);
            if (args.correct) __syncthreads();
            args.out[thread] = tile[(thread + 32) % 64];
            break;
        case NO_BARRIER_BEFORE_REFILL:
            tile[thread] = float(thread);
            __syncthreads();
            args.out[thread] = tile[(thread + 32) % 64];
            if (args.correct) __syncthreads();
            tile[thread] = 0;
            break;
        case NO_WARP_BARRIER:
        case SHUFFLE_IS_NO_BARRIER:
            tile[thread] = float(thread);
            if (args.which == SHUFFLE_IS_NO_BARRIER) __shfl_xor_sync(0xffffffffu, thread, 1);
            if (args.correct) __syncwarp();
            args.out[thread] = tile[thread ^ 1];
            break;
        case TWO_WARPS_WRITE:
            if (thread == 0 || (thread == 32 && !args.correct)) tile[3] = 1.0f;
            break;
        case HALVES_OF_A_WORD:
            if (thread == 5) halves[0] = 1;
            if (thread == 40) halves[args.correct ? 1 : 0] = 1;
            break;
        case ATOMIC_AND_PLAIN:
            if (thread == 0) count[0] = 0;
            __syncthreads();
            atomicAdd(&count[0], 1u);
            if (args.correct) __syncthreads();
            args.out[thread] = float(count[0]);
            break;
        case LDMATRIX_OF_OWN_ROWS: {
            rows[thread] = Float4{1, 2, 3, 4};
            if (args.correct) __syncwarp();
            u32 words[4];
            ldmatrix_x4(words, &rows[thread]);
            args.out[thread] = bits_float(words[0]);
            break;
        }
        default: race_of_copies(args, tile, rows);
    }
}

// ---- Global memory ------------------------------------------------------------------------------------------------

enum GlobalRace : u32 {
    TWO_BLOCKS_WRITE,
    READ_OF_ANOTHER_BLOCK,
    READ_BEFORE_ANOTHER_WRITES,
    READ_ONLY_LOAD_OF_OWN,
    LAST_BLOCK_NO_FENCE,
    LAST_BLOCK_PLAIN_LOAD,
    LAST_BLOCK_NO_ATOMIC,
    PLAIN_RESET_OF_COUNTER,
    THREADS_OF_A_BLOCK,
    GLOBAL_RACES,
};

const char* const GLOBAL_NAMES[] = {
    "two blocks write one word", "a block reads what another wrote", "a block writes what another read",
    "read-only load of what the block wrote", "last block reads what was not fenced", "last block reads past its cache",
    "reader that asked no atomic", "plain write to a counter of all blocks", "missing __syncthreads around global memory",
};

// Every block writes a row; the last to arrive adds them up.
DEVICE void last_block_sums(const RaceArgs& args) {
    const u32 thread = threadIdx.x;
    SHARED_ARRAY(u32, is_last, [1]);
    if (thread < 16) storef4(args.out + blockIdx.x * 64 + thread * 4, Float4{1, 2, 3, 4});
    __syncthreads();
    if (thread == 0) {
        if (args.correct || args.which != LAST_BLOCK_NO_FENCE) __threadfence();
        const bool asks = args.correct || args.which != LAST_BLOCK_NO_ATOMIC;
        is_last[0] = asks ? atomicAdd(args.words, 1u) == gridDim.x - 1 : blockIdx.x == 2;
    }
    __syncthreads();
    if (is_last[0] == 0 || thread >= 16) return;
    float sum = 0;
    for (u32 block = 0; block < gridDim.x; ++block) {
        const float* from = args.out + block * 64 + thread * 4;
        const bool plain = !args.correct && args.which == LAST_BLOCK_PLAIN_LOAD;
        sum += plain ? *from : loadf4_fresh(from).x + static_cast<const volatile float*>(from)[1];
    }
    args.out[192 + thread] = sum;
    if (thread == 0 && args.which == PLAIN_RESET_OF_COUNTER) {
        if (args.correct) atomicExch(args.words, 0u);
        else args.words[0] = 0;
    }
}

KERNEL_ENTRY(global_race, RaceArgs, 64, 1) {
    const u32 thread = threadIdx.x, block = blockIdx.x, me = block * 64 + thread;
    const u32 other = args.correct ? me : (me + 64) % 192;
    switch (args.which) {
        case TWO_BLOCKS_WRITE: args.out[args.correct ? me : thread] = 1; break;
        case READ_OF_ANOTHER_BLOCK:
        case READ_BEFORE_ANOTHER_WRITES:
            if (args.which == READ_OF_ANOTHER_BLOCK) args.out[me] = 1;
            if (args.out[other] != 77) args.out[me] = 2;
            break;
        case READ_ONLY_LOAD_OF_OWN:
            if (thread == 0) {
                storef4(args.out + block * 64, Float4{1, 2, 3, 4});
                args.out[block * 64 + 8] = (args.correct ? loadf4_fresh(args.out + block * 64) : loadf4(args.out + block * 64)).x;
            }
            break;
        case THREADS_OF_A_BLOCK:
            args.out[me] = 1;
            if (args.correct) __syncthreads();
            args.out[me ^ 63] += 1;
            break;
        default: last_block_sums(args);
    }
}

// ---- Memory that is no thread's to touch --------------------------------------------------------------------------

KERNEL_ENTRY(wrong_memory, RaceArgs, 64, 1) {
    const u32 thread = threadIdx.x;
    SHARED_ARRAY(float, tile, [64]);
    SHARED_ARRAY(float*, places, [64]);
    float mine = 0;
    places[thread] = args.which == 0 ? &mine : &tile[0] + thread;
    __syncthreads();
    if (args.which == 0) *places[args.correct ? thread : thread ^ 1] = 1;
    if (args.which == 1) places[thread][args.correct ? 0 : 64] = 1;
    args.out[thread] = mine;
}

// ---- All of them --------------------------------------------------------------------------------------------------

void check_race(LaunchFunction* kernel, u32 blocks, u32 which, const char* name, const char* text) {
    for (u32 schedule = 0; schedule < SCHEDULES; ++schedule)
        for (bool correct : {false, true}) {
            const std::vector<Float4> in(64, Float4{5, 6, 7, 8});
            std::vector<Float4> out(64, Float4{0, 0, 0, 0});
            std::vector<u32> words(64);
            const RaceArgs args{which, correct, &in[0].x, &out[0].x, words.data()};
            const std::string error = error_of(kernel, args, {blocks, 1, 64, 0, schedule, EMU_RACES, 1});
            const bool right = correct ? error.empty() : contains(error, text);
            check(right, std::string(name) + (correct ? ", corrected: " : ": ") + error);
            if (!correct && schedule == 0) std::printf("found: %s\n       %s\n", name, error.c_str());
        }
}

void check_races() {
    for (u32 which = 0; which < SHARED_RACES; ++which)
        check_race(shared_race__launch, 1, which, SHARED_NAMES[which], "race in shared memory");
    for (u32 which = 0; which < GLOBAL_RACES; ++which)
        check_race(global_race__launch, 3, which, GLOBAL_NAMES[which], "race in global memory");
    check_race(wrong_memory__launch, 1, 0, "a pointer to another thread's variable", "local memory");
    check_race(wrong_memory__launch, 1, 1, "past the end of a shared array", "belong to no array");
}

}  // namespace
