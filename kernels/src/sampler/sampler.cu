// From one row of logits to a token: the rules of mod.rs and, given the same logits, the same token.
//
// One block of 1024 threads takes a row. Logits are f32 in global memory, most of a row in L2: a pass over 128k of them is
// 512 KiB, an estimated 5 us for one multiprocessor, and rows run beside each other. So a row makes only the passes it needs:
//
//   scan     the largest logit, and broken ones     every row, and again if edits or a mask changed it after the first
//   sum      sum of e^(logit - max)                 rows that want log-probabilities
//   select   two, for flat rows up to seven         each of: top-k, top-p, alternatives; see select.cuh
//   draw     Gumbel-max over what is left           rows that draw
//
// Thread t holds the quads t, t + 1024, ... of four tokens: 16 bytes of a load and, as it happens, the four random words of
// one Philox block. Edits (bias, bans, penalties) and the mask are written into the row, which nobody needs afterwards; the
// raw logits of edited tokens go back into the list of edits, because log-probabilities are the raw model's. Products that
// are not fused with the sums around them keep the values those of the CPU.

// ---- The draw ---------------------------------------------------------------------------------------------------

/// Philox4x32-10: four random words.
DEVICE Words4 philox(u64 key, u64 position, u32 quad) {
    u32 k0 = u32(key), k1 = u32(key >> 32);
    u32 c0 = u32(position), c1 = u32(position >> 32), c2 = quad, c3 = 0;
    UNROLL
    for (u32 round = 0; round < 10; ++round) {
        const u32 high0 = mulhi(c0, 0xd2511f53u), low0 = c0 * 0xd2511f53u;
        const u32 high1 = mulhi(c2, 0xcd9e8d57u), low1 = c2 * 0xcd9e8d57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return {c0, c1, c2, c3};
}

DEVICE u32 word_of(const Words4& v, u32 i) { return i < 2 ? (i == 0 ? v.x : v.y) : i == 2 ? v.z : v.w; }

DEVICE Draw better(const Draw& a, const Draw& b) {
    return b.key > a.key || (b.key == a.key && b.token < a.token) ? b : a;
}

/// Adds Gumbel noise to z, u = (word + 1/2) / 2^32, unless the token cannot win: with n leading ones in the word the noise
/// is at most (n + 1) ln 2, which spares the logarithms.
DEVICE void offer(Draw& best, u32 token, float z, u32 word) {
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
            offer(best, likeliest, view.max, word_of(philox(row.seed, row.position, likeliest / 4), likeliest % 4));
            shared.first = best;
        }
        __syncthreads();
        best = shared.first;
    }
    for_each_candidate(shared, view, [&](u32 first, const Float4& v, u32 tokens) {
        const float least = float(best.key) - NOISE_MAX;
        u32 left = 0;  // one bit each
        ROLLED
        for (u32 i = 0; i < tokens; ++i) {
            const float z = product(element(v, i), view.inv_temperature);
            const bool may_win = z > minus_infinity() && z >= least;
            left |= u32(may_win && (!filtered || is_kept(kept, view.max, z, first + i))) << i;
        }
        if (left == 0) return;
        const Words4 words = philox(row.seed, row.position, first / 4);
        ROLLED
        for (u32 i = 0; i < tokens; ++i) {
            const float z = product(element(v, i), view.inv_temperature);
            if (left >> i & 1) offer(best, first + i, z, word_of(words, (first + i) % 4));
        }
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

/// For all threads, when all have come.
DEVICE const View& set_view(Shared& shared, const View& view) {
    __syncthreads();
    if (threadIdx.x == 0) shared.view = view;
    __syncthreads();
    return shared.view;
}

/// Writes the `wanted` likeliest tokens, likeliest first, the lower id first among equals; returns how many there are.
DEVICE u32 write_top(Shared& shared, TopLogprob* top, const View& view, u32 wanted) {
    if (wanted > TOP_MAX) wanted = TOP_MAX;
    if (wanted > view.vocab) wanted = view.vocab;
    if (wanted == 0) return 0;
    const Place last = select(shared, view, wanted, false, 0.0f, everything());
    if (threadIdx.x == 0) shared.top_count = 0;
    __syncthreads();
    for_each_candidate(shared, view, [&](u32 first, const Float4& v, u32 tokens) {
        for (u32 i = 0; i < tokens; ++i) {
            const float logit = element(v, i);
            const Place place = place_of(view.max, logit, first + i);
            if (!is_there(view, logit, place.token) || !not_behind(place, last)) continue;
            const u32 at = atomicAdd(&shared.top_count, 1u);
            if (at < TOP_MAX) shared.top[at] = {place.token, logit};
        }
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
        top[before] = {mine.token, mine.logprob - view.max - shared.ln_sum};
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
    if (wants_logprobs || !has_edits) {
        scan = scan_row(shared, logits, args.vocab, nullptr);
        if (scan.broken != NONE) return {scan.broken, FAULT_LOGIT, 0.0f, 0};
        if (scan.token == NONE) return {0, FAULT_NOTHING_LEFT, 0.0f, 0};
    }
    if (wants_logprobs) {
        const float ln_sum = ln_sum_of(shared, logits, args.vocab, scan.max);
        if (threadIdx.x == 0) shared.raw_max = scan.max, shared.ln_sum = ln_sum;
        const View& view = set_view(shared, {logits, args.vocab, 1.0f, scan.max, true, NONE});
        out.top_count = write_top(shared, top, view, row.logprobs == NONE ? 0 : row.logprobs);
    }
    if (!draws) {
        out.token = row.target;
        out.logprob = row.target < args.vocab ? logits[row.target] - shared.raw_max - shared.ln_sum : minus_infinity();
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
        const View& view = set_view(shared, {logits, args.vocab, row.inv_temperature, largest, false, NONE});
        out.token = draw(shared, row, view, scan.token);
    }
    if (wants_logprobs) out.logprob = raw_logit(shared, edits, logits, out.token) - shared.raw_max - shared.ln_sum;
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
