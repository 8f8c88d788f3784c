// One query row against its keys: s = scale q k, p = softmax(s), out = p v, for the GROUP query heads of each kv head.
//
// A block of four warps takes (unit, kv head) pairs by stride: a unit is a stretch of one row's positions. Warp w takes
// the KV blocks w, w + 4, ... of the stretch, 16 tokens each, with a softmax of its own; shared memory joins the four
// at the end. A row cut into several units leaves its partial sums in a workspace, and the block that arrives last
// joins those. Both joins go in a fixed order and the cuts depend on the row's length alone, so its bits do too.
//
// Bound by bytes: K and V are read once for all heads of the group, 2 * 16 * D * 2 bytes a KV block (8 KiB at D = 128,
// 440 cycles of one multiprocessor's share of an H200's memory) against about 250 instructions of one warp. So no
// shared memory on the way: every lane loads the words of its own mma fragments, and the loads of 16 tokens are all
// under way before their first mma: V of this KV block and K of the next. With D = 128 that is 8 KiB a warp, 64 KiB a
// multiprocessor.
//
// Fragments of m16n8k16, lane = 4 g + t:
//   S = Q K^T   M: the group's heads (g, and g + 8 if GROUP > 8), the rest zero. N: 8 tokens, k: dims. Lane (g, t)
//               loads dims 32 c + 8 t .. + 8 of a K row with one 16-byte load: words x, y are its part of one mma,
//               z, w of the next. Q takes the same order of dims, and a sum does not care.
//   tokens      column n of S tile j is token 4 (n / 2) + 2 j + n % 2. Then the scores that lane t gets (columns 2 t
//               and 2 t + 1 of both tiles) are those of tokens 4 t .. 4 t + 3: just what its A fragment of P V takes if
//               the k of that product counts tokens in this order. No shuffle.
//   O += P V    N: 8 dims, k: tokens. V lies as [dim][16 tokens]: lane (g, t) loads tokens 4 t .. 4 t + 3 of dim
//               8 i + g with one 8-byte load; the warp's 32 lanes read 256 bytes in a row.

#include "portable.cuh"
#include "step.cuh"
#include "kv.cuh"

constexpr u32 WARPS = 4;
constexpr u32 DECODE_THREADS = WARPS * 32;
constexpr u32 KEY_LOADS = HEAD_DIM / 32;          // 16-byte loads of a lane for one token's key
constexpr u32 OUT_TILES = HEAD_DIM / 8;
constexpr u32 HALVES = GROUP > 8 ? 2 : 1;         // heads g and g + 8
constexpr u32 MERGE_DIMS = HEAD_DIM < 128 ? HEAD_DIM : 128;  // joined at a time: 4 * 16 * 136 floats are 34 KiB
constexpr u32 MERGE_STRIDE = MERGE_DIMS + 8;      // of half a warp, Float2 stores of (g, t) fall into different banks
// A unit's part: O [GROUP][HEAD_DIM], then (max, sum) [GROUP], whole 16 bytes.
constexpr u32 PARTIAL_FLOATS = GROUP * HEAD_DIM + (2 * GROUP + 3) / 4 * 4;
constexpr bool AHEAD = HEAD_DIM <= 128;           // registers for Q, K, the next K and V beside O: not with 256 dims
constexpr u32 KEY_STEPS = AHEAD ? KEY_LOADS : 4;  // of K in registers together
constexpr u32 VALUE_TILES = AHEAD ? OUT_TILES : OUT_TILES / 2;  // of V
// Blocks a multiprocessor must hold, which is to say registers a thread may have.
constexpr u32 RESIDENT = HEAD_DIM <= 64 ? 4 : HEAD_DIM <= 96 && GROUP <= 8 ? 3 : 2;
constexpr float NO_SCORE = -1e30f;                // below every score, and still finite: differences are no NaN

static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "fragments take 32 dims at a time");
static_assert(GROUP >= 1 && GROUP <= 16, "the heads of a group are the M side of one mma");

struct alignas(8) Float2 {
    float x, y;
};

struct AttnDecodeArgs {
    const elem* qkv;           // [rows][heads + 2 kv_heads][HEAD_DIM]
    elem* out;                 // [rows][heads][HEAD_DIM]
    const u8* arena;
    const u32* block_table;
    const DecodeUnit* units;   // those of one row follow each other
    const StepCounts* counts;
    const u32* positions;      // [rows]
    float* partials;           // [units][kv_heads][PARTIAL_FLOATS]; only rows of several parts use it
    u32* arrived;              // [rows][kv_heads], zero between launches
    KvShape kv;
    u32 layer;
    u32 window;                // keys a position sees, itself included
    float scale;               // times log2(e)
    u32 reserved;
};

/// A warp's part of a unit.
struct Softmax {
    float out[OUT_TILES][4];   // [i][2 h + e]: head g + 8 h, dim 8 i + 2 t + e, as if `max` were zero
    float max[HALVES];
    float sum[HALVES];         // over the tokens of this lane
};

struct Keys {
    Words4 at[2][KEY_STEPS];   // [tile][c]
};

struct Values {
    Words2 at[VALUE_TILES];
};

/// The four warps' results on their way into one.
struct alignas(16) Shared {
    float out[WARPS][GROUP][MERGE_STRIDE];
    float max[WARPS][16], sum[WARPS][16];
    u32 is_last;
};

struct Query {
    Words4 at[HALVES][KEY_STEPS];  // this lane's 8 dims of head g + 8 h for each c
};

DEVICE float larger(float a, float b) { return a > b ? a : b; }

DEVICE Keys load_keys(const u8* head, u32 group, u32 t) {
    Keys keys;
    UNROLL
    for (u32 j = 0; j < 2; ++j) {
        const u32 token = 4 * (group / 2) + 2 * j + group % 2;
        UNROLL
        for (u32 c = 0; c < KEY_STEPS; ++c) keys.at[j][c] = load16_once(head + token * HEAD_DIM * 2 + c * 64 + t * 16);
    }
    return keys;
}

DEVICE Values load_values(const u8* head, u32 lane) {
    Values values;
    UNROLL
    for (u32 i = 0; i < VALUE_TILES; ++i) values.at[i] = load8_once(head + i * 256 + lane * 8);
    return values;
}

DEVICE Query load_query(const elem* first_head, u32 group, u32 t) {
    Query query;
    UNROLL
    for (u32 h = 0; h < HALVES; ++h) {
        const u32 head = group + 8 * h;
        UNROLL
        for (u32 c = 0; c < KEY_STEPS; ++c) {
            query.at[h][c] = {0, 0, 0, 0};
            if (head < GROUP) query.at[h][c] = load16(first_head + head * HEAD_DIM + c * 32 + t * 8);
        }
    }
    return query;
}

DEVICE void add_scores(float (&s)[2][4], const Query& query, const Keys& keys) {
    UNROLL
    for (u32 c = 0; c < KEY_STEPS; ++c) {
        const Words4 low = query.at[0][c];
        const Words4 high = HALVES == 2 ? query.at[HALVES - 1][c] : Words4{0, 0, 0, 0};
        UNROLL
        for (u32 j = 0; j < 2; ++j) {
            const Words4 key = keys.at[j][c];
            mma_16x8x16(s[j], {low.x, high.x, low.y, high.y}, {key.x, key.y});
            mma_16x8x16(s[j], {low.z, high.z, low.w, high.w}, {key.z, key.w});
        }
    }
}

/// Positions [first, end) count; this lane's are token .. token + 4.
DEVICE void mask_scores(float (&s)[2][4], u32 token, u32 first, u32 end) {
    UNROLL
    for (u32 i = 0; i < 4; ++i) {  // token + i is column i % 2 of tile i / 2
        if (token + i >= first && token + i < end) continue;
        s[i / 2][i % 2] = bits_float(0xff800000u);
        s[i / 2][i % 2 + 2] = bits_float(0xff800000u);
    }
}

/// A place of the cache that nobody wrote may hold NaN, which a weight of zero does not silence.
DEVICE void mask_values(Values& values, u32 token, u32 first, u32 end) {
    u32 keep[2] = {0, 0};
    UNROLL
    for (u32 i = 0; i < 4; ++i) {
        if (token + i >= first && token + i < end) keep[i / 2] |= 0xffffu << i % 2 * 16;
    }
    UNROLL
    for (u32 i = 0; i < VALUE_TILES; ++i) {
        values.at[i].x &= keep[0];
        values.at[i].y &= keep[1];
    }
}

/// Scores to weights of the running maximum, packed as the A fragment; `old` is scaled down where the maximum grew.
DEVICE void weigh(u32 (&weights)[4], Softmax& old, const float (&s)[2][4]) {
    weights[1] = weights[3] = 0;
    UNROLL
    for (u32 h = 0; h < HALVES; ++h) {
        float max = larger(larger(s[0][2 * h], s[0][2 * h + 1]), larger(s[1][2 * h], s[1][2 * h + 1]));
        max = larger(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = larger(max, __shfl_xor_sync(0xffffffffu, max, 2));
        max = larger(max, old.max[h]);
        const float shrink = fast_exp2(old.max[h] - max);
        old.max[h] = max;
        float p[2][2];
        UNROLL
        for (u32 i = 0; i < 4; ++i) p[i / 2][i % 2] = fast_exp2(s[i / 2][2 * h + i % 2] - max);
        old.sum[h] = old.sum[h] * shrink + ((p[0][0] + p[0][1]) + (p[1][0] + p[1][1]));
        weights[h] = pack2(p[0][0], p[0][1]);
        weights[2 + h] = pack2(p[1][0], p[1][1]);
        UNROLL
        for (u32 i = 0; i < OUT_TILES; ++i) {
            old.out[i][2 * h] *= shrink;
            old.out[i][2 * h + 1] *= shrink;
        }
    }
}

/// This warp's KV blocks of a unit.
DEVICE void attend(Softmax& state, const AttnDecodeArgs& args, const DecodeUnit& unit, u32 kv_head) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    const u32 position = args.positions[unit.row];
    const u32 seen = position + 1 > args.window ? position + 1 - args.window : 0;  // first position inside the window
    const u32 end = (unit.kv_end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const u32* table = args.block_table + unit.blocks;
    const u64 to_values = kv_value_distance(args.kv);
    const elem* first_head =
        args.qkv + (u64(unit.row) * (GROUP + 2) * args.kv.kv_heads + kv_head * GROUP) * HEAD_DIM;

    u32 block = unit.kv_begin / BLOCK_TOKENS + warp;
    if (block >= end) return;
    const u8* head = args.arena + kv_key_offset(args.kv, args.layer, table[block], kv_head);
    Query query;
    Keys keys;
    if (AHEAD) {
        query = load_query(first_head, group, t);
        keys = load_keys(head, group, t);
    }
    u32 next_id = block + WARPS < end ? table[block + WARPS] : 0;  // one KV block earlier than its keys
    for (; block < end; block += WARPS) {
        Values values;
        Keys next_keys;
        const u8* next_head = args.arena + kv_key_offset(args.kv, args.layer, next_id, kv_head);
        if (AHEAD) {
            values = load_values(head + to_values, lane);
            if (block + WARPS < end) next_keys = load_keys(next_head, group, t);
        }
        if (block + 2 * WARPS < end) next_id = table[block + 2 * WARPS];

        float s[2][4];
        UNROLL
        for (u32 i = 0; i < 8; ++i) s[i / 4][i % 4] = 0.0f;
        if (AHEAD) {
            add_scores(s, query, keys);
        } else {
#pragma unroll 1  // or the loads of all steps are moved together again
            for (u32 c = 0; c < KEY_LOADS; c += KEY_STEPS) {
                add_scores(s, load_query(first_head + c * 32, group, t), load_keys(head + c * 64, group, t));
            }
        }
        UNROLL
        for (u32 i = 0; i < 8; ++i) s[i / 4][i % 4] *= args.scale;
        const u32 token = block * BLOCK_TOKENS + 4 * t;
        const bool edge = block * BLOCK_TOKENS < seen || (block + 1) * BLOCK_TOKENS > unit.kv_end;
        if (edge) mask_scores(s, token, seen, unit.kv_end);
        u32 weights[4];
        weigh(weights, state, s);
        UNROLL
        for (u32 first = 0; first < OUT_TILES; first += VALUE_TILES) {
            if (!AHEAD) values = load_values(head + to_values + first * 256, lane);
            if (edge) mask_values(values, token, seen, unit.kv_end);
            UNROLL
            for (u32 i = 0; i < VALUE_TILES; ++i) {
                mma_16x8x16(state.out[first + i], weights, {values.at[i].x, values.at[i].y});
            }
        }
        keys = next_keys;
        head = next_head;
    }
}

/// Joins the parts of a row, in order, and writes its output.
DEVICE void join_parts(const AttnDecodeArgs& args, u32 row, u32 kv_head, u32 first_unit, u32 parts) {
    const u64 part_stride = u64(args.kv.kv_heads) * PARTIAL_FLOATS;
    const float* partial = args.partials + first_unit * part_stride + kv_head * PARTIAL_FLOATS;
    elem* out = args.out + (u64(row) * args.kv.kv_heads + kv_head) * GROUP * HEAD_DIM;
    for (u32 i = threadIdx.x; i < GROUP * HEAD_DIM / 4; i += DECODE_THREADS) {
        const float* stats = partial + GROUP * HEAD_DIM + i / (HEAD_DIM / 4) * 2;
        float max = NO_SCORE;
        for (u32 part = 0; part < parts; ++part) {
            max = larger(max, bits_float(load8_fresh(stats + part * part_stride).x));
        }
        float sum = 0.0f;
        Float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
        for (u32 part = 0; part < parts; ++part) {
            const Words2 stat = load8_fresh(stats + part * part_stride);
            const Float4 one = loadf4_fresh(partial + part * part_stride + i * 4);
            const float factor = fast_exp2(bits_float(stat.x) - max);
            sum += bits_float(stat.y) * factor;
            o.x += one.x * factor, o.y += one.y * factor, o.z += one.z * factor, o.w += one.w * factor;
        }
        const float scale = 1.0f / sum;
        store8(out + i * 4, {pack2(o.x * scale, o.y * scale), pack2(o.z * scale, o.w * scale)});
    }
}

/// Joins the warps' sums, in order, and writes the output of a row of one part, or the part.
DEVICE void join_warps(Shared& shared, Softmax& state, const AttnDecodeArgs& args, const DecodeUnit& unit, u32 index) {
    const u32 warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL
    for (u32 h = 0; h < HALVES; ++h) {
        state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], 1);
        state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], 2);
        if (t == 0) shared.max[warp][group + 8 * h] = state.max[h], shared.sum[warp][group + 8 * h] = state.sum[h];
    }
    elem* out = args.out + (u64(unit.row) * args.kv.kv_heads + index % args.kv.kv_heads) * GROUP * HEAD_DIM;
    float* partial = args.partials + u64(index) * PARTIAL_FLOATS;
    UNROLL
    for (u32 dim0 = 0; dim0 < HEAD_DIM; dim0 += MERGE_DIMS) {
        UNROLL
        for (u32 i = 0; i < MERGE_DIMS / 8; ++i) {
            UNROLL
            for (u32 h = 0; h < HALVES; ++h) {
                if (group + 8 * h >= GROUP) continue;
                const float* o = state.out[dim0 / 8 + i];
                *reinterpret_cast<Float2*>(&shared.out[warp][group + 8 * h][8 * i + 2 * t]) = {o[2 * h], o[2 * h + 1]};
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < GROUP * MERGE_DIMS / 4; i += DECODE_THREADS) {
            const u32 head = i / (MERGE_DIMS / 4), column = i % (MERGE_DIMS / 4) * 4;
            float max = NO_SCORE, sum = 0.0f;
            UNROLL
            for (u32 w = 0; w < WARPS; ++w) max = larger(max, shared.max[w][head]);
            Float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
            UNROLL
            for (u32 w = 0; w < WARPS; ++w) {
                const float factor = fast_exp2(shared.max[w][head] - max);
                const Float4 one = *reinterpret_cast<const Float4*>(&shared.out[w][head][column]);
                sum += shared.sum[w][head] * factor;
                o.x += one.x * factor, o.y += one.y * factor, o.z += one.z * factor, o.w += one.w * factor;
            }
            const u32 at = head * HEAD_DIM + dim0 + column;
            if (unit.parts == 1) {
                const float scale = 1.0f / sum;
                store8(out + at, {pack2(o.x * scale, o.y * scale), pack2(o.z * scale, o.w * scale)});
            } else {
                storef4(partial + at, o);
                if (dim0 + column == 0) {
                    store8(partial + GROUP * HEAD_DIM + 2 * head, {float_bits(max), float_bits(sum)});
                }
            }
        }
        __syncthreads();  // `shared` is free again
    }
}

KERNEL_ENTRY(attn_decode, AttnDecodeArgs, DECODE_THREADS, RESIDENT) {
    SHARED_ARRAY(Shared, shared, [1]);

    const u32 kv_heads = args.kv.kv_heads, work = args.counts->decode_units * kv_heads;
    for (u32 index = blockIdx.x; index < work; index += gridDim.x) {
        const u32 kv_head = index % kv_heads;
        const DecodeUnit unit = args.units[index / kv_heads];

        Softmax state;
        UNROLL
        for (u32 i = 0; i < OUT_TILES * 4; ++i) state.out[i / 4][i % 4] = 0.0f;
        UNROLL
        for (u32 h = 0; h < HALVES; ++h) state.max[h] = NO_SCORE, state.sum[h] = 0.0f;
        attend(state, args, unit, kv_head);
        join_warps(shared[0], state, args, unit, index);
        if (unit.parts == 1) continue;  // the same for the whole block

        __threadfence();  // this block's part, complete since the last barrier, before its arrival
        u32* arrived = args.arrived + u64(unit.row) * kv_heads + kv_head;
        if (threadIdx.x == 0) {
            shared[0].is_last = atomicAdd(arrived, 1u) + 1 == unit.parts;
            __threadfence();  // all arrivals, before the parts that the block reads behind the barrier
        }
        __syncthreads();
        if (shared[0].is_last) {  // written again only after the barriers of the next unit
            __threadfence();  // the same for every thread's own reads
            join_parts(args, unit.row, kv_head, index / kv_heads - unit.part, unit.parts);
            if (threadIdx.x == 0) atomicExch(arrived, 0u);  // for the next layer's launch
        }
    }
}
