// From one row of logits to a token: the rules of mod.rs, and given the same logits the same token.
//
// One block of 1024 threads takes a row. Logits are f32 in global memory, most of a row in L2: a pass over 128k of them is
// 512 KiB, about 5 us for one multiprocessor, and rows run beside each other. So the passes are what counts, and a row
// makes only those it needs:
//
//   scan     broken logits, the largest                          every row; greedy rows need no other
//   sum      sum of e^(logit - max)                              rows that want log-probabilities
//   select   histograms, see below; 2 to 6 passes                top-k, top-p, alternatives
//   draw     Gumbel-max over what is left                        rows that draw
//
// Thread t holds the quads t, t + 1024, ... of four tokens: 16 bytes of a load and, as it is, the four random words of one
// Philox block. Edits (bias, bans, penalties) and the mask are written into the row, which nobody needs afterwards; the raw
// logits of edited tokens go back into the list of edits, because log-probabilities are the raw model's.
//
// `select` finds how far down the order (likelier first, then the lower id) a filter reaches, without sorting: a place in
// the order is a tuple of digits, and each level of a radix search counts the tokens that share the digits found so far.
// The first digit is the distance below the maximum in steps of 1/64: unlike the leading bits of a float it spreads a row
// of logits over its bins, so few threads meet in one. Masses are fixed-point integers, 2^44 for the likeliest token, and
// integers may be added in any order. Exact products (no fused multiply-add) keep the values those of the CPU.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 SAMPLE_THREADS = 1024;
constexpr u32 SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr u32 BINS = 2048;
constexpr u32 GROUPS = 32, GROUP_BINS = BINS / GROUPS;
constexpr u32 TOP_MAX = 20;
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

/// 41 KiB, of 48.
struct Shared {
    u64 mass[BINS];
    u32 count[BINS];
    u64 group_totals[GROUPS];
    union {
        double sums[SAMPLE_WARPS + 1][32];
        Draw draws[SAMPLE_WARPS + 1][32];
        Scan scans[SAMPLE_WARPS + 1][32];
    };
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
        for (u32 w = 1; w < SAMPLE_WARPS; ++w) value = combine(value, pool[w][lane]);
        pool[SAMPLE_WARPS][lane] = value;
    }
    __syncthreads();
    value = pool[SAMPLE_WARPS][0];
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

/// Calls visit(quad, logits) for this thread's quads in rising order. Two loads are in flight: one of 16 bytes from each of
/// 1024 threads is less than what L2 can have under way for a multiprocessor.
template <class Visit>
DEVICE void for_each_quad(const float* logits, u32 vocab, Visit visit) {
    const u32 quads = (vocab + 3) / 4;
    for (u32 quad = threadIdx.x; quad < quads; quad += 2 * SAMPLE_THREADS) {
        const u32 next = quad + SAMPLE_THREADS;
        const Float4 v = load_quad(logits, vocab, quad);
        Float4 w = v;
        if (next < quads) w = load_quad(logits, vocab, next);
        visit(quad, v);
        if (next < quads) visit(next, w);
    }
}

/// Calls visit(token, logit).
template <class Visit>
DEVICE void for_each_token(const float* logits, u32 vocab, Visit visit) {
    for_each_quad(logits, vocab, [&](u32 quad, const Float4& v) {
        visit(quad * 4, v.x);
        visit(quad * 4 + 1, v.y);
        visit(quad * 4 + 2, v.z);
        visit(quad * 4 + 3, v.w);
    });
}

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
    for_each_token(logits, vocab, [&](u32, float logit) { sum += exact_exp(logit - max); });
    return float(exact_log(reduce(shared.sums, double(sum), [](double a, double b) { return a + b; })));
}

// ---- How far a filter reaches -----------------------------------------------------------------------------------

/// A place in the order: lower is likelier. `rank` is an image of the float that keeps its order, upside down.
struct Place {
    u32 distance, rank, token;
};

DEVICE Place everything() { return {NONE, NONE, NONE}; }

DEVICE bool not_behind(const Place& a, const Place& b) {
    if (a.distance != b.distance) return a.distance < b.distance;
    if (a.rank != b.rank) return a.rank < b.rank;
    return a.token <= b.token;
}

/// A row as filters see it: z = logit / temperature.
struct View {
    const float* logits;
    u32 vocab;
    float inv_temperature;
    float max;       // the largest z
    bool absent_too; // whether minus infinity counts as a token
};

DEVICE Place place_of(float max, float z, u32 token) {
    const u32 bits = float_bits(z);
    const float below = max - z;
    return {below < MASS_ENDS ? u32(below * 64.0f) : BINS - 1, bits >> 31 ? bits : ~bits & 0x7fffffffu, token};
}

/// Probability relative to the largest, in units of 2^-44.
DEVICE u64 mass_of(float max, float z) {
    if (!(max - z < MASS_ENDS)) return 0;
    return u64(exact_exp(double(z) - double(max)) * MASS_ONE + 0.5);
}

/// What a level of the search looks at: tokens that agree with what is known of the place, by one more digit of it.
struct Level {
    u32 distance_known, rank_known, token_known;  // masks
    u32 shift, digits;
};

DEVICE Level level_of(u32 level) {
    if (level == 0) return {0, 0, 0, 0, BINS - 1};
    if (level == 1) return {NONE, 0, 0, 21, BINS - 1};
    if (level == 2) return {NONE, 0xffe00000u, 0, 10, BINS - 1};
    if (level == 3) return {NONE, 0xfffffc00u, 0, 0, 1023};
    if (level == 4) return {NONE, NONE, 0, 7, BINS - 1};
    return {NONE, NONE, 0xffffff80u, 0, 127};
}

/// Fills the histograms of one level.
DEVICE void count_level(Shared& shared, const View& view, const Place& known, const Place& within, u32 level,
                        bool by_mass) {
    const Level look = level_of(level);
    __syncthreads();  // the bins may still be read from the last time
    for (u32 bin = threadIdx.x; bin < BINS; bin += SAMPLE_THREADS) shared.count[bin] = 0, shared.mass[bin] = 0;
    __syncthreads();
    u32 far = 0;  // the last bin of the first level, which most of a cold row falls into: counted apart
    for_each_token(view.logits, view.vocab, [&](u32 token, float logit) {
        const float z = product(logit, view.inv_temperature);
        if (view.absent_too ? token >= view.vocab : !(z > minus_infinity())) return;
        const Place place = place_of(view.max, z, token);
        const u32 unlike = ((place.distance ^ known.distance) & look.distance_known) |
                           ((place.rank ^ known.rank) & look.rank_known) |
                           ((place.token ^ known.token) & look.token_known);
        if (unlike || !not_behind(place, within)) return;
        if (level == 0 && place.distance == BINS - 1) {
            ++far;
            return;
        }
        const u32 word = level == 0 ? place.distance : level < 4 ? place.rank : place.token;
        const u32 bin = word >> look.shift & look.digits;
        atomicAdd(&shared.count[bin], 1u);
        if (by_mass) atomicAdd(&shared.mass[bin], mass_of(view.max, z));
    });
    if (far) atomicAdd(&shared.count[BINS - 1], far);
    __syncthreads();
    if (threadIdx.x < GROUPS) {
        u64 total = 0;
        for (u32 i = 0; i < GROUP_BINS; ++i) {
            const u32 bin = threadIdx.x * GROUP_BINS + (i + threadIdx.x) % GROUP_BINS;  // turned: other banks
            total += by_mass ? shared.mass[bin] : shared.count[bin];
        }
        shared.group_totals[threadIdx.x] = total;
    }
    __syncthreads();
}

/// The last place that stays if the likeliest tokens do: `count` of them or, with `by_mass`, as few as hold `part` of the
/// mass; at least one. Looks at tokens not behind `within` and never reaches farther. Every thread gets the answer.
DEVICE Place select(Shared& shared, const View& view, u32 count, bool by_mass, float part, const Place& within) {
    Place place = {0, 0, 0};
    u64 wanted = count;
    for (u32 level = 0; level < 6; ++level) {
        count_level(shared, view, place, within, level, by_mass);
        if (level == 0) {
            u64 total = 0;
            for (u32 group = 0; group < GROUPS; ++group) total += shared.group_totals[group];
            if (by_mass) {
                const double mass = part > 0.0f ? double(part) * double(total) : 0.0;
                wanted = u64(mass);
                wanted += double(wanted) < mass || wanted == 0;
            }
            if (total == 0 || wanted > total) return within;
        }
        u32 group = 0;
        while (group < GROUPS - 1 && shared.group_totals[group] < wanted) wanted -= shared.group_totals[group++];
        u32 bin = group * GROUP_BINS;
        for (u32 last = bin + GROUP_BINS - 1; bin < last; ++bin) {
            const u64 here = by_mass ? shared.mass[bin] : shared.count[bin];
            if (here >= wanted) break;
            wanted -= here;
        }
        const u32 shared_by = shared.count[bin];
        const Level look = level_of(level);
        if (level == 0) place.distance = bin;
        if (level > 0 && level < 4) place.rank |= bin << look.shift;
        if (level >= 4) place.token |= bin << look.shift;
        if (by_mass && level == 3) {  // those that are left are equals: from here on it is a matter of how many
            const u64 each = shared.mass[bin] / shared_by;
            wanted = (wanted + each - 1) / each;
            by_mass = false;
        }
        if (shared_by == 1 || (!by_mass && wanted == shared_by)) {  // all of the bin
            if (level < 4) place.token = NONE;
            if (level == 0) place.rank = NONE;
            if (level > 0) (level < 4 ? place.rank : place.token) |= (1u << look.shift) - 1;
            break;
        }
    }
    return not_behind(place, within) ? place : within;
}

// ---- The draw ---------------------------------------------------------------------------------------------------

/// Philox4x32-10: four random words.
DEVICE void philox(u64 key, u64 position, u32 quad, u32 (&words)[4]) {
    u32 k0 = u32(key), k1 = u32(key >> 32);
    u32 c0 = u32(position), c1 = u32(position >> 32), c2 = quad, c3 = 0;
    UNROLL
    for (u32 round = 0; round < 10; ++round) {
        const u32 high0 = mulhi(c0, 0xd2511f53u), low0 = c0 * 0xd2511f53u;
        const u32 high1 = mulhi(c2, 0xcd9e8d57u), low1 = c2 * 0xcd9e8d57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

DEVICE Draw better(const Draw& a, const Draw& b) {
    return b.key > a.key || (b.key == a.key && b.token < a.token) ? b : a;
}

/// Adds Gumbel noise to z, u = (word + 1/2) / 2^32, unless the token cannot win: with n leading ones in the word the noise
/// is at most (n + 1) ln 2, which spares the logarithms.
DEVICE void offer(Draw& best, u32 token, float z, u32 word) {
    if (!(z > minus_infinity())) return;
    const double most = double(leading_zeros(~word) + 1) * LN_2;
    if (double(z) + most < best.key) return;
    const double u = (double(word) + 0.5) / 4294967296.0;
    best = better(best, {double(z) - exact_log(-exact_log(u)), token});
}

/// What the filters leave of a row.
struct Kept {
    Place limit;
    float min_p, ln_min_p;
};

DEVICE bool is_kept(const Kept& kept, float max, float z, u32 token) {
    if (!not_behind(place_of(max, z, token), kept.limit)) return false;
    if (!(kept.min_p > 0.0f) || z == max) return true;
    const float below = z - max, margin = 1e-3f;  // far from the limit, the exponential is not needed
    if (below < kept.ln_min_p - margin || below > kept.ln_min_p + margin) return below > kept.ln_min_p;
    return exact_exp(double(z) - double(max)) >= double(kept.min_p);
}

DEVICE u32 draw(Shared& shared, const SampleRow& row, const View& view, u32 likeliest) {
    Kept kept = {everything(), row.min_p, row.min_p > 0.0f ? float(exact_log(double(row.min_p))) : 0.0f};
    const bool filtered = (row.top_k != 0 && row.top_k < view.vocab) || row.top_p < 1.0f || row.min_p > 0.0f;
    if (row.top_k != 0 && row.top_k < view.vocab)
        kept.limit = select(shared, view, row.top_k, false, 0.0f, kept.limit);
    if (row.top_p < 1.0f) kept.limit = select(shared, view, 0, true, row.top_p, kept.limit);

    Draw best = {double(minus_infinity()), NONE};
    if (!filtered) {  // begin with the likeliest: most of the others then cannot win with any noise, or not with theirs
        if (threadIdx.x == 0) {
            u32 words[4];
            philox(row.seed, row.position, likeliest / 4, words);
            const u32 low = likeliest & 1 ? words[1] : words[0], high = likeliest & 1 ? words[3] : words[2];
            offer(best, likeliest, view.max, likeliest & 2 ? high : low);
            shared.first = best;
        }
        __syncthreads();
        best = shared.first;
    }
    for_each_quad(view.logits, view.vocab, [&](u32 quad, const Float4& v) {
        const float least = float(best.key) - NOISE_MAX;
        float z[4] = {v.x, v.y, v.z, v.w};
        bool any = false;
        UNROLL
        for (u32 i = 0; i < 4; ++i) {
            z[i] = product(z[i], view.inv_temperature);
            if (z[i] < least || (filtered && !is_kept(kept, view.max, z[i], quad * 4 + i))) z[i] = minus_infinity();
            any = any || z[i] > minus_infinity();
        }
        if (!any) return;
        u32 words[4];
        philox(row.seed, row.position, quad, words);
        UNROLL
        for (u32 i = 0; i < 4; ++i) offer(best, quad * 4 + i, z[i], words[i]);
    });
    best = reduce(shared.draws, best, [](const Draw& a, const Draw& b) { return better(a, b); });
    return best.token == NONE ? likeliest : best.token;
}

// ---- Edits ------------------------------------------------------------------------------------------------------

DEVICE float edited(const SampleRow& row, float logit, float bias, u32 flags, u32 count) {
    if (bias != 0.0f) logit += bias;
    if (flags & EDIT_BAN) logit = minus_infinity();
    if (row.repetition_penalty != 1.0f && (flags & EDIT_SEEN || count > 0))
        logit = logit > 0.0f ? logit / row.repetition_penalty : product(logit, row.repetition_penalty);
    if (count > 0) {
        logit -= product(row.frequency_penalty, float(count));
        logit -= row.presence_penalty;
    }
    return logit;
}

struct Edits {
    TokenEdit* first;
    u32 count;
    u32 pending;  // a generated token that is not in the list, or NONE
    u32 broken;   // the first broken logit that this thread saw
};

/// Edits the logits and keeps the raw ones: in the list, and of the pending token in `shared`.
DEVICE Edits apply_edits(Shared& shared, const SamplerArgs& args, const SampleRow& row, float* logits) {
    Edits edits = {args.edits + row.edits, row.edit_count, row.pending ? args.last_token[row.slot] : NONE, NONE};
    bool listed = edits.pending >= args.vocab;
    for (u32 i = threadIdx.x; i < edits.count; i += SAMPLE_THREADS) {
        const TokenEdit edit = edits.first[i];
        if (edit.token >= args.vocab) continue;
        const float raw = logits[edit.token];
        const bool is_pending = edit.token == edits.pending;
        edits.first[i].raw = raw;
        logits[edit.token] = edited(row, raw, edit.bias, edit.flags, (edit.flags & EDIT_COUNT) + is_pending);
        if (is_broken(raw) && edit.token < edits.broken) edits.broken = edit.token;
        listed = listed || is_pending;
    }
    if (__syncthreads_or(listed)) {
        edits.pending = NONE;
    } else if (threadIdx.x == 0) {
        const float raw = logits[edits.pending];
        shared.pending_raw = raw;
        logits[edits.pending] = edited(row, raw, 0.0f, 0, 1);
        if (is_broken(raw)) edits.broken = edits.pending;
    }
    __syncthreads();
    return edits;
}

/// The logit of a token before the edits.
DEVICE float raw_logit(Shared& shared, const Edits& edits, const float* logits, u32 token) {
    if (threadIdx.x == 0) shared.raw = token == edits.pending ? shared.pending_raw : logits[token];
    __syncthreads();
    for (u32 i = threadIdx.x; i < edits.count; i += SAMPLE_THREADS)
        if (edits.first[i].token == token) shared.raw = edits.first[i].raw;
    __syncthreads();
    return shared.raw;
}

// ---- One row ----------------------------------------------------------------------------------------------------

/// Writes the `wanted` likeliest tokens, likeliest first, the lower id first among equals; returns how many there are.
DEVICE u32 write_top(Shared& shared, TopLogprob* top, const View& view, float ln_sum, u32 wanted) {
    if (wanted > TOP_MAX) wanted = TOP_MAX;
    if (wanted > view.vocab) wanted = view.vocab;
    if (wanted == 0) return 0;
    const Place last = select(shared, view, wanted, false, 0.0f, everything());
    if (threadIdx.x == 0) shared.top_count = 0;
    __syncthreads();
    for_each_token(view.logits, view.vocab, [&](u32 token, float logit) {
        if (token >= view.vocab || !not_behind(place_of(view.max, logit, token), last)) return;
        const u32 at = atomicAdd(&shared.top_count, 1u);
        if (at < TOP_MAX) shared.top[at] = {token, logit};
    });
    __syncthreads();
    if (threadIdx.x < wanted) {
        const TopLogprob mine = shared.top[threadIdx.x];
        const Place place = place_of(view.max, mine.logprob, mine.token);
        u32 before = 0;
        for (u32 i = 0; i < wanted; ++i) {
            const TopLogprob other = shared.top[i];
            before += i != threadIdx.x && not_behind(place_of(view.max, other.logprob, other.token), place);
        }
        top[before] = {mine.token, mine.logprob - view.max - ln_sum};
    }
    __syncthreads();
    return wanted;
}

DEVICE SampleOut sample_row(Shared& shared, const SamplerArgs& args, const SampleRow& row, TopLogprob* top) {
    float* logits = args.logits + u64(row.logits_row) * args.stride;
    const bool draws = row.kind == KIND_SAMPLE;
    const bool wants_logprobs = row.logprobs != NONE || !draws;
    const bool has_edits = draws && (row.edit_count > 0 || row.pending || row.mask != NONE);
    SampleOut out = {0, FAULT_NONE, 0.0f, 0};
    Scan scan = {minus_infinity(), NONE, NONE};
    float max = 0.0f, ln_sum = 0.0f;
    if (wants_logprobs || !has_edits) {
        scan = scan_row(shared, logits, args.vocab, nullptr);
        if (scan.broken != NONE) return {scan.broken, FAULT_LOGIT, 0.0f, 0};
        if (scan.token == NONE) return {0, FAULT_NOTHING_LEFT, 0.0f, 0};
    }
    if (wants_logprobs) {
        max = scan.max;
        ln_sum = ln_sum_of(shared, logits, args.vocab, max);
        const u32 wanted = row.logprobs == NONE ? 0 : row.logprobs;
        out.top_count = write_top(shared, top, {logits, args.vocab, 1.0f, max, true}, ln_sum, wanted);
    }
    if (!draws) {
        out.token = row.target;
        out.logprob = row.target < args.vocab ? logits[row.target] - max - ln_sum : minus_infinity();
        return out;
    }
    Edits edits = {args.edits, 0, NONE, NONE};
    if (has_edits) {
        edits = apply_edits(shared, args, row, logits);
        scan = scan_row(shared, logits, args.vocab, row.mask == NONE ? nullptr : args.masks + row.mask, edits.broken);
        if (scan.broken != NONE) return {scan.broken, FAULT_LOGIT, 0.0f, 0};
        if (scan.token == NONE) return {0, FAULT_NOTHING_LEFT, 0.0f, 0};
    }
    out.token = scan.token;
    if (row.temperature >= GREEDY_BELOW) {
        const float largest = product(scan.max, row.inv_temperature);
        out.token = draw(shared, row, {logits, args.vocab, row.inv_temperature, largest, false}, scan.token);
    }
    if (wants_logprobs) out.logprob = raw_logit(shared, edits, logits, out.token) - max - ln_sum;
    return out;
}

KERNEL_ENTRY(sampler, SamplerArgs, SAMPLE_THREADS, 1) {
    SHARED_ARRAY(Shared, shared, [1]);
    const u32 rows = args.counts->sample_rows;
    for (u32 i = blockIdx.x; i < rows; i += gridDim.x) {
        const SampleRow& row = args.rows[i];
        const SampleOut out = sample_row(shared[0], args, row, args.top + u64(i) * TOP_MAX);
        __syncthreads();  // the next row uses `shared`; and nobody still reads last_token
        if (threadIdx.x == 0) {
            args.out[i] = out;
            if (out.fault == FAULT_NONE && row.kind == KIND_SAMPLE) args.last_token[row.slot] = out.token;
        }
    }
}
