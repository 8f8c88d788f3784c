// The CUDA names that are functions of the runtime, and the calls that g++'s thread-sanitizer instrumentation makes for
// every load and store of kernel code. Included at the end of emulator.cpp.
#pragma once

#include "machine.h"

// ---- CUDA -------------------------------------------------------------------------------------------------------

void __threadfence() {
    emu::Machine& m = *emu::machine;
    if (m.racing) m.global_shadow.fence(u16(m.running->thread), m.barrier_generation);
}

void __syncwarp(u32 mask, int line) {
    using namespace emu;
    struct Payload {
    } mine;
    warp_meet("__syncwarp", line, mask, mine, [](Payload**) { ++machine->warp().meetings; });
}

namespace emu {

// Only one fiber runs at a time, so a plain read-modify-write is atomic.
template <class T, class Change>
static T atomic(T* at, const void* site, Change change) {
    require_aligned(at, sizeof(T), "atomic");
    check_access(*machine, at, sizeof(T), Access::Atomic);
    count_access(*machine, site, at, sizeof(T), Access::Atomic);
    const T old = *at;
    *at = change(old);
    return old;
}

}  // namespace emu

#define EMU_ATOMIC(Type, name, expression)                                                                 \
    Type name(Type* at, Type value) {                                                                      \
        return emu::atomic(at, __builtin_return_address(0), [=](Type old) -> Type { return expression; }); \
    }
#define EMU_ATOMIC_CAS(Type)                                                                                    \
    Type atomicCAS(Type* at, Type expected, Type value) {                                                       \
        const void* site = __builtin_return_address(0);                                                         \
        return emu::atomic(at, site, [=](Type old) -> Type { return old == expected ? value : old; });          \
    }
EMU_ATOMIC(u32, atomicAdd, old + value)
EMU_ATOMIC(i32, atomicAdd, i32(u32(old) + u32(value)))
EMU_ATOMIC(u64, atomicAdd, old + value)
EMU_ATOMIC(float, atomicAdd, old + value)
EMU_ATOMIC(u32, atomicMax, old < value ? value : old)
EMU_ATOMIC(i32, atomicMax, old < value ? value : old)
EMU_ATOMIC(u64, atomicMax, old < value ? value : old)
EMU_ATOMIC(u32, atomicMin, value < old ? value : old)
EMU_ATOMIC(i32, atomicMin, value < old ? value : old)
EMU_ATOMIC(u64, atomicMin, value < old ? value : old)
EMU_ATOMIC(u32, atomicExch, (void(old), value))
EMU_ATOMIC(i32, atomicExch, (void(old), value))
EMU_ATOMIC(u64, atomicExch, (void(old), value))
EMU_ATOMIC(float, atomicExch, (void(old), value))
EMU_ATOMIC_CAS(u32)
EMU_ATOMIC_CAS(i32)
EMU_ATOMIC_CAS(u64)
#undef EMU_ATOMIC
#undef EMU_ATOMIC_CAS

// ---- Thread-sanitizer instrumentation ---------------------------------------------------------------------------

namespace emu {

static inline void instrumented(const void* site, const void* at, size_t bytes, size_t alignment, Access kind) {
    Machine* m = machine;
    if (m == nullptr || m->running == nullptr || !(m->racing || m->counting)) return;
    if (uintptr_t(at) % alignment != 0) fail("%s %zu bytes at an address that is not a multiple of %zu", verb(kind), bytes, alignment);
    if (m->racing) check_access(*m, at, bytes, kind);
    count_access(*m, site, at, bytes, kind);
}

}  // namespace emu

#define EMU_HOOK(function, bytes, alignment, kind) \
    extern "C" __attribute__((visibility("default"))) void function(void* at) {           \
        emu::instrumented(__builtin_return_address(0), at, bytes, alignment, emu::Access::kind); \
    }
#define EMU_HOOKS(bytes, alignment)                                          \
    EMU_HOOK(__tsan_read##bytes, bytes, alignment, Read)                     \
    EMU_HOOK(__tsan_write##bytes, bytes, alignment, Write)                   \
    EMU_HOOK(__tsan_unaligned_read##bytes, bytes, 1, Read)                   \
    EMU_HOOK(__tsan_unaligned_write##bytes, bytes, 1, Write)                 \
    EMU_HOOK(__tsan_volatile_read##bytes, bytes, alignment, Fresh)           \
    EMU_HOOK(__tsan_volatile_write##bytes, bytes, alignment, Write)          \
    EMU_HOOK(__tsan_unaligned_volatile_read##bytes, bytes, 1, Fresh)         \
    EMU_HOOK(__tsan_unaligned_volatile_write##bytes, bytes, 1, Write)
EMU_HOOKS(1, 1)
EMU_HOOKS(2, 2)
EMU_HOOKS(4, 4)
EMU_HOOKS(8, 8)
EMU_HOOKS(16, 8)  // g++ calls it where it knows of 8
#undef EMU_HOOK
#undef EMU_HOOKS

extern "C" {
__attribute__((visibility("default"))) void __tsan_init() {}
__attribute__((visibility("default"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("default"))) void __tsan_func_exit() {}
__attribute__((visibility("default"))) void __tsan_read_range(void* at, unsigned long bytes) {
    emu::instrumented(__builtin_return_address(0), at, bytes, 1, emu::Access::Read);
}
__attribute__((visibility("default"))) void __tsan_write_range(void* at, unsigned long bytes) {
    emu::instrumented(__builtin_return_address(0), at, bytes, 1, emu::Access::Write);
}
}
