// residual += y (rounded to elem), then out = elem(residual * r * weight), r = 1 / sqrt(mean of residual^2 + eps).
// Without y (a null pointer) it is the plain norm, and the residual is only read.
//
// One block takes a row. Its values stay in registers between the two passes, so that memory sees each of them once:
// thread t holds the 8 values of vector t, t + 256, ... (16 bytes, NORM_WIDTH / 8 vectors in all; a row of 4096 is two of
// them, one of 576 keeps 72 threads busy). Bound by bytes: rows * width * 8, and by the latency of one row where rows are
// few. The norm sees the rounded residual, which is what the next layer sees too.
//
// The sum's order is fixed by the width: a thread's values by index, halves of a warp, then the 8 warps by number.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 NORM_THREADS = 256;
constexpr u32 NORM_WARPS = NORM_THREADS / 32;

struct RmsNormArgs {
    elem* residual;       // [rows][NORM_WIDTH]
    const elem* y;        // [rows][NORM_WIDTH], or null
    const float* weight;  // [NORM_WIDTH]
    elem* out;            // [rows][NORM_WIDTH]
    u32 rows;             // of the bucket: padding rows are computed too
    float eps;
};

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

template <u32 WIDTH>
DEVICE void rms_norm_body(const RmsNormArgs& args) {
    static_assert(WIDTH % 8 == 0, "a row is whole vectors of 16 bytes");
    constexpr u32 VECTORS = WIDTH / 8;
    constexpr u32 PER_THREAD = (VECTORS + NORM_THREADS - 1) / NORM_THREADS;
    for (u32 row = blockIdx.x; row < args.rows; row += gridDim.x) {
        elem* residual = args.residual + u64(row) * WIDTH;
        Words4 values[PER_THREAD];
        float sum = 0.0f;
        UNROLL
        for (u32 i = 0; i < PER_THREAD; ++i) {
            const u32 vector = i * NORM_THREADS + threadIdx.x;
            if (vector < VECTORS) {
                Words4 v = load16_fresh(residual + vector * 8);  // not cached as constant: it is written below
                if (args.y) {
                    const Words4 y = load16(args.y + u64(row) * WIDTH + vector * 8);
                    v = {add_pair(v.x, y.x), add_pair(v.y, y.y), add_pair(v.z, y.z), add_pair(v.w, y.w)};
                    store16(residual + vector * 8, v);
                }
                sum = add_squares(add_squares(add_squares(add_squares(sum, v.x), v.y), v.z), v.w);
                values[i] = v;
            }
        }
        const float r = fast_rsqrt(block_sum(sum) / float(WIDTH) + args.eps);
        UNROLL
        for (u32 i = 0; i < PER_THREAD; ++i) {
            const u32 vector = i * NORM_THREADS + threadIdx.x;
            if (vector < VECTORS) {
                const Float4 low = loadf4(args.weight + vector * 8), high = loadf4(args.weight + vector * 8 + 4);
                const Words4 v = values[i];
                store16(args.out + u64(row) * WIDTH + vector * 8,
                        {norm_pair(v.x, r, low.x, low.y), norm_pair(v.y, r, low.z, low.w),
                         norm_pair(v.z, r, high.x, high.y), norm_pair(v.w, r, high.z, high.w)});
            }
        }
    }
}

KERNEL_ENTRY(rms_norm, RmsNormArgs, NORM_THREADS, 4) { rms_norm_body<NORM_WIDTH>(args); }
