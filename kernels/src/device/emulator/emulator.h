// Host emulator: runs one CUDA C++ kernel on the CPU, thread by thread, with an ordinary C++ compiler. This header is
// what a kernel's translation unit sees, and it is light on purpose: every (kernel, defines) is compiled for itself.
// The runtime behind it is emulator.cpp, compiled once.
//
// Every CUDA thread is a fiber with a stack of its own; one OS thread runs them in turn, block after block. A fiber gives
// way only where CUDA threads meet (barriers, warp collectives), in an order that is ours to choose: `EmuLaunch::schedule`.
// Several OS threads may each run a launch of their own: all state hangs on one thread-local pointer.
//
// Three modes (D = the folder above this one; tried with g++ 12.2, x86-64 and any other processor that has ucontext):
//   K="-std=c++17 -O2 -fPIC -fno-strict-aliasing -fno-gnu-unique -fvisibility=hidden -ffp-contract=off
//      -ftrivial-auto-var-init=pattern -I D"            (the last: a variable no one set is a huge number, not often 0)
//   fast, races:  g++ $K -O3 -shared D/emulator/emulator.cpp -o libemu.so
//   fast:         g++ $K -shared -x c++ kernel.cu -o kernel.so -x none libemu.so -Wl,-rpath,'$ORIGIN'
//   races:        g++ $K -fsanitize=thread --param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0
//                     -shared -x c++ kernel.cu -o kernel.so -x none -nodefaultlibs libemu.so -lm -lgcc -lc -Wl,-rpath,'$ORIGIN'
//   asan + ubsan: both lines of `fast` with -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all. A process that was
//                 not built so loads them after LD_PRELOAD=$(g++ -print-file-name=libasan.so), ASAN_OPTIONS=detect_leaks=0.
// The races mode is g++'s thread sanitizer instrumentation without its library: the runtime answers the calls itself.
// `-nodefaultlibs` keeps libtsan out.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

/// One launch, as Rust describes it. Grids have x and y, blocks x only: 32, 64, ... 1024 threads.
struct EmuLaunch {
    u32 grid_x, grid_y, block_x, dynamic_shared_bytes;
    u32 schedule;  // 0: each warp to its next meeting, in turn; 1: the lowest warp runs ahead; 2: the highest warp, lanes and
                   // blocks in falling order too; 3: shuffled, seeded by `seed`. A correct kernel gives the same under all.
    u32 flags;     // EMU_RACES, EMU_COUNT
    u64 seed;
};
static_assert(sizeof(EmuLaunch) == 32, "Rust passes the same 32 bytes");

/// Check shared and global memory for races. The kernel must have been built in the races mode.
constexpr u32 EMU_RACES = 1;

/// Count memory traffic, see `EmuCounters`. Plain accesses (not by a name of portable.cuh) count in the races mode only.
constexpr u32 EMU_COUNT = 2;

/// The traffic of one launch. An access is one instruction of one warp; what its lanes do at one place of the code between
/// two meetings belongs together. A sector is 32 bytes of global memory, a wavefront one pass over the 32 banks of shared
/// memory: `shared_wavefronts` above `shared_wavefronts_least` are bank conflicts. What caches absorb is not modelled.
struct EmuCounters {
    u64 global_loads, global_load_bytes, global_load_sectors;
    u64 global_stores, global_store_bytes, global_store_sectors;  // and atomics
    u64 shared_accesses, shared_wavefronts, shared_wavefronts_least;
};

struct EmuIndex {
    u32 x, y, z;
};

#pragma GCC visibility push(default)

/// The counters of this OS thread's last launch with EMU_COUNT.
extern "C" void emu_counters(EmuCounters* counters);

namespace emu {

struct Kernel {
    const char* name;
    void (*thread)(const void* args);  // runs one thread, from the first line to the last
    u32 args_bytes, max_threads;
    bool instrumented;  // built in the races mode
};

/// Runs the grid. 0, or 1 with the reason in `error` (NUL-terminated, cut to `error_bytes`).
int launch(const Kernel& kernel, const EmuLaunch& launch, const void* args, char* error, u64 error_bytes) noexcept;

// `const`: a kernel's code never changes its thread, so the compiler may call these once.
[[gnu::const]] EmuIndex thread_index() noexcept;
[[gnu::const]] EmuIndex block_index() noexcept;
[[gnu::const]] EmuIndex block_extent() noexcept;
[[gnu::const]] EmuIndex grid_extent() noexcept;

struct Bytes16 {
    u64 low, high;
};

enum class Load { ReadOnly, Fresh };
Bytes16 load16(const void* from, Load kind);
u64 load8(const void* from, Load kind);
void store16(void* to, Bytes16 value);
void store8(void* to, u64 value);

/// A block's shared array, known by the address of a tag at its declaration. NaN-filled (0xff) when the block's first thread
/// gets here. Its address is a multiple of `alignment` and of nothing larger (below 16): a cast to a wider type without
/// `alignas` shows here as it might on a GPU.
void* shared_array(const void* tag, const char* name, u64 bytes, u64 alignment);
void* dynamic_shared();

void cp_async16(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_left);

// Meetings. `line` is where the kernel's source calls: threads that meet must be at one call, not at two alike.
Bytes16 mma_16x8x16(Bytes16 d, Bytes16 a, u64 b, bool is_f16, int line);
Bytes16 ldmatrix(const void* shared_row, int tiles, bool transposed, int line);

enum class Barrier { Plain, Or, And, Count };
int block_barrier(Barrier kind, bool vote, int line);
u32 ballot(const char* operation, u32 mask, bool vote, int line);
enum class Shuffle { Index, Xor, Down, Up };
u64 shuffle(Shuffle kind, u32 mask, u64 value, u32 operand, int width, int line);

// ---- 16-bit floats, exact: round to nearest even, subnormals, infinity; every NaN becomes 0x7fff -----------------

inline u16 float_to_bf16(float v) {
    const u32 word = __builtin_bit_cast(u32, v);
    return v != v ? u16(0x7fff) : u16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline u16 float_to_f16(float v) {
    const u32 word = __builtin_bit_cast(u32, v), sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and up: past the middle of 65504 and 2^16
    if (magnitude >= 0x38800000) {  // 2^-14 and up: a normal f16
        const u32 rebased = magnitude - (112u << 23);
        return u16(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
    }
    // The multiples of 2^-24: adding 0.5 leaves them in the low bits of the sum, rounded to nearest even by the adder.
    const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    return u16(sign | (__builtin_bit_cast(u32, sum) - 0x3f000000));
}

inline float f16_to_float(u16 bits) {
    const u32 sign = u32(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude > 0x7c00) return __builtin_bit_cast(float, 0x7fffffffu);
    if (magnitude == 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000);
    if (magnitude >= 0x400) return __builtin_bit_cast(float, sign | ((magnitude << 13) + (112u << 23)));
    const float value = float(magnitude) * 0x1p-24f;
    return sign ? -value : value;
}

}  // namespace emu

// ---- The CUDA names that kernels use ----------------------------------------------------------------------------

void __threadfence();
void __syncwarp(u32 mask = 0xffffffffu, int line = __builtin_LINE());

// Atomics on shared and global memory; each returns the old value.
u32 atomicAdd(u32* at, u32 value);
i32 atomicAdd(i32* at, i32 value);
u64 atomicAdd(u64* at, u64 value);
float atomicAdd(float* at, float value);
u32 atomicMax(u32* at, u32 value);
i32 atomicMax(i32* at, i32 value);
u64 atomicMax(u64* at, u64 value);
u32 atomicMin(u32* at, u32 value);
i32 atomicMin(i32* at, i32 value);
u64 atomicMin(u64* at, u64 value);
u32 atomicExch(u32* at, u32 value);
i32 atomicExch(i32* at, i32 value);
u64 atomicExch(u64* at, u64 value);
float atomicExch(float* at, float value);
u32 atomicCAS(u32* at, u32 expected, u32 value);
i32 atomicCAS(i32* at, i32 expected, i32 value);
u64 atomicCAS(u64* at, u64 expected, u64 value);

// The C library's functions that CUDA has under the same names; declared here because <cmath> is slow to compile.
extern "C" {
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float powf(float, float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float tanhf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
double fma(double, double, double) noexcept;
}

#pragma GCC visibility pop

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_extent())
#define gridDim (emu::grid_extent())

inline void __syncthreads(int line = __builtin_LINE()) { emu::block_barrier(emu::Barrier::Plain, false, line); }
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) {
    return emu::block_barrier(emu::Barrier::Or, vote != 0, line);
}
inline int __syncthreads_and(int vote, int line = __builtin_LINE()) {
    return emu::block_barrier(emu::Barrier::And, vote != 0, line);
}
inline int __syncthreads_count(int vote, int line = __builtin_LINE()) {
    return emu::block_barrier(emu::Barrier::Count, vote != 0, line);
}

inline u32 __ballot_sync(u32 mask, int vote, int line = __builtin_LINE()) {
    return emu::ballot("__ballot_sync", mask, vote != 0, line);
}
inline int __any_sync(u32 mask, int vote, int line = __builtin_LINE()) {
    return emu::ballot("__any_sync", mask, vote != 0, line) != 0;
}
inline int __all_sync(u32 mask, int vote, int line = __builtin_LINE()) {
    return emu::ballot("__all_sync", mask, vote != 0, line) == 0xffffffffu;
}

namespace emu {

template <class T>
inline T shuffle_value(Shuffle kind, u32 mask, T value, u32 operand, int width, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    if constexpr (sizeof(T) == 4) {
        return __builtin_bit_cast(T, u32(shuffle(kind, mask, __builtin_bit_cast(u32, value), operand, width, line)));
    } else {
        return __builtin_bit_cast(T, shuffle(kind, mask, __builtin_bit_cast(u64, value), operand, width, line));
    }
}

}  // namespace emu

template <class T>
inline T __shfl_sync(u32 mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle_value(emu::Shuffle::Index, mask, value, u32(source), width, line);
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle_value(emu::Shuffle::Xor, mask, value, u32(bits), width, line);
}
template <class T>
inline T __shfl_down_sync(u32 mask, T value, u32 delta, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle_value(emu::Shuffle::Down, mask, value, delta, width, line);
}
template <class T>
inline T __shfl_up_sync(u32 mask, T value, u32 delta, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle_value(emu::Shuffle::Up, mask, value, delta, width, line);
}

// Products and sums that no compiler fuses; kernels are compiled with -ffp-contract=off, so all are such here.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline u32 min(u32 a, u32 b) { return b < a ? b : a; }
inline u32 max(u32 a, u32 b) { return a < b ? b : a; }
inline u64 min(u64 a, u64 b) { return b < a ? b : a; }
inline u64 max(u64 a, u64 b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ---- What KERNEL_ENTRY becomes: the C functions that Rust finds with dlsym ----------------------------------------

#ifdef __SANITIZE_THREAD__
#define EMU_INSTRUMENTED true
#else
#define EMU_INSTRUMENTED false
#endif

#define EMU_KERNEL_ENTRY(name, ArgsType, threads)                                                                        \
    static void name##__body(const ArgsType args);                                                                       \
    static void name##__thread(const void* args) { name##__body(*static_cast<const ArgsType*>(args)); }                  \
    extern "C" __attribute__((visibility("default"))) u32 name##__args_bytes() { return sizeof(ArgsType); }              \
    extern "C" __attribute__((visibility("default"))) int name##__launch(const EmuLaunch* launch, const void* args,      \
                                                                         char* error, u64 error_bytes) {                 \
        const emu::Kernel kernel = {#name, name##__thread, sizeof(ArgsType), threads, EMU_INSTRUMENTED};                 \
        return emu::launch(kernel, *launch, args, error, error_bytes);                                                   \
    }                                                                                                                    \
    static void name##__body(const ArgsType args)
