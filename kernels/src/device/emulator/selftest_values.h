// Self-test of what each emulated instruction computes.
#pragma once

#include "../portable.cuh"
#include "every_name.cu"
#include "selftest_check.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

struct CollectiveArgs {
    int *sums, *downs, *ups, *from_seven;
    u32* total;
    int* votes;
};

KERNEL_ENTRY(collectives, CollectiveArgs, 64, 1) {
    const u32 all = 0xffffffffu;
    const int thread = int(threadIdx.x);
    int sum = thread;
    UNROLL
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(all, sum, bits);
    const u32 even = __ballot_sync(all, thread % 2 == 0);
    const bool votes_agree = __any_sync(all, thread == 40) == (thread >= 32) && __all_sync(all, thread < 32) == (thread < 32);
    const int counted = __syncthreads_count(thread % 4 == 0);
    const int any = __syncthreads_or(thread == 63), every = __syncthreads_and(thread < 63);
    atomicAdd(args.total, even == 0x55555555u && votes_agree ? 1u : 0u);
    if (blockIdx.x == 0) {
        args.sums[thread] = sum;
        args.votes[thread] = counted + 100 * any + 1000 * every;
    }
    const int down = __shfl_down_sync(all, thread, 3, 8), up = __shfl_up_sync(all, thread, 1, 16);
    const float seven = __shfl_sync(all, float(thread), 7);
    if (blockIdx.x == 0) args.downs[thread] = down, args.ups[thread] = up, args.from_seven[thread] = int(seven);
}

void check_collectives() {
    std::vector<int> sums(64), downs(64), ups(64), from_seven(64), votes(64);
    u32 total = 0;
    for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
        const CollectiveArgs args{sums.data(), downs.data(), ups.data(), from_seven.data(), &total, votes.data()};
        const u32 flags = EMU_INSTRUMENTED ? EMU_RACES : 0;
        check(error_of(collectives__launch, args, {3, 1, 64, 0, schedule, flags, 1}).empty(), "collectives run");
        check(sums[5] == 31 * 16 && sums[40] == 31 * 16 + 32 * 32, "xor shuffle sums each warp");
        check(downs[4] == 7 && downs[5] == 5 && downs[8] == 11, "down shuffle keeps to its group of lanes");
        check(ups[16] == 16 && ups[17] == 16 && ups[63] == 62, "up shuffle keeps to its group of lanes");
        check(from_seven[0] == 7 && from_seven[63] == 39, "indexed shuffle stays in the warp");
        check(votes[0] == 16 + 100 && votes[63] == 16 + 100, "barriers count, or, and");
    }
    check(total == SCHEDULES * 3 * 64, "votes and atomicAdd over three blocks");
}

void check_conversions() {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
    check(emu::float_to_bf16(1.0f) == 0x3f80 && emu::float_to_bf16(-2.5f) == 0xc020, "bf16: exact values");
    check(emu::float_to_bf16(1.0f + 1.0f / 256) == 0x3f80 && emu::float_to_bf16(1.0f + 3.0f / 256) == 0x3f82, "bf16: ties to even");
    check(emu::float_to_bf16(inf) == 0x7f80 && emu::float_to_bf16(nan) == 0x7fff, "bf16: infinity and NaN");
    for (u32 bits = 0; bits < 0x7f80; ++bits)
        check(emu::float_to_bf16(to_float(bf16{u16(bits)})) == bits, "bf16: round trip");

    check(emu::f16_to_float(1) == 0x1p-24f && emu::f16_to_float(0x7bff) == 65504 && emu::f16_to_float(0xfc00) == -inf, "f16: values");
    check(std::isnan(emu::f16_to_float(0x7e00)) && emu::float_to_f16(nan) == 0x7fff && emu::float_to_f16(-inf) == 0xfc00, "f16: NaN");
    check(emu::float_to_f16(65519.996f) == 0x7bff && emu::float_to_f16(65520) == 0x7c00, "f16: overflow");
    // Between each two neighbours: what lies below the middle, on it and above it. Middles are exact in float.
    for (u32 bits = 0; bits < 0x7bff; ++bits) {
        const float low = emu::f16_to_float(u16(bits)), high = emu::f16_to_float(u16(bits + 1)), middle = (low + high) / 2;
        bool right = emu::float_to_f16(low) == bits && emu::float_to_f16(-low) == (bits | 0x8000);
        right &= emu::float_to_f16(middle) == (bits % 2 == 0 ? bits : bits + 1);
        right &= emu::float_to_f16(std::nextafterf(middle, 0)) == bits && emu::float_to_f16(std::nextafterf(middle, inf)) == bits + 1;
        check(right, "f16: rounding");
    }
    float low, high;
    unpack2(pack2(1.5f, -3.0f), low, high);
    check(low == 1.5f && high == -3.0f && u16(pack2(1.5f, -3.0f)) == to_elem(1.5f).bits, "pack2 and unpack2");
}

struct TileArgs {
    const elem *a, *b;  // [16][16], [16][8]
    float* product;     // [16][8]
    u32 *plain, *transposed;  // [4][32], [2][32]
};

// Loads A with ldmatrix and B, stored by k, with its transpose: the usual way to feed an mma.
KERNEL_ENTRY(tile_product, TileArgs, 32, 1) {
    SHARED_ARRAY(Words4, a_rows, [16][2]);
    SHARED_ARRAY(Words4, b_rows, [16]);
    const u32 lane = threadIdx.x;
    cp_async16(&a_rows[lane / 2][lane % 2], args.a + lane * 8);
    cp_async_commit();
    if (lane < 16) store16(&b_rows[lane], load16(args.b + lane * 8));
    cp_async_wait<0>();
    __syncwarp();
    u32 a[4], b[2];
    ldmatrix_x4(a, &a_rows[lane % 16][lane / 16]);
    ldmatrix_x2_trans(b, &b_rows[lane % 16]);
    float sums[4] = {0, 0, 0, 0};
    mma_16x8x16(sums, a, b);
    for (u32 e = 0; e < 4; ++e) args.product[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = sums[e];
    for (u32 i = 0; i < 4; ++i) args.plain[i * 32 + lane] = a[i];
    for (u32 i = 0; i < 2; ++i) args.transposed[i * 32 + lane] = b[i];
}

void check_tiles() {
    alignas(16) elem a[16][16], b[16][8];
    float product[16][8];
    u32 plain[4][32], transposed[2][32];
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) a[i][k] = to_elem(float(i * 16 + k - 100));
        for (int j = 0; j < 8; ++j) b[i][j] = to_elem(float((i * 7 + j * 3) % 11 - 5));
    }
    const TileArgs args{a[0], b[0], product[0], plain[0], transposed[0]};
    const std::string error = error_of(tile_product__launch, args, {1, 1, 32, 0, 0, 0, 1});
    check(error.empty(), "tile product: " + error);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            float want = 0;
            for (int k = 0; k < 16; ++k) want += to_float(a[i][k]) * to_float(b[k][j]);
            check(product[i][j] == want, "ldmatrix and mma multiply");
        }
    check((plain[2][5] & 0xffff) == a[1][10].bits && plain[1][31] >> 16 == a[15][7].bits, "ldmatrix.x4");
    check((transposed[1][9] & 0xffff) == b[10][2].bits && transposed[1][9] >> 16 == b[11][2].bits, "ldmatrix.x2.trans");
}

void check_every_name() {
    std::vector<Block> values(4), out(16), counts(1);
    const auto at = [&counts](u32 offset) { return &counts[0].bytes[offset]; };
    for (u32 schedule = 0; schedule < SCHEDULES; ++schedule) {
        std::memset(out.data(), 0, out.size() * sizeof(Block));
        counts[0] = Block{};
        const EveryNameArgs args{reinterpret_cast<const elem*>(values.data()), reinterpret_cast<float*>(out.data()),
                                 reinterpret_cast<u32*>(at(0)), reinterpret_cast<u64*>(at(16)), reinterpret_cast<i32*>(at(32)), 40};
        const u32 flags = EMU_INSTRUMENTED ? EMU_RACES : 0;
        const std::string error = error_of(every_name__launch, args, {1, 1, 64, 1024, schedule, flags, 1});
        check(error.empty(), "every name: " + error);
        const bool added = args.out[900] == 64 && args.out[901] == 1.5f;
        check(added && args.words[1] == 3 && args.longs[1] == 3 && args.ints[1] == 3, "atomics of every type");
        check(args.words[0] >= 65 && args.words[0] == args.longs[0] && args.ints[0] == i32(args.words[0]), "and their sums");
    }
}

void check_values() {
    check_every_name();
    check_collectives();
    check_conversions();
    check_tiles();
}

}  // namespace
