
// How far down the order (likelier first, then the lower id) a filter reaches, without sorting. Part of sampler.cu.
//
// A place in the order is a tuple of digits, and each level of a radix search counts the tokens that share the digits found
// so far: the distance below the maximum in steps of 1/64, three digits of the float, two of the id. A float's leading bits
// alone would put most of a row into a few bins, where threads wait for each other; distances spread it. A search mostly
// ends after three or four levels, at a bin of which everything stays. Only the first walks the row: tokens that are still
// in question after it are few, are listed, and later levels and the draw look at the list.
//
// Masses are fixed-point integers, 2^44 for the likeliest token: integers may be added in any order.

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

/// Calls visit(first token, logits, how many) for this thread's part of the list, token by token, or of the row, by quads.
template <class Visit>
DEVICE void for_each_candidate(const Shared& shared, const View& view, Visit visit) {
    const bool listed = view.listed != NONE;
    const u32 units = listed ? view.listed : (view.vocab + 3) / 4;
    const auto fetch = [&](u32 unit) {
        return listed ? Float4{shared.list[unit].logit, 0.0f, 0.0f, 0.0f} : load_quad(view.logits, view.vocab, unit);
    };
    u32 unit = threadIdx.x;
    Float4 ahead = unit < units ? fetch(unit) : Float4{};
    while (unit < units) {
        const u32 next = unit + SAMPLE_THREADS;
        const Float4 v = ahead;
        if (next < units) ahead = fetch(next);
        visit(listed ? shared.list[unit].token : unit * 4, v, listed ? 1u : 4u);
        unit = next;
    }
}

/// Whether a token takes part at all.
DEVICE bool is_there(const View& view, float z, u32 token) {
    return view.absent_too ? token < view.vocab : z > minus_infinity();
}

/// Fills the histograms of one level.
DEVICE void count_level(Shared& shared, const View& view, const Place& known, const Place& within, u32 level,
                        bool by_mass) {
    const Level look = level_of(level);
    __syncthreads();  // the bins may still be read from the last time
    for (u32 bin = threadIdx.x; bin < BINS; bin += SAMPLE_THREADS) shared.count[bin] = 0, shared.mass[bin] = 0;
    __syncthreads();
    u32 far = 0;  // the last bin of the first level, which most of a cold row falls into: counted apart
    for_each_candidate(shared, view, [&](u32 first, const Float4& v, u32 tokens) {
        ROLLED  // four exponentials side by side need more registers than there are
        for (u32 i = 0; i < tokens; ++i) {
            const float z = product(element(v, i), view.inv_temperature);
            const Place place = place_of(view.max, z, first + i);
            const u32 unlike = ((place.distance ^ known.distance) & look.distance_known) |
                               ((place.rank ^ known.rank) & look.rank_known) |
                               ((place.token ^ known.token) & look.token_known);
            if (unlike || !is_there(view, z, first + i) || !not_behind(place, within)) continue;
            if (level == 0 && place.distance == BINS - 1) {
                ++far;
                continue;
            }
            const u32 word = level == 0 ? place.distance : level < 4 ? place.rank : place.token;
            const u32 bin = word >> look.shift & look.digits;
            atomicAdd(&shared.count[bin], 1u);
            if (by_mass) atomicAdd(&shared.mass[bin], mass_of(view.max, z));
        }
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

/// Lists the tokens down to this distance, if they are not too many. Their order is by chance and means nothing.
DEVICE void list_candidates(Shared& shared, const View& view, u32 distance, const Place& within) {
    if (view.listed != NONE) return;
    if (threadIdx.x == 0) shared.list_count = 0;
    __syncthreads();
    bool full = false;  // a thread that found no room looks no further
    for_each_quad(view.logits, view.vocab, [&](u32 quad, const Float4& v) {
        ROLLED
        for (u32 i = 0; i < 4 && !full; ++i) {
            const float logit = element(v, i), z = product(logit, view.inv_temperature);
            const Place place = place_of(view.max, z, quad * 4 + i);
            if (place.distance > distance || !is_there(view, z, place.token) || !not_behind(place, within)) continue;
            const u32 at = atomicAdd(&shared.list_count, 1u);
            full = at >= LIST_MAX;
            if (!full) shared.list[at] = {place.token, logit};
        }
    });
    __syncthreads();
    if (threadIdx.x == 0 && shared.list_count <= LIST_MAX) shared.view.listed = shared.list_count;
    __syncthreads();
}

/// The last place that stays if the likeliest tokens do: `count` of them or, with `by_mass`, as few as hold `part` of the
/// mass; at least one. Looks at tokens not behind `within` and never reaches farther. Every thread gets the answer. `view` is
/// the shared one.
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
        if (level == 0) {
            place.distance = bin;
            list_candidates(shared, view, bin, within);
        }
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
