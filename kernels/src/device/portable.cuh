// The only header a kernel includes. NVRTC (or nvcc) maps it to CUDA and inline PTX, an ordinary C++ compiler to the host
// emulator; both forms of a name stand in this file. It includes no CUDA header, so NVRTC needs no toolkit.
//
// Kernels use CUDA's built-in names (threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd, ...) and, for all that needs
// PTX or a CUDA header, the names below. The emulator knows no others: see emulator/emulator.h for its list and rules.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

/// Storage only, like `f16`; all arithmetic is in float.
struct bf16 {
    u16 bits;
};

struct f16 {
    u16 bits;
};

/// The model's 16-bit type.
#ifdef ELEM_F16
using elem = f16;
#else
using elem = bf16;
#endif

/// 8 and 16 bytes as one lane loads them: of 16-bit values, the lower index is in the lower half of each word.
struct alignas(8) Words2 {
    u32 x, y;
};

struct alignas(16) Words4 {
    u32 x, y, z, w;
};

struct alignas(16) Float4 {
    float x, y, z, w;
};

#ifdef __CUDACC__

// ---- CUDA -------------------------------------------------------------------------------------------------------
// `volatile` on loads and mma keeps a batch of loads before an mma that was written after them. ptxas may still move
// them: check SASS.

#define KERNEL_ENTRY(name, ArgsType, threads, min_blocks) \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const ArgsType args)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SHARED_ARRAY(type, name, dims) __shared__ type name dims
#define DYNAMIC_SHARED(type, name)                                          \
    extern __shared__ __align__(16) unsigned char loramux_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(loramux_dynamic_shared)

DEVICE u32 float_bits(float v) { return __float_as_uint(v); }
DEVICE float bits_float(u32 v) { return __uint_as_float(v); }
DEVICE u32 mulhi(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE int leading_zeros(u32 v) { return __clz(int(v)); }
DEVICE int popcount(u32 v) { return __popc(v); }
DEVICE int lowest_bit(u32 v) { return __ffs(int(v)); }

DEVICE float fast_exp(float v) { return __expf(v); }
DEVICE float fast_log(float v) { return __logf(v); }
DEVICE float fast_rsqrt(float v) { return rsqrtf(v); }
DEVICE float fast_exp2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float exact_exp(float v) { return expf(v); }
DEVICE double exact_exp(double v) { return exp(v); }
DEVICE double exact_log(double v) { return log(v); }

DEVICE float to_float(bf16 v) { return __uint_as_float(u32(v.bits) << 16); }
DEVICE float to_float(f16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}

/// 16 bytes of global memory that no one writes during this kernel. The address is a multiple of 16.
DEVICE Words4 load16(const void* from) {
    Words4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

/// The same for data that is read once, such as weights: it takes no place in L1.
DEVICE Words4 load16_once(const void* from) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

DEVICE Words2 load8(const void* from) {
    Words2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

DEVICE Words2 load8_once(const void* from) {
    Words2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

DEVICE Float4 loadf4(const float* from) {
    Float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "l"(from));
    return v;
}

/// Global memory that this kernel may write: a plain, coherent load. The clobber keeps it where it stands among stores
/// and fences.
DEVICE Words4 load16_fresh(const void* from) {
    Words4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from)
        : "memory");
    return v;
}

DEVICE Words2 load8_fresh(const void* from) {
    Words2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}

DEVICE Float4 loadf4_fresh(const float* from) {
    Float4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "l"(from)
        : "memory");
    return v;
}

/// To global or shared memory. The address is a multiple of the bytes stored.
DEVICE void store16(void* to, Words4 v) { *static_cast<Words4*>(to) = v; }
DEVICE void store8(void* to, Words2 v) { *static_cast<Words2*>(to) = v; }
DEVICE void storef4(float* to, Float4 v) { *reinterpret_cast<Float4*>(to) = v; }

// What differs between the two element types.
#ifdef ELEM_F16
#define LORAMUX_ELEM "f16"
#else
#define LORAMUX_ELEM "bf16"
#endif

/// Rounds to nearest, ties to even; a NaN becomes 0x7fff.
DEVICE elem to_elem(float v) {
    elem r;
    asm("cvt.rn." LORAMUX_ELEM ".f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

DEVICE u32 pack2(float low, float high) {
    u32 r;
    asm("cvt.rn." LORAMUX_ELEM "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

/// d += a * b for one 16 x 8 tile over 16 k; the emulator's `mma_16x8x16` says which lane holds what.
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." LORAMUX_ELEM "." LORAMUX_ELEM ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#undef LORAMUX_ELEM

DEVICE u32 shared_address(const void* shared) {
    u64 r;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(r) : "l"(shared));
    return u32(r);
}

/// Starts a copy of 16 bytes from global to shared memory, past the registers and L1. Without `valid` it writes zeros and
/// reads nothing. This thread may read the bytes after the `cp_async_wait` of their group, the others after a barrier.
DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16u : 0u)
                 : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most the N youngest groups of this thread are still under way.
template <int N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Loads 8 x 8 tiles of 16-bit values from shared memory. Lanes 8 i .. 8 i + 7 bring the addresses of the eight 16-byte
/// rows of tile i; r[i] is row lane / 4, columns 2 (lane % 4) and the next, of tile i, or the same of its transpose.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(shared_row))
        : "memory");
}

DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(shared_row))
        : "memory");
}

/// Two tiles: the addresses of lanes 0 .. 15 count.
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(shared_address(shared_row))
        : "memory");
}

DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(shared_address(shared_row))
        : "memory");
}

#else

// ---- Host emulator ----------------------------------------------------------------------------------------------

#include "emulator/emulator.h"

#define KERNEL_ENTRY(name, ArgsType, threads, min_blocks) EMU_KERNEL_ENTRY(name, ArgsType, threads)
#define DEVICE inline
#define UNROLL
// An array lies exactly as its type demands and no better: see `emu::shared_array`.
#define SHARED_ARRAY(type, name, dims) \
    static const char name##_tag = 0;  \
    type(&name) dims =                 \
        *reinterpret_cast<type(*) dims>(emu::shared_array(&name##_tag, #name, sizeof(type dims), alignof(type)))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::dynamic_shared())

DEVICE u32 float_bits(float v) { return __builtin_bit_cast(u32, v); }
DEVICE float bits_float(u32 v) { return __builtin_bit_cast(float, v); }
DEVICE u32 mulhi(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
DEVICE int leading_zeros(u32 v) { return v == 0 ? 32 : __builtin_clz(v); }
DEVICE int popcount(u32 v) { return __builtin_popcount(v); }
DEVICE int lowest_bit(u32 v) { return __builtin_ffs(int(v)); }

DEVICE float fast_exp(float v) { return __builtin_expf(v); }
DEVICE float fast_log(float v) { return __builtin_logf(v); }
DEVICE float fast_rsqrt(float v) { return 1.0f / __builtin_sqrtf(v); }
DEVICE float fast_exp2(float v) { return __builtin_exp2f(v); }
DEVICE float exact_exp(float v) { return __builtin_expf(v); }
DEVICE double exact_exp(double v) { return __builtin_exp(v); }
DEVICE double exact_log(double v) { return __builtin_log(v); }

DEVICE float to_float(bf16 v) { return bits_float(u32(v.bits) << 16); }
DEVICE float to_float(f16 v) { return emu::f16_to_float(v.bits); }
DEVICE elem to_elem(float v) {
#ifdef ELEM_F16
    return {emu::float_to_f16(v)};
#else
    return {emu::float_to_bf16(v)};
#endif
}
DEVICE u32 pack2(float low, float high) { return to_elem(low).bits | u32(to_elem(high).bits) << 16; }

DEVICE Words4 load16(const void* from) { return __builtin_bit_cast(Words4, emu::load16(from, emu::Load::ReadOnly)); }
DEVICE Words4 load16_once(const void* from) { return load16(from); }
DEVICE Words4 load16_fresh(const void* from) { return __builtin_bit_cast(Words4, emu::load16(from, emu::Load::Fresh)); }
DEVICE Words2 load8(const void* from) { return __builtin_bit_cast(Words2, emu::load8(from, emu::Load::ReadOnly)); }
DEVICE Words2 load8_once(const void* from) { return load8(from); }
DEVICE Words2 load8_fresh(const void* from) { return __builtin_bit_cast(Words2, emu::load8(from, emu::Load::Fresh)); }
DEVICE Float4 loadf4(const float* from) { return __builtin_bit_cast(Float4, load16(from)); }
DEVICE Float4 loadf4_fresh(const float* from) { return __builtin_bit_cast(Float4, load16_fresh(from)); }
DEVICE void store16(void* to, Words4 v) { emu::store16(to, __builtin_bit_cast(emu::Bytes16, v)); }
DEVICE void store8(void* to, Words2 v) { emu::store8(to, __builtin_bit_cast(u64, v)); }
DEVICE void storef4(float* to, Float4 v) { emu::store16(to, __builtin_bit_cast(emu::Bytes16, v)); }

// Fragments travel by value: an array whose address left this file would have to live in memory.
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE()) {
    const emu::Bytes16 sums = __builtin_bit_cast(emu::Bytes16, Float4{d[0], d[1], d[2], d[3]});
    const emu::Bytes16 left = __builtin_bit_cast(emu::Bytes16, Words4{a[0], a[1], a[2], a[3]});
#ifdef ELEM_F16
    const bool is_f16 = true;
#else
    const bool is_f16 = false;
#endif
    const Float4 r = __builtin_bit_cast(Float4, emu::mma_16x8x16(sums, left, b[0] | u64(b[1]) << 32, is_f16, line));
    d[0] = r.x, d[1] = r.y, d[2] = r.z, d[3] = r.w;
}

DEVICE void cp_async16(void* shared, const void* global, bool valid = true) { emu::cp_async16(shared, global, valid); }
DEVICE void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
DEVICE void cp_async_wait() {
    emu::cp_async_wait(N);
}

DEVICE void ldmatrix_x4(u32 (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    const Words4 v = __builtin_bit_cast(Words4, emu::ldmatrix(shared_row, 4, false, line));
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    const Words4 v = __builtin_bit_cast(Words4, emu::ldmatrix(shared_row, 4, true, line));
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* shared_row, int line = __builtin_LINE()) {
    const Words4 v = __builtin_bit_cast(Words4, emu::ldmatrix(shared_row, 2, false, line));
    r[0] = v.x, r[1] = v.y;
}
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* shared_row, int line = __builtin_LINE()) {
    const Words4 v = __builtin_bit_cast(Words4, emu::ldmatrix(shared_row, 2, true, line));
    r[0] = v.x, r[1] = v.y;
}

#endif

/// The two elements of a word, the lower half first.
DEVICE void unpack2(u32 word, float& low, float& high) {
    low = to_float(elem{u16(word)});
    high = to_float(elem{u16(word >> 16)});
}
