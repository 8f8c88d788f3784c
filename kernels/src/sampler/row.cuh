// What the sampler reads and writes, what its block shares, and the passes over a row of logits. The first part of one
// source: cuda.rs puts row.cuh, select.cuh and sampler.cu behind each other.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 SAMPLE_THREADS = 1024;
constexpr u32 SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr u32 BINS = 2048;
constexpr u32 GROUPS = 32, GROUP_BINS = BINS / GROUPS;
constexpr u32 TOP_MAX = 20;
constexpr u32 LIST_MAX = 2048;
constexpr u32 NONE = 0xffffffffu;
constexpr float GREEDY_BELOW = 1e-5f;
constexpr float NOISE_MAX = 22.88f;                  // -ln(-ln(1 - 2^-33)), rounded up
constexpr double LN_2 = 0.693147180559945309417;
constexpr double MASS_ONE = 17592186044416.0;        // 2^44: the sum over 2^18 tokens fits
constexpr float MASS_ENDS = 32.0f;                   // e^-32 * 2^44 rounds to nothing

constexpr u32 EDIT_BAN = 1u << 31;
constexpr u32 EDIT_SEEN = 1u << 30;                  // in the prompt
constexpr u32 EDIT_COUNT = EDIT_SEEN - 1;            // occurrences in the output

enum Fault : u32 { FAULT_NONE, FAULT_LOGIT, FAULT_NOTHING_LEFT };
enum Kind : u32 { KIND_SAMPLE, KIND_TARGET };

struct SampleRow {
    u64 seed, position;
    u32 logits_row;         // no two rows share one
    u32 slot;               // last_token[slot] gets the token
    u32 kind, target;       // KIND_TARGET: the log-probability of `target`, and no draw
    float temperature, inv_temperature;
    float top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    u32 top_k;
    u32 edits, edit_count;  // first entry
    u32 mask;               // first word of the tokens that may come, or NONE
    u32 logprobs;           // alternatives, 0 ..= TOP_MAX, or NONE
    u32 pending;            // last_token[slot] counts as one more generated token
    u32 reserved;
};

struct TokenEdit {
    u32 token, flags;
    float bias;
    float raw;              // written: the logit before the edit
};

struct SampleOut {
    u32 token;              // with FAULT_LOGIT: the first broken one
    u32 fault;
    float logprob;
    u32 top_count;
};

struct TopLogprob {
    u32 token;
    float logprob;
};

static_assert(sizeof(SampleRow) == 88 && sizeof(TokenEdit) == 16 && sizeof(SampleOut) == 16, "cuda.rs has the same");

struct SamplerArgs {
    float* logits;            // [rows][stride]
    const SampleRow* rows;    // [counts->sample_rows]
    const StepCounts* counts;
    TokenEdit* edits;         // a token is in a row's edits once
    const u32* masks;         // bit token % 32 of word token / 32
    u32* last_token;          // [slots]
    SampleOut* out;           // [counts->sample_rows]
    TopLogprob* top;          // [counts->sample_rows][TOP_MAX]
    u32 vocab;                // at most 2^18
    u32 stride;               // a multiple of 4
};

#ifdef __CUDACC__
#define ROLLED _Pragma("unroll 1")
#define BY_FOUR _Pragma("unroll 4")
#else
#define ROLLED
#define BY_FOUR
#endif

/// A product that no compiler fuses with a sum.
DEVICE float product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DEVICE float minus_infinity() { return bits_float(0xff800000u); }

// ---- What a block shares ----------------------------------------------------------------------------------------

struct Draw {
    double key;
    u32 token;
};

struct Scan {
    float max;
    u32 token;   // of the largest, the lowest among equals; NONE if all are minus infinity
    u32 broken;  // the first that is NaN or infinity, or NONE
};

/// A row as filters see it: z = logit / temperature.
struct View {
    const float* logits;
    u32 vocab;
    float inv_temperature;
    float max;        // the largest z
    bool absent_too;  // whether minus infinity counts as a token
    u32 listed;       // tokens in the list, which then are all that a filter has left; or NONE, and the row is walked
};

struct Candidate {
    u32 token;
    float logit;
};

/// 41 KiB, of 48. What is the same for all threads and lives long is here too: 1024 threads have 64 registers each.
struct Shared {
    View view;
    float raw_max, ln_sum;  // of the model's distribution
    u64 mass[BINS];
    u32 count[BINS];
    u64 group_totals[GROUPS];
    union {
        double sums[SAMPLE_WARPS + 1][32];
        Draw draws[SAMPLE_WARPS + 1][32];
        Scan scans[SAMPLE_WARPS + 1][32];
        Candidate list[LIST_MAX];  // from `select` to the draw, which have no use for the others
    };
    u32 list_count;
    TopLogprob top[TOP_MAX];  // not in order
    u32 top_count;
    float raw, pending_raw;
    Draw first;
};

/// Combines the values of all threads, in one fixed order, for all threads. Through memory instead of shuffles: 32 threads
/// combine 32 values each, then every thread combines their results.
template <class T, class Combine>
DEVICE T reduce(T (&pool)[SAMPLE_WARPS + 1][32], T value, Combine combine) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the pool may still be read from the last time
    pool[warp][lane] = value;
    __syncthreads();
    if (warp == 0) {
        BY_FOUR
        for (u32 w = 1; w < SAMPLE_WARPS; ++w) value = combine(value, pool[w][lane]);
        pool[SAMPLE_WARPS][lane] = value;
    }
    __syncthreads();
    value = pool[SAMPLE_WARPS][0];
    BY_FOUR
    for (u32 l = 1; l < 32; ++l) value = combine(value, pool[SAMPLE_WARPS][l]);
    return value;
}

// ---- Passes over a row ------------------------------------------------------------------------------------------

/// Four logits; what lies behind the vocabulary cannot come.
DEVICE Float4 load_quad(const float* logits, u32 vocab, u32 quad) {
    Float4 v = loadf4_fresh(logits + quad * 4);
    if (quad * 4 + 3 >= vocab) {
        v.w = minus_infinity();
        if (quad * 4 + 2 >= vocab) v.z = minus_infinity();
        if (quad * 4 + 1 >= vocab) v.y = minus_infinity();
    }
    return v;
}

/// Calls visit(quad, logits) for this thread's quads in rising order. A quad is loaded while the one before it is worked on:
/// 16 bytes from each of 1024 threads are less than what L2 can have under way for a multiprocessor.
template <class Visit>
DEVICE void for_each_quad(const float* logits, u32 vocab, Visit visit) {
    const u32 quads = (vocab + 3) / 4;
    u32 quad = threadIdx.x;
    Float4 ahead = quad < quads ? load_quad(logits, vocab, quad) : Float4{};
    while (quad < quads) {
        const u32 next = quad + SAMPLE_THREADS;
        const Float4 v = ahead;
        if (next < quads) ahead = load_quad(logits, vocab, next);
        visit(quad, v);
        quad = next;
    }
}

DEVICE float element(const Float4& v, u32 i) { return i < 2 ? (i == 0 ? v.x : v.y) : i == 2 ? v.z : v.w; }

/// Whether a logit is NaN or infinity; minus infinity is a token that cannot come.
DEVICE bool is_broken(float logit) { return !(logit < bits_float(0x7f800000u)); }

/// Finds the largest logit and broken ones. With a mask, tokens whose bit is 0 become minus infinity, in memory too.
/// `broken` is what this thread has found before.
DEVICE Scan scan_row(Shared& shared, float* logits, u32 vocab, const u32* mask, u32 broken = NONE) {
    Scan scan = {minus_infinity(), NONE, broken};
    for_each_quad(logits, vocab, [&](u32 quad, Float4 v) {
        const float all[4] = {v.x, v.y, v.z, v.w};
        const u32 may = mask ? mask[quad / 8] >> (quad % 8 * 4) : 0xfu;
        UNROLL
        for (u32 i = 0; i < 4; ++i) {
            const u32 token = quad * 4 + i;
            if (is_broken(all[i]) && token < scan.broken) scan.broken = token;
            if (may >> i & 1) {
                if (all[i] > scan.max) scan.max = all[i], scan.token = token;
            } else if (token < vocab) {
                logits[token] = minus_infinity();
            }
        }
    });
    return reduce(shared.scans, scan, [](Scan a, const Scan& b) {
        if (b.max > a.max || (b.max == a.max && b.token < a.token)) a.max = b.max, a.token = b.token;
        if (b.broken < a.broken) a.broken = b.broken;
        return a;
    });
}

/// Logarithm of the sum of e^(logit - max).
DEVICE float ln_sum_of(Shared& shared, const float* logits, u32 vocab, float max) {
    float sum = 0.0f;
    for_each_quad(logits, vocab, [&](u32, const Float4& v) {
        sum += (exact_exp(v.x - max) + exact_exp(v.y - max)) + (exact_exp(v.z - max) + exact_exp(v.w - max));
    });
    return float(exact_log(reduce(shared.sums, double(sum), [](double a, double b) { return a + b; })));
}
