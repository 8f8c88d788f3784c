// Self-test of the traffic counters: access patterns whose cost is known.
#pragma once

#include "../portable.cuh"
#include "selftest_check.h"

#include <string>
#include <vector>

namespace {

struct TrafficArgs {
    u32 which;
    float* memory;  // 8192 values
};

enum Pattern : u32 { ROWS, STRIDED, HALF_WARP, LOOP, MATRIX_ROWS, MATRIX_COLUMN, SCALAR_COLUMN, SCALAR_PADDED };

KERNEL_ENTRY(traffic, TrafficArgs, 64, 1) {
    SHARED_ARRAY(Words4, rows, [32][8]);
    SHARED_ARRAY(float, tile, [32 * 33]);
    const u32 thread = threadIdx.x, lane = thread % 32;
    u32 words[4];
    switch (args.which) {
        case ROWS: store16(args.memory + 4 * thread, load16_fresh(args.memory + 4 * thread)); break;
        case STRIDED: loadf4(args.memory + 64 * thread); break;
        case HALF_WARP:
            if (lane < 16) load8(args.memory + 2 * lane);
            break;
        case LOOP:
            for (u32 i = 0; i < 3 + lane / 16; ++i) loadf4(args.memory + 4 * lane);
            break;
        case MATRIX_ROWS: ldmatrix_x4(words, &rows[lane / 8][lane % 8]); break;
        case MATRIX_COLUMN: ldmatrix_x4(words, &rows[lane][0]); break;
        case SCALAR_COLUMN: tile[32 * lane] = 1; break;
        default: tile[33 * lane] = 1;
    }
}

EmuCounters traffic_of(Pattern which) {
    std::vector<Block> memory(8192 * sizeof(float) / sizeof(Block));
    const std::string error = error_of(traffic__launch, TrafficArgs{which, reinterpret_cast<float*>(memory.data())}, {1, 1, 64, 0, 3, EMU_COUNT, 1});
    check(error.empty(), "traffic: " + error);
    EmuCounters counters;
    emu_counters(&counters);
    return counters;
}

void check_counters() {
    EmuCounters c = traffic_of(ROWS);
    check(c.global_loads == 2 && c.global_load_bytes == 1024 && c.global_load_sectors == 32, "rows are read in whole sectors");
    check(c.global_stores == 2 && c.global_store_bytes == 1024 && c.global_store_sectors == 32, "and written so");
    c = traffic_of(STRIDED);
    check(c.global_loads == 2 && c.global_load_sectors == 64, "a stride takes a sector for each lane");
    c = traffic_of(HALF_WARP);
    check(c.global_loads == 2 && c.global_load_bytes == 256 && c.global_load_sectors == 8, "half a warp");
    c = traffic_of(LOOP);
    check(c.global_loads == 8 && c.global_load_sectors == 2 * (3 * 16 + 8), "turns of a loop are accesses of their own");
    c = traffic_of(MATRIX_ROWS);
    check(c.shared_accesses == 2 && c.shared_wavefronts == 8 && c.shared_wavefronts_least == 8, "ldmatrix without conflicts");
    c = traffic_of(MATRIX_COLUMN);
    check(c.shared_wavefronts == 64 && c.shared_wavefronts_least == 8, "ldmatrix whose rows share their banks");
    if (!EMU_INSTRUMENTED) return;
    c = traffic_of(SCALAR_COLUMN);
    check(c.shared_accesses == 2 && c.shared_wavefronts == 64 && c.shared_wavefronts_least == 2, "a column in one bank");
    c = traffic_of(SCALAR_PADDED);
    check(c.shared_wavefronts == 2, "a padded column");
}

}  // namespace
