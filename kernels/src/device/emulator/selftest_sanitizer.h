// Planted overruns that the address sanitizer must find. It ends the process, so each runs in a child.
#pragma once

#ifdef __SANITIZE_ADDRESS__

#include "../portable.cuh"
#include "selftest_check.h"

#include <cstdio>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

namespace {

struct OverrunArgs {
    u32 which;
    u32 extent;  // 64: one past the end
    float* out;  // 64 values
};

enum Overrun : u32 { PAST_SHARED_ARRAY, PAST_DYNAMIC_SHARED, PAST_GLOBAL_STORE, PAST_GLOBAL_LOAD, PAST_LOCAL_ARRAY, OVERRUNS };

KERNEL_ENTRY(overrun, OverrunArgs, 64, 1) {
    SHARED_ARRAY(float, tile, [64]);
    DYNAMIC_SHARED(float, more);
    SHARED_ARRAY(float, behind, [64]);
    const u32 thread = threadIdx.x;
    behind[thread] = tile[thread] = more[thread] = 0;
    __syncthreads();
    if (thread != 0) return;
    float* shared = tile;
    float local[64] = {};
    switch (args.which) {
        case PAST_SHARED_ARRAY: shared[args.extent] = 1; break;
        case PAST_DYNAMIC_SHARED: more[args.extent] = 1; break;
        case PAST_GLOBAL_STORE: args.out[args.extent] = 1; break;
        case PAST_GLOBAL_LOAD: store16(args.out, load16(args.out + args.extent)); break;
        default: local[args.extent] = args.out[0]; args.out[1] = local[args.extent - 1];
    }
}

/// Whether a child that runs the kernel is ended by the sanitizer.
bool dies(u32 which, u32 extent) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
        std::vector<Float4> out(16, Float4{0, 0, 0, 0});
        error_of(overrun__launch, OverrunArgs{which, extent, &out[0].x}, {1, 1, 64, 256, 0, 0, 1});
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

void check_overruns() {
    for (u32 which = 0; which < OVERRUNS; ++which) {
        check(dies(which, 64), "overrun " + std::to_string(which) + " is found");
        check(!dies(which, which == PAST_GLOBAL_LOAD ? 60 : 63), "no overrun " + std::to_string(which));
    }
}

}  // namespace

#endif
