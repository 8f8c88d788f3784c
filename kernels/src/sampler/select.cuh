
// How far down the order (likelier first, then the lower id) a filter reaches, without sorting. Part of sampler.cu.
//
// A place in the order is a tuple of digits, and each level of a radix search counts the tokens that share the digits found
// so far: the distance below the maximum in steps of 1/64, three digits of the float, two of the id. A float's leading bits
// alone would put most of a row into a few bins, where threads wait for each other; distances spread it. A search mostly
// ends after three or four levels, at a bin of which everything stays.
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
