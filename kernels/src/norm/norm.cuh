// The norm of one row by one block: the same code, and so the same bits, in every kernel that norms.
#pragma once

#include "portable.cuh"

constexpr u32 NORM_THREADS = 256;
constexpr u32 NORM_WARPS = NORM_THREADS / 32;

DEVICE u32 add_pair(u32 a, u32 b) {
    float a0, a1, b0, b1;
    unpack2(a, a0, a1);
    unpack2(b, b0, b1);
    return pack2(a0 + b0, a1 + b1);
}

DEVICE float add_squares(float sum, u32 pair) {
    float lo, hi;
    unpack2(pair, lo, hi);
    return sum + lo * lo + hi * hi;
}

DEVICE u32 norm_pair(u32 pair, float r, float w0, float w1) {
    float lo, hi;
    unpack2(pair, lo, hi);
    return pack2(lo * r * w0, hi * r * w1);
}

/// The same sum in every thread of the block.
DEVICE float block_sum(float value) {
    SHARED_ARRAY(float, warp_sums, [NORM_WARPS]);
    UNROLL
    for (u32 half = 16; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    UNROLL
    for (u32 warp = 0; warp < NORM_WARPS; ++warp) sum += warp_sums[warp];
    __syncthreads();  // `warp_sums` is free for the next row
    return sum;
}

/// residual += y unless y is null, then out = norm(residual). Thread t holds vectors t, t + 256, ... of 8 values.
template <u32 WIDTH>
DEVICE void norm_row(elem* residual, const elem* y, const float* weight, elem* out, float eps) {
    static_assert(WIDTH % 8 == 0, "a row is whole vectors of 16 bytes");
    constexpr u32 VECTORS = WIDTH / 8;
    constexpr u32 PER_THREAD = (VECTORS + NORM_THREADS - 1) / NORM_THREADS;
    Words4 values[PER_THREAD];
    float sum = 0.0f;
    UNROLL
    for (u32 i = 0; i < PER_THREAD; ++i) {
        const u32 vector = i * NORM_THREADS + threadIdx.x;
        if (vector < VECTORS) {
            Words4 v = load16_fresh(residual + vector * 8);  // not cached as constant: it is written by these kernels
            if (y) {
                const Words4 w = load16(y + vector * 8);
                v = {add_pair(v.x, w.x), add_pair(v.y, w.y), add_pair(v.z, w.z), add_pair(v.w, w.w)};
                store16(residual + vector * 8, v);
            }
            sum = add_squares(add_squares(add_squares(add_squares(sum, v.x), v.y), v.z), v.w);
            values[i] = v;
        }
    }
    const float r = fast_rsqrt(block_sum(sum) / float(WIDTH) + eps);
    UNROLL
    for (u32 i = 0; i < PER_THREAD; ++i) {
        const u32 vector = i * NORM_THREADS + threadIdx.x;
        if (vector < VECTORS) {
            const Float4 low = loadf4(weight + vector * 8), high = loadf4(weight + vector * 8 + 4);
            const Words4 v = values[i];
            store16(out + vector * 8, {norm_pair(v.x, r, low.x, low.y), norm_pair(v.y, r, low.z, low.w),
                                       norm_pair(v.z, r, high.x, high.y), norm_pair(v.w, r, high.z, high.w)});
        }
    }
}
