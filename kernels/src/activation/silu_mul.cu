// out[row][i] = silu(gate[row][i]) * up[row][i], silu(g) = g / (1 + e^-g).
//
// A gate_up row is [gate | up], 2 * WIDTH elements. One thread takes 8 outputs.

#include "silu.cuh"

constexpr u32 SILU_THREADS = 256;

struct SiluMulArgs {
    const elem* gate_up;  // [rows][2 * width]
    elem* out;            // [rows][width]
    u32 rows;             // of the bucket: padding rows are computed too
    u32 width;            // a multiple of 8
};

DEVICE u32 silu_mul_pair(u32 gate, u32 up) {
    float g0, g1, u0, u1;
    unpack2(gate, g0, g1);
    unpack2(up, u0, u1);
    return pack2(swiglu(g0, u0), swiglu(g1, u1));
}

KERNEL_ENTRY(silu_mul, SiluMulArgs, SILU_THREADS, 4) {
    const u32 per_row = args.width / 8;
    const u64 units = u64(args.rows) * per_row;
    for (u64 unit = u64(blockIdx.x) * SILU_THREADS + threadIdx.x; unit < units; unit += u64(gridDim.x) * SILU_THREADS) {
        const u64 row = unit / per_row, column = unit % per_row * 8;
        const elem* gate = args.gate_up + row * 2 * args.width + column;
        const Words4 g = load16(gate), u = load16(gate + args.width);
        store16(args.out + row * args.width + column,
                {silu_mul_pair(g.x, u.x), silu_mul_pair(g.y, u.y), silu_mul_pair(g.z, u.z), silu_mul_pair(g.w, u.w)});
    }
}
