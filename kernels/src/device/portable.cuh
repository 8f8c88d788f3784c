// The only header a kernel includes. Compiled by NVRTC (or nvcc) it maps to CUDA and inline PTX; compiled by an
// ordinary C++ compiler it maps to the host emulator. It includes no CUDA header, so NVRTC needs no toolkit.
//
// Kernels use CUDA's built-in names (threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd, ...) and, for all that
// would need PTX or a CUDA header, the names below. Nothing else.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

/// Storage only; all arithmetic is in float.
struct bf16 {
    u16 bits;
};

/// 16 bytes as one lane loads them: eight bf16, the lower index in the lower half of each word.
struct alignas(16) Words4 {
    u32 x, y, z, w;
};

#ifdef __CUDACC__

#define KERNEL extern "C" __global__
#define KERNEL_ENTRY(name, Args, threads, min_blocks) KERNEL void __launch_bounds__(threads, min_blocks) name(const Args args)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SHARED_ARRAY(type, name, dims) __shared__ type name dims
#define DYNAMIC_SHARED(type, name)                                        \
    extern __shared__ __align__(16) unsigned char loramux_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(loramux_dynamic_shared)

/// 16 bytes of global memory that no one writes during this kernel. The address is a multiple of 16.
/// `volatile`, here and below, keeps loads before an mma that was written after them. ptxas may still move them: check SASS.
DEVICE Words4 load16(const void* from) {
    Words4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

/// The same for data that is read once: it takes no place in L1.
DEVICE Words4 load16_once(const void* from) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

/// d += a * b for one 16 x 8 tile over 16 k; see the emulator's `mma_bf16` for which lane holds what.
DEVICE void mma_bf16_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE float to_float(bf16 v) { return __uint_as_float(u32(v.bits) << 16); }

/// Rounds to nearest, ties to even; a NaN becomes 0x7fff.
DEVICE bf16 to_bf16(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

DEVICE float fast_exp(float v) { return __expf(v); }
DEVICE float fast_rsqrt(float v) { return rsqrtf(v); }

#else

#define KERNEL extern "C"
#define KERNEL_ENTRY(name, Args, threads, min_blocks) \
    static void name##_body(const Args& args); \
    extern "C" unsigned name##__args_bytes() { return sizeof(Args); } \
    extern "C" int name##__launch(const EmuLaunch* l, const void* a, char* e, unsigned long long n) { \
        const Args& args = *static_cast<const Args*>(a); return loramux_emu_run(l, e, n, [&] { name##_body(args); }); } \
    static void name##_body(const Args& args)
#define DEVICE inline
#define UNROLL
#define SHARED_ARRAY(type, name, dims)  \
    static const char name##_tag = 0;   \
    type(&name) dims = *reinterpret_cast<type(*) dims>(emu::shared_bytes(&name##_tag, sizeof(type dims)))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::dynamic_shared_bytes())

DEVICE Words4 load16(const void* from) {
    Words4 v;
    std::memcpy(&v, emu::require_aligned(static_cast<const char*>(from), 16, "load16"), sizeof v);
    return v;
}
DEVICE Words4 load16_once(const void* from) { return load16(from); }

DEVICE void mma_bf16_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emu::mma_bf16(d, a, b); }

DEVICE float to_float(bf16 v) { return emu::bf16_bits_to_float(v.bits); }

DEVICE bf16 to_bf16(float v) {
    u32 word;
    std::memcpy(&word, &v, sizeof word);
    if (v != v) return bf16{0x7fff};
    return bf16{u16((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

DEVICE float fast_exp(float v) { return std::exp(v); }
DEVICE float fast_rsqrt(float v) { return 1.0f / std::sqrt(v); }

using elem = bf16;
DEVICE elem to_elem(float v) { return to_bf16(v); }
DEVICE void store16(void* to, Words4 v) { std::memcpy(to, &v, 16); }
DEVICE void unpack2(u32 w, float& lo, float& hi) { lo = to_float(bf16{u16(w)}); hi = to_float(bf16{u16(w >> 16)}); }
DEVICE u32 pack2(float lo, float hi) { return u32(to_bf16(lo).bits) | u32(to_bf16(hi).bits) << 16; }
DEVICE Words4 load16_fresh(const void* from) { return load16(from); }
DEVICE float exact_exp(float v) { return std::exp(v); }
#endif
