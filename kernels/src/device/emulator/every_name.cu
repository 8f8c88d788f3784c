// Uses every name that a kernel may use, so that both forms of each stay in step: NVRTC compiles it for each architecture,
// the self-test compiles and runs it in the emulator. What it computes means nothing.
#include "portable.cuh"

struct EveryNameArgs {
    const elem* values;  // 512
    float* out;          // 1024, the first 256 zero
    u32* words;          // 2 zeros
    u64* longs;          // 2 zeros
    i32* ints;           // 2 zeros
    u32 valid;           // threads whose copy is not zero-filled
};

constexpr u32 EVERY_NAME_THREADS = 64;
constexpr u32 EVERY_LANE = 0xffffffffu;

DEVICE float every_load(const EveryNameArgs& args) {
    const u32 thread = threadIdx.x;
    const Words4 a = load16(args.values + 8 * thread), b = load16_once(args.values + 8 * thread);
    const Words2 c = load8(args.values + 4 * thread), d = load8_once(args.values + 4 * thread);
    float* own = args.out + 4 * thread;
    const Words4 e = load16_fresh(own);
    const Words2 f = load8_fresh(own);
    const Float4 g = loadf4_fresh(own), h = loadf4(args.out + 512 + 4 * thread);
    storef4(own, g);
    store16(own, e);
    store8(own, f);
    return bits_float((a.x ^ b.y ^ c.x ^ d.y ^ e.z ^ f.x) & 0x3fffffffu) + g.x + h.x;
}

DEVICE float every_tile(const EveryNameArgs& args) {
    SHARED_ARRAY(Words4, rows, [EVERY_NAME_THREADS]);
    DYNAMIC_SHARED(Words4, more);
    const u32 thread = threadIdx.x, lane = thread % 32;
    cp_async16(&rows[thread], args.values + 8 * thread, thread < args.valid);
    cp_async_commit();
    cp_async16(&more[thread], args.values + 8 * thread);
    cp_async_commit();
    cp_async_wait<1>();
    cp_async_wait<0>();
    __syncwarp();
    u32 a[4], b[2], a_turned[4], b_turned[2];
    ldmatrix_x4(a, &rows[thread]);
    ldmatrix_x4_trans(a_turned, &more[thread]);
    ldmatrix_x2(b, &rows[thread - lane + lane % 16]);
    ldmatrix_x2_trans(b_turned, &more[thread - lane + lane % 16]);
    float sums[4] = {0, 0, 0, 0};
    UNROLL
    for (u32 i = 0; i < 2; ++i) mma_16x8x16(sums, a, b);
    mma_16x8x16(sums, a_turned, b_turned);
    float low, high;
    unpack2(pack2(sums[0], sums[1]), low, high);
    return low + high + to_float(to_elem(sums[2])) + to_float(bf16{1}) + to_float(f16{1});
}

DEVICE float every_function(float v) {
    const float x = fabsf(v) + 1;
    float sum = fast_exp(x) + fast_exp2(x) + fast_rsqrt(x) + fast_log(x) + exact_exp(x);
    sum += float(exact_log(double(x)) + exact_exp(double(-x)) + fma(double(x), 2.0, 3.0));
    sum += sqrtf(x) + fmaxf(x, 2) + fminf(x, 2) + fmaf(x, x, x) + expf(-x) + exp2f(-x) + logf(x) + log2f(x) + powf(x, 0.5f);
    sum += sinf(x) + cosf(x) + tanhf(x) + floorf(x) + ceilf(x) + rintf(x);
    sum += __fmul_rn(x, x) + __fadd_rn(x, x) + __fsub_rn(x, 1) + __fmaf_rn(x, x, x) + __fdiv_rn(x, 3) + __fsqrt_rn(x);
    const u32 word = float_bits(sum);
    const int bits = leading_zeros(word) + popcount(word) + lowest_bit(word) + int(mulhi(word, 12345));
    sum += float(min(bits, 3) + max(bits, 3)) + float(min(word, 4u) + max(word, 4u)) + min(sum, 3.0f) + max(sum, 3.0f);
    return sum + float(min(u64(word), u64(3)) + max(u64(word), u64(3)));
}

DEVICE float every_meeting(float v) {
    const u32 vote = float_bits(v) & 1;
    u32 sum = __ballot_sync(EVERY_LANE, int(vote)) + u32(__any_sync(EVERY_LANE, int(vote)) + __all_sync(EVERY_LANE, int(vote)));
    sum += u32(__syncthreads_or(int(vote)) + __syncthreads_and(int(vote)) + __syncthreads_count(int(vote)));
    sum += __shfl_sync(EVERY_LANE, sum, 3) + __shfl_up_sync(EVERY_LANE, sum, 1, 16);
    const u64 wide = __shfl_xor_sync(EVERY_LANE, u64(sum), 1);
    return __shfl_down_sync(EVERY_LANE, v, 2) + float(wide % 1024) + float(blockDim.x + gridDim.x + gridDim.y + blockIdx.y);
}

DEVICE void every_atomic(const EveryNameArgs& args) {
    SHARED_ARRAY(u32, count, [1]);
    if (threadIdx.x == 0) atomicExch(&count[0], 0u);
    __syncthreads();
    atomicAdd(&count[0], 1u);
    atomicAdd(args.words, 1u), atomicMax(args.words, 2u), atomicMin(args.words, 900u), atomicCAS(args.words + 1, 0u, 7u);
    atomicAdd(args.longs, 1ull), atomicMax(args.longs, 2ull), atomicMin(args.longs, 900ull), atomicCAS(args.longs + 1, 0ull, 7ull);
    atomicAdd(args.ints, 1), atomicMax(args.ints, 2), atomicMin(args.ints, 900), atomicCAS(args.ints + 1, 0, 7);
    atomicAdd(args.out + 900, 1.0f);
    __threadfence();
    atomicExch(args.words + 1, 3u), atomicExch(args.longs + 1, 3ull), atomicExch(args.ints + 1, 3), atomicExch(args.out + 901, 1.5f);
}

KERNEL_ENTRY(every_name, EveryNameArgs, EVERY_NAME_THREADS, 4) {
    const float loaded = every_load(args), tile = every_tile(args);
    every_atomic(args);
    args.out[256 + threadIdx.x] = every_meeting(loaded + tile) + every_function(loaded);
}
