// Fibers: switching between stacks, and the pool the stacks come from. Included by emulator.cpp alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(EMU_USE_UCONTEXT)
#define EMU_USE_UCONTEXT 1
#endif
#ifdef EMU_USE_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t MAX_THREADS = 1024;
#ifdef EMU_ASAN
constexpr size_t STACK_BYTES = 256 << 10;  // red zones make frames several times larger
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

/// Why a launch ended early. It lives on the scheduler's stack only, never on a fiber's.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

#ifdef EMU_USE_UCONTEXT
using Stackful = ucontext_t;
inline void switch_stack(Stackful& from, Stackful& to) { swapcontext(&from, &to); }
inline void prepare_stack(Stackful& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack;
    fiber.uc_stack.ss_size = STACK_BYTES;
    fiber.uc_link = nullptr;
    makecontext(&fiber, entry, 0);
}
#else
// The System V ABI keeps six general registers and the stack pointer over a call: push them, swap stacks, pop them.
extern "C" void loramux_emu_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
    .text
    .hidden loramux_emu_switch
    .type loramux_emu_switch, @function
loramux_emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size loramux_emu_switch, .-loramux_emu_switch
)");
struct Stackful {
    void* stack_pointer = nullptr;
};
inline void switch_stack(Stackful& from, Stackful& to) { loramux_emu_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare_stack(Stackful& fiber, char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack) + STACK_BYTES);
    *--top = nullptr;                              // keeps the stack aligned as after a call; `entry` never returns
    *--top = reinterpret_cast<void*>(entry);       // popped by `ret`
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six saved registers
    fiber.stack_pointer = top;
}
#endif

/// The stacks of one OS thread's fibers, kept from launch to launch. An inaccessible page below each makes an overflow
/// fault instead of spreading. Address space is reserved once, pages come into being when they are touched.
class StackPool {
public:
    StackPool() = default;
    StackPool(const StackPool&) = delete;
    ~StackPool() {
        if (base_ == nullptr) return;
        forget_frames();
        munmap(base_, pitch_ * MAX_THREADS);
    }

    /// Makes `count` stacks usable.
    void grow(size_t count) {
        if (base_ == nullptr) {
            void* mapping = mmap(nullptr, pitch_ * MAX_THREADS, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (mapping == MAP_FAILED) throw Failure("no memory for the stacks");
            base_ = static_cast<char*>(mapping);
        }
        for (; guarded_ < count; ++guarded_) mprotect(base_ + guarded_ * pitch_, page_, PROT_NONE);
    }

    char* at(size_t i) const { return base_ + i * pitch_ + page_; }

    /// Whether any stack holds the address.
    bool holds(const void* address) const {
        return uintptr_t(address) - uintptr_t(base_) < (base_ == nullptr ? 0 : pitch_ * MAX_THREADS);
    }

    /// After an error, frames were abandoned with their red zones.
    void forget_frames() {
#ifdef EMU_ASAN
        for (size_t i = 0; i < guarded_; ++i) ASAN_UNPOISON_MEMORY_REGION(at(i), STACK_BYTES);
#endif
    }

private:
    size_t page_ = size_t(sysconf(_SC_PAGESIZE)), pitch_ = STACK_BYTES + page_, guarded_ = 0;
    char* base_ = nullptr;
};

}  // namespace emu
