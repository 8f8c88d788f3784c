// Between the qkv product and attention: adds the bias, rotates q and k, writes q back and k and v into the cache.
//
//   q'[i] = q[i] cos - q[i + D/2] sin,  q'[i + D/2] = q[i + D/2] cos + q[i] sin        i < D/2, D = HEAD_DIM
//
// One thread takes 8 pairs of one head of one row: 16 bytes of the lower half and 16 of the upper, so D / 16 threads a
// head. A qkv row is [q heads | k heads | v heads]. Bound by bytes: qkv once in, q and the cache once out.
//
// K goes into the cache as two stores of 16 bytes. V lies transposed there ([dim][16 tokens]), so a row writes 2 bytes
// in each of D sectors, and 16 consecutive positions together fill them: L2 gathers the stores of a prefill chunk. A
// decode step of 64 rows of Llama-3.1-8B touches 65,536 sectors a layer, 2 MB, small beside the keys it reads.
//
// Two rows with one slot race for it; only padding rows do that, and nobody reads what they write.

#include "portable.cuh"
#include "step.cuh"
#include "kv.cuh"
#include "rope.cuh"

constexpr u32 ROPE_THREADS = 256;
constexpr u32 HEAD_THREADS = HEAD_DIM / 16;

static_assert(HEAD_DIM % 16 == 0, "a thread takes 8 elements of each half");

struct RopeCacheArgs {
    elem* qkv;               // [rows][(heads + 2 kv_heads) * HEAD_DIM]; only its q part is written
    const float* bias;       // [(heads + 2 kv_heads) * HEAD_DIM], or null
    const float* cos_sin;    // [position][HEAD_DIM / 2][2]
    const u32* positions;    // [rows]
    const KvSlot* slots;     // [rows]
    u8* arena;
    KvShape kv;
    u32 layer;
    u32 rows;                // of the bucket: padding rows write to blocks that nobody reads
    u32 heads;
    u32 reserved;
};

DEVICE void load8_elems(float (&to)[8], const elem* from) {
    const Words4 words = load16_fresh(from);  // q is written below, so no read-only loads
    unpack2(words.x, to[0], to[1]);
    unpack2(words.y, to[2], to[3]);
    unpack2(words.z, to[4], to[5]);
    unpack2(words.w, to[6], to[7]);
}

DEVICE Words4 pack8(const float (&v)[8]) {
    return {pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7])};
}

DEVICE void add_bias(float (&to)[8], const float* bias) {
    const Float4 low = loadf4(bias), high = loadf4(bias + 4);
    to[0] += low.x, to[1] += low.y, to[2] += low.z, to[3] += low.w;
    to[4] += high.x, to[5] += high.y, to[6] += high.z, to[7] += high.w;
}

DEVICE void rotate(float (&low)[8], float (&high)[8], const float* cos_sin) {
    UNROLL
    for (u32 i = 0; i < 8; i += 2) {
        const Float4 two = loadf4(cos_sin + 2 * i);
        rotate_pair(low[i], high[i], two.x, two.y);
        rotate_pair(low[i + 1], high[i + 1], two.z, two.w);
    }
}

KERNEL_ENTRY(rope_cache, RopeCacheArgs, ROPE_THREADS, 4) {
    const u32 kv_heads = args.kv.kv_heads, all_heads = args.heads + 2 * kv_heads;
    const u32 per_row = all_heads * HEAD_THREADS, units = args.rows * per_row;
    for (u32 unit = blockIdx.x * ROPE_THREADS + threadIdx.x; unit < units; unit += gridDim.x * ROPE_THREADS) {
        const u32 row = unit / per_row, head = unit % per_row / HEAD_THREADS;
        const u32 first = unit % HEAD_THREADS * 8;  // its pairs are (first + i, first + i + HEAD_DIM / 2)
        elem* at = args.qkv + (u64(row) * all_heads + head) * HEAD_DIM + first;
        float low[8], high[8];
        load8_elems(low, at);
        load8_elems(high, at + HEAD_DIM / 2);
        if (args.bias) {
            const float* bias = args.bias + head * HEAD_DIM + first;
            add_bias(low, bias);
            add_bias(high, bias + HEAD_DIM / 2);
        }
        if (head < args.heads + kv_heads) {
            rotate(low, high, args.cos_sin + (u64(args.positions[row]) * (HEAD_DIM / 2) + first) * 2);
        }
        if (head < args.heads) {
            store16(at, pack8(low));
            store16(at + HEAD_DIM / 2, pack8(high));
            continue;
        }
        const KvSlot slot = args.slots[row];
        const bool is_value = head >= args.heads + kv_heads;
        const u32 kv_head = (head - args.heads) % kv_heads;
        u8* keys = args.arena + kv_key_offset(args.kv, args.layer, slot.block, kv_head);
        if (!is_value) {
            elem* key = reinterpret_cast<elem*>(keys) + slot.offset * HEAD_DIM + first;
            store16(key, pack8(low));
            store16(key + HEAD_DIM / 2, pack8(high));
            continue;
        }
        elem* value = reinterpret_cast<elem*>(keys + kv_value_distance(args.kv)) + first * BLOCK_TOKENS + slot.offset;
        UNROLL
        for (u32 i = 0; i < 8; ++i) {
            value[i * BLOCK_TOKENS] = to_elem(low[i]);
            value[(i + HEAD_DIM / 2) * BLOCK_TOKENS] = to_elem(high[i]);
        }
    }
}
