// out[row] = table[token(row)]: the first op of a step.
//
// A token is given by the host, or it was drawn by the step before this one and only the device knows it: then the entry
// is FROM_DEVICE | slot and the token is last_token[slot]. One thread copies 16 bytes; neighbouring threads share a row, so
// reads and writes are whole sectors. Bound by bytes, of which there are few: rows * width * 4.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 EMBEDDING_THREADS = 256;

struct EmbeddingArgs {
    elem* out;              // [rows][width]
    const elem* table;      // [vocab][width]
    const u32* tokens;      // [rows]
    const u32* last_token;  // [slots], written by the sampler
    u32 rows;               // of the bucket: padding rows have tokens too
    u32 width;              // a multiple of 8
    u32 vocab, slots;
};

/// The row to read. Nothing outside the table is read, whatever the lists say: such an entry gets row 0.
DEVICE u32 token_of(const EmbeddingArgs& args, u32 row) {
    u32 token = args.tokens[row];
    if (token & FROM_DEVICE) {
        const u32 slot = token & ~FROM_DEVICE;
        token = slot < args.slots ? args.last_token[slot] : 0;
    }
    return token < args.vocab ? token : 0;
}

KERNEL_ENTRY(embedding, EmbeddingArgs, EMBEDDING_THREADS, 4) {
    const u32 per_row = args.width / 8;
    const u64 units = u64(args.rows) * per_row;
    for (u64 unit = u64(blockIdx.x) * EMBEDDING_THREADS + threadIdx.x; unit < units;
         unit += u64(gridDim.x) * EMBEDDING_THREADS) {
        const u32 row = u32(unit / per_row), column = u32(unit % per_row) * 8;
        const u64 token = token_of(args, row);
        store16(args.out + u64(row) * args.width + column, load16_once(args.table + token * args.width + column));
    }
}
