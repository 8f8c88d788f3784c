// Rows of a prefill chunk against their sequence's keys, FlashAttention-2 (arXiv:2307.08691) with mma.sync.
//
// A block of eight warps takes (tile, kv head) pairs by stride. A tile's rows times the GROUP query heads of the kv
// head are the M side: row m is position m / GROUP of the tile and head m % GROUP of the group, so 128 / GROUP
// positions fit and each key is read once for all of them. A warp owns 16 of the M rows from scores to output. Keys
// come in tiles of TILE_KEYS: while one is at work the next is on its way into the other buffer by cp.async. A warp
// goes through a tile SCORE_KEYS at a time and leaves out what none of its rows sees.
//
// Bound by flops: a key tile of 64 at D = 128 is 35 KB from L2 for 4.2 MFLOP, 120 FLOP a byte; and by registers: at
// D = 128 O takes 64, Q 32 and the scores 16 of 255, so one block of 256 threads runs on a multiprocessor, two at 64.
//
// In shared memory K is [key][D] and V is [dim][key], as in the cache. Rows are 16 bytes longer than what they hold:
// an odd number of 16-byte units, so the eight rows of an ldmatrix tile lie in different banks. Two buffers take 70 KiB
// at D = 128 (64 keys) and 73 KiB at D = 256 (32 keys); all sizes stay below the 99 KiB of sm_86 and sm_89.
//
// Lane 4 g + t of a warp holds, by m16n8k16: of Q and P rows g and g + 8; of scores the keys 8 j + 2 t and the next; of
// the output the dims 8 i + 2 t and the next. The scores of two key octets are the A fragment of P V as they stand.

#include "portable.cuh"
#include "step.cuh"
#include "kv.cuh"

constexpr u32 PREFILL_WARPS = 8;
constexpr u32 PREFILL_THREADS = PREFILL_WARPS * 32;
constexpr u32 TILE_POSITIONS = PREFILL_WARPS * 16 / GROUP;
constexpr u32 TILE_KEYS = HEAD_DIM <= 128 ? 64 : 32;
constexpr u32 TILE_BLOCKS = TILE_KEYS / BLOCK_TOKENS;
constexpr u32 KEY_STRIDE = HEAD_DIM + 8;          // elements of a K row in shared memory
constexpr u32 VALUE_STRIDE = TILE_KEYS + 8;       // of a V row
constexpr u32 KEY_ELEMS = TILE_KEYS * KEY_STRIDE;
constexpr u32 BUFFER_ELEMS = KEY_ELEMS + HEAD_DIM * VALUE_STRIDE;
constexpr u32 DIM_STEPS = HEAD_DIM / 16;          // mmas along the dims
constexpr u32 RESIDENT = HEAD_DIM <= 64 ? 2 : 1;  // blocks a multiprocessor must hold: 128 registers a thread, or 255
// Keys from scores to output together. With 64 dims (128 registers) and 256 (O alone is 128) 32 of them spill.
constexpr u32 SCORE_KEYS = HEAD_DIM == 64 || HEAD_DIM == 256 ? 16 : 32;
constexpr u32 KEY_OCTETS = SCORE_KEYS / 8;
constexpr u32 OUT_TILES = HEAD_DIM / 8;
constexpr bool QUERY_STAYS = HEAD_DIM <= 128;     // in registers; with 256 dims it comes from L1 for each key tile,
constexpr int STEPS_UNROLLED = QUERY_STAYS ? 8 : 1;  // and in a rolled loop, or all of it is loaded ahead and spills
constexpr float NO_SCORE = -1e30f;                // below every score, and still finite: differences are no NaN

static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "fragments take 32 dims at a time");
static_assert(GROUP >= 1 && GROUP <= 16, "heads of a group");

struct AttnPrefillArgs {
    const elem* qkv;           // [rows][heads + 2 kv_heads][HEAD_DIM]
    elem* out;                 // [rows][heads][HEAD_DIM]
    const u8* arena;
    const u32* block_table;
    const PrefillTile* tiles;  // of at most TILE_POSITIONS rows
    const StepCounts* counts;
    KvShape kv;
    u32 layer;
    u32 window;                // keys a position sees, itself included
    float scale;               // times log2(e)
    u32 reserved;
};

struct Softmax {
    float out[OUT_TILES][4];   // [i][2 h + e]: row g + 8 h, dim 8 i + 2 t + e
    float max[2];
    float sum[2];              // over the keys of this lane
};

struct Fragment {
    u32 at[4];
};

/// A lane's two rows, g and g + 8 of its warp.
struct Rows {
    const elem* query;         // of the tile's first position and the group's first head
    u32 first[2], end[2];      // the positions they see; none for rows that are none
};

DEVICE float larger(float a, float b) { return a > b ? a : b; }

DEVICE u32 lesser(u32 a, u32 b) { return a < b ? a : b; }

DEVICE u32 first_seen(u32 position, u32 window) { return position + 1 > window ? position + 1 - window : 0; }

/// Starts the copies of a key tile. Keys from `end` on are zero, and so is V in whole octets.
DEVICE void start_tile(elem* buffer, const AttnPrefillArgs& args, const u32* table, u32 kv_head, u32 key0, u32 end) {
    constexpr u32 ROW_CHUNKS = HEAD_DIM / 8;  // of 16 bytes in a key
    constexpr u32 BLOCK_CHUNKS = BLOCK_TOKENS * ROW_CHUNKS;
    for (u32 i = threadIdx.x; i < TILE_BLOCKS * BLOCK_CHUNKS; i += PREFILL_THREADS) {
        const u32 token0 = i / BLOCK_CHUNKS * BLOCK_TOKENS, chunk = i % BLOCK_CHUNKS;
        const u32 id = key0 + token0 < end ? table[(key0 + token0) / BLOCK_TOKENS] : 0;
        const u8* from = args.arena + kv_key_offset(args.kv, args.layer, id, kv_head) + chunk * 16;
        const u32 token = token0 + chunk / ROW_CHUNKS, octet = token0 + chunk % 2 * 8;
        cp_async16(buffer + token * KEY_STRIDE + chunk % ROW_CHUNKS * 8, from, key0 + token < end);
        cp_async16(buffer + KEY_ELEMS + chunk / 2 * VALUE_STRIDE + octet, from + kv_value_distance(args.kv),
                   key0 + octet < end);
    }
}

/// A place of the cache that nobody wrote may hold NaN, which a weight of zero does not silence: zeros V of these keys
/// of the tile.
DEVICE void clear_values(elem* buffer, u32 first, u32 end) {
    for (u32 dim = threadIdx.x; dim < HEAD_DIM; dim += PREFILL_THREADS) {
        for (u32 key = first; key < end; ++key) buffer[KEY_ELEMS + dim * VALUE_STRIDE + key] = elem{0};
    }
}

/// M row g + 8 h of this warp.
DEVICE u32 m_row(u32 h) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h; }

/// The A fragment of Q for dims 16 step .. + 16.
DEVICE Fragment load_query(const AttnPrefillArgs& args, const Rows& rows, u32 step) {
    Fragment a;
    UNROLL
    for (u32 h = 0; h < 2; ++h) {
        const u32 m = m_row(h), row = m / GROUP * (GROUP + 2) * args.kv.kv_heads + m % GROUP;  // in heads
        const elem* at = rows.query + u64(row) * HEAD_DIM + step * 16 + threadIdx.x % 4 * 2;
        const bool is_row = rows.end[h] != 0;
        a.at[h] = is_row ? *reinterpret_cast<const u32*>(at) : 0;
        a.at[h + 2] = is_row ? *reinterpret_cast<const u32*>(at + 8) : 0;
    }
    return a;
}

DEVICE void scores(float (&s)[KEY_OCTETS][4], const AttnPrefillArgs& args, const Fragment (&query)[DIM_STEPS],
                   const Rows& rows, const elem* keys) {
    const u32 lane = threadIdx.x % 32;
    UNROLL
    for (u32 i = 0; i < KEY_OCTETS * 4; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll STEPS_UNROLLED
    for (u32 step = 0; step < DIM_STEPS; step += 2) {
        const Fragment low = QUERY_STAYS ? query[step] : load_query(args, rows, step);
        const Fragment high = QUERY_STAYS ? query[step + 1] : load_query(args, rows, step + 1);
        UNROLL
        for (u32 j = 0; j < KEY_OCTETS; ++j) {
            u32 b[4];  // four octets of dims: two steps
            ldmatrix_x4(b, keys + (j * 8 + lane % 8) * KEY_STRIDE + step * 16 + lane / 8 * 8);
            mma_16x8x16(s[j], low.at, {b[0], b[1]});
            mma_16x8x16(s[j], high.at, {b[2], b[3]});
        }
    }
}

DEVICE void mask_scores(float (&s)[KEY_OCTETS][4], const Rows& rows, u32 key0) {
    UNROLL
    for (u32 j = 0; j < KEY_OCTETS; ++j) {
        UNROLL
        for (u32 i = 0; i < 4; ++i) {
            const u32 key = key0 + j * 8 + threadIdx.x % 4 * 2 + i % 2;
            if (key < rows.first[i / 2] || key >= rows.end[i / 2]) s[j][i] = bits_float(0xff800000u);
        }
    }
}

/// Scores to weights of the running maximum; the sums so far are scaled down where the maximum grew.
DEVICE void weigh(float (&s)[KEY_OCTETS][4], Softmax& state) {
    float shrink[2];
    UNROLL
    for (u32 h = 0; h < 2; ++h) {
        float max = state.max[h];
        UNROLL
        for (u32 j = 0; j < KEY_OCTETS; ++j) max = larger(max, larger(s[j][2 * h], s[j][2 * h + 1]));
        max = larger(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = larger(max, __shfl_xor_sync(0xffffffffu, max, 2));
        shrink[h] = fast_exp2(state.max[h] - max);
        state.max[h] = max;
        float sum = 0.0f;
        UNROLL
        for (u32 j = 0; j < KEY_OCTETS; ++j) {
            s[j][2 * h] = fast_exp2(s[j][2 * h] - max);
            s[j][2 * h + 1] = fast_exp2(s[j][2 * h + 1] - max);
            sum += s[j][2 * h] + s[j][2 * h + 1];
        }
        state.sum[h] = state.sum[h] * shrink[h] + sum;
    }
    // Maxima seldom grow after the first tiles.
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
        UNROLL
        for (u32 i = 0; i < OUT_TILES * 4; ++i) state.out[i / 4][i % 4] *= shrink[i % 4 / 2];
    }
}

DEVICE void add_values(Softmax& state, const float (&p)[KEY_OCTETS][4], const elem* values) {
    const u32 lane = threadIdx.x % 32;
    UNROLL
    for (u32 k = 0; k < KEY_OCTETS; k += 2) {
        u32 a[4];
        UNROLL
        for (u32 i = 0; i < 4; ++i) a[i] = pack2(p[k + i / 2][i % 2 * 2], p[k + i / 2][i % 2 * 2 + 1]);
        UNROLL
        for (u32 i = 0; i < OUT_TILES; i += 2) {
            u32 b[4];  // two octets of keys of two octets of dims
            ldmatrix_x4(b, values + ((i + lane / 16) * 8 + lane % 8) * VALUE_STRIDE + k * 8 + lane / 8 % 2 * 8);
            mma_16x8x16(state.out[i], a, {b[0], b[1]});
            mma_16x8x16(state.out[i + 1], a, {b[2], b[3]});
        }
    }
}

KERNEL_ENTRY(attn_prefill, AttnPrefillArgs, PREFILL_THREADS, RESIDENT) {
    DYNAMIC_SHARED(elem, buffers);  // [2][BUFFER_ELEMS]

    const u32 kv_heads = args.kv.kv_heads, work = args.counts->prefill_tiles * kv_heads;
    for (u32 index = blockIdx.x; index < work; index += gridDim.x) {
        const u32 kv_head = index % kv_heads;
        // A chunk's later tiles see more keys: they go first, so that the last blocks to run are short ones.
        const PrefillTile tile = args.tiles[args.counts->prefill_tiles - 1 - index / kv_heads];
        const u32* table = args.block_table + tile.blocks;

        Rows rows;
        rows.query = args.qkv + (u64(tile.first_row) * (GROUP + 2) * kv_heads + kv_head * GROUP) * HEAD_DIM;
        UNROLL
        for (u32 h = 0; h < 2; ++h) {
            const u32 i = m_row(h) / GROUP;
            const bool is_row = i < tile.row_count && i < TILE_POSITIONS;
            rows.first[h] = is_row ? first_seen(tile.position + i, args.window) : 0;
            rows.end[h] = is_row ? tile.position + i + 1 : 0;
        }
        Fragment query[DIM_STEPS];
        if (QUERY_STAYS) {
            UNROLL
            for (u32 step = 0; step < DIM_STEPS; ++step) query[step] = load_query(args, rows, step);
        }
        Softmax state;
        UNROLL
        for (u32 i = 0; i < OUT_TILES * 4; ++i) state.out[i / 4][i % 4] = 0.0f;
        state.max[0] = state.max[1] = NO_SCORE;
        state.sum[0] = state.sum[1] = 0.0f;

        // This warp's rows at `first` to `last`: some see keys, all of them see those of [all_from, first].
        const u32 end = tile.position + tile.row_count;
        const u32 first = tile.position + threadIdx.x / 32 * 16 / GROUP;
        const u32 last = lesser(tile.position + (threadIdx.x / 32 * 16 + 15) / GROUP, end - 1);
        const u32 any_from = first_seen(first, args.window), all_from = first_seen(last, args.window);
        const u32 seen_from = first_seen(tile.position, args.window);
        u32 buffer = 0, key0 = seen_from / BLOCK_TOKENS * BLOCK_TOKENS;  // blocks before that may be another's by now
        start_tile(buffers, args, table, kv_head, key0, end);
        cp_async_commit();
        for (; key0 < end; key0 += TILE_KEYS, buffer ^= 1) {
            elem* here = buffers + buffer * BUFFER_ELEMS;
            if (key0 + TILE_KEYS < end) {
                start_tile(buffers + (buffer ^ 1) * BUFFER_ELEMS, args, table, kv_head, key0 + TILE_KEYS, end);
            }
            cp_async_commit();  // perhaps an empty group: the count of groups stays the same
            cp_async_wait<1>();
            __syncthreads();
            if (key0 < seen_from || key0 + TILE_KEYS > end) {
                if (key0 < seen_from) clear_values(here, 0, seen_from - key0);
                if (key0 + TILE_KEYS > end) clear_values(here, end - key0, (end - key0 + 7) / 8 * 8);
                __syncthreads();
            }
#pragma unroll 1
            for (u32 key = key0; key < key0 + TILE_KEYS; key += SCORE_KEYS) {
                if (key + SCORE_KEYS <= any_from || key > last || first > last) continue;
                float s[KEY_OCTETS][4];
                scores(s, args, query, rows, here + (key - key0) * KEY_STRIDE);
                UNROLL
                for (u32 i = 0; i < KEY_OCTETS * 4; ++i) s[i / 4][i % 4] *= args.scale;
                if (key < all_from || key + SCORE_KEYS > first + 1) mask_scores(s, rows, key);
                weigh(s, state);
                add_values(state, s, here + KEY_ELEMS + (key - key0));
            }
            __syncthreads();  // the buffer is free for the tile after the next
        }
        cp_async_wait<0>();

        UNROLL
        for (u32 h = 0; h < 2; ++h) {
            state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], 1);
            state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], 2);
            if (rows.end[h] == 0) continue;
            const u32 m = m_row(h);
            const u64 row = tile.first_row + m / GROUP;
            elem* out = args.out + ((row * kv_heads + kv_head) * GROUP + m % GROUP) * HEAD_DIM + threadIdx.x % 4 * 2;
            const float scale = 1.0f / state.sum[h];
            UNROLL
            for (u32 i = 0; i < OUT_TILES; ++i) {
                *reinterpret_cast<u32*>(out + i * 8) =
                    pack2(state.out[i][2 * h] * scale, state.out[i][2 * h + 1] * scale);
            }
        }
    }
}
