// picked[i] = rows[index[i]]: the rows whose logits are wanted, so that the head's product is made for no others.
//
// One thread copies 16 bytes. Places behind the step's last sampled row get row 0: the product that follows covers the
// whole bucket and must not read memory that nobody wrote.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 GATHER_THREADS = 256;

struct GatherArgs {
    elem* picked;              // [places][width]
    const elem* rows;          // [rows_total][width]
    const u32* index;          // [counts->sample_rows]
    const StepCounts* counts;
    u32 places;                // of the bucket
    u32 rows_total;
    u32 width;                 // a multiple of 8
    u32 reserved;
};

KERNEL_ENTRY(gather_rows, GatherArgs, GATHER_THREADS, 4) {
    const u32 per_row = args.width / 8, wanted = args.counts->sample_rows;
    const u64 units = u64(args.places) * per_row;
    for (u64 unit = u64(blockIdx.x) * GATHER_THREADS + threadIdx.x; unit < units;
         unit += u64(gridDim.x) * GATHER_THREADS) {
        const u32 place = u32(unit / per_row), column = u32(unit % per_row) * 8;
        const u32 entry = place < wanted ? args.index[place] : 0;
        const u64 row = entry < args.rows_total ? entry : 0;
        store16(args.picked + u64(place) * args.width + column, load16(args.rows + row * args.width + column));
    }
}
