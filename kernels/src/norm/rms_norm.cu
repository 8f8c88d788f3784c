// residual += y (rounded to elem), then out = elem(residual * r * weight), r = 1 / sqrt(mean of residual^2 + eps).
// Without y (a null pointer) it is the plain norm, and the residual is only read.
//
// One block takes a row. Its values stay in registers between the two passes, so that memory sees each of them once:
// thread t holds the 8 values of vector t, t + 256, ... (16 bytes, NORM_WIDTH / 8 vectors in all; a row of 4096 is two of
// them, one of 576 keeps 72 threads busy). Bound by bytes: rows * width * 8, and by the latency of one row where rows are
// few. The norm sees the rounded residual, which is what the next layer sees too.
//
// The sum's order is fixed by the width: a thread's values by index, halves of a warp, then the 8 warps by number.

#include "norm.cuh"

struct RmsNormArgs {
    elem* residual;       // [rows][NORM_WIDTH]
    const elem* y;        // [rows][NORM_WIDTH], or null
    const float* weight;  // [NORM_WIDTH]
    elem* out;            // [rows][NORM_WIDTH]
    u32 rows;             // of the bucket: padding rows are computed too
    float eps;
};

KERNEL_ENTRY(rms_norm, RmsNormArgs, NORM_THREADS, 4) {
    for (u32 row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const u64 at = u64(row) * NORM_WIDTH;
        norm_row<NORM_WIDTH>(args.residual + at, args.y ? args.y + at : nullptr, args.weight, args.out + at, args.eps);
    }
}
