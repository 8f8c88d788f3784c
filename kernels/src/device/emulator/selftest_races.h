// Planted races, each of which the races mode must find under every schedule, and their corrected forms, which must pass.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <vector>

namespace {

struct RaceArgs {
    u32 which;
    bool correct;
    float* out;
    u32* words;
};

enum Race : u32 { NO_BARRIER, NO_WARP_BARRIER, TWO_WRITERS };

KERNEL_ENTRY(race, RaceArgs, 64, 1) {
    const u32 thread = threadIdx.x;
    SHARED_ARRAY(float, tile, [64]);
    if (args.which == NO_BARRIER) {
        tile[thread] = float(thread);
        if (args.correct) __syncthreads();
        args.out[thread] = tile[(thread + 32) % 64];
    }
    if (args.which == NO_WARP_BARRIER) {
        tile[thread] = float(thread);
        if (args.correct) __syncwarp();
        args.out[thread] = tile[thread ^ 1];
    }
    if (args.which == TWO_WRITERS && (thread == 0 || (thread == 32 && !args.correct))) tile[3] = 1.0f;
}

void check_races() {
    std::vector<float> out(64);
    std::vector<u32> words(64);
    for (u32 which : {NO_BARRIER, NO_WARP_BARRIER, TWO_WRITERS})
        for (u32 schedule = 0; schedule < SCHEDULES; ++schedule)
            for (bool correct : {false, true}) {
                const RaceArgs args{which, correct, out.data(), words.data()};
                const std::string error = error_of(race__launch, args, {1, 1, 64, 0, schedule, EMU_RACES, 1});
                check(correct ? error.empty() : contains(error, "race in shared memory") && contains(error, "tile"),
                      "race " + std::to_string(which) + (correct ? " corrected: " : ": ") + error);
            }
}

}  // namespace
