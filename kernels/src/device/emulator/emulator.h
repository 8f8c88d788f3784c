// Host emulator: runs one CUDA C++ kernel on the CPU, thread by thread, with an ordinary C++ compiler.
//
// Every CUDA thread is a fiber with a stack of its own. One OS thread runs them in turn, block after block.
// A fiber gives way only where CUDA threads meet (`__syncthreads`, warp collectives), so everything between
// two meetings is atomic, and the order in which fibers run is ours to choose: see `Schedule`.
//
// Errors (deadlock, mixed collectives, misaligned loads, ...) end the launch as an `emu::Error`.
// Several OS threads may each run a launch of their own: all state hangs on one thread-local pointer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

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

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

constexpr int WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;
constexpr size_t STATIC_SHARED_LIMIT = 48 << 10;  // what every CUDA device grants without opt-in
constexpr size_t SHARED_LIMIT = 227 << 10;        // sm_90 and sm_100; sm_80: 163 KiB, sm_86 and sm_89: 99 KiB
#ifdef EMU_ASAN
constexpr size_t STACK_BYTES = 256 << 10;  // red zones make frames several times larger
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The order in which a block's threads run between two meetings. A correct kernel gives the same result under all.
enum class Schedule {
    RoundRobin,    // each warp goes to its next meeting point, then the next warp
    Eager,         // the lowest warp runs as far ahead as it can
    EagerReverse,  // the highest warp, with lanes and blocks in falling order too
    Random,        // warps, lanes and blocks in shuffled order, some warps eager: seeded by `Launch::seed`
};
constexpr Schedule ALL_SCHEDULES[] = {Schedule::RoundRobin, Schedule::Eager, Schedule::EagerReverse, Schedule::Random};

struct Launch {
    dim3 grid, block;
    size_t dynamic_shared_bytes = 0;
    Schedule schedule = Schedule::RoundRobin;
    uint64_t seed = 1;
};

// ---- Context switch -------------------------------------------------------------------------------------------

#ifdef EMU_USE_UCONTEXT
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#else
// The System V ABI keeps six general registers and the stack pointer over a call: push them, swap stacks, pop them.
extern "C" void loramux_emu_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
    .text
    .weak loramux_emu_switch
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
struct Context {
    void* stack_pointer = nullptr;
};
inline void switch_context(Context& from, Context& to) { loramux_emu_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = nullptr;                           // keeps the stack aligned as after a call; `entry` never returns
    *--top = reinterpret_cast<void*>(entry);    // popped by `ret`
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six saved registers
    context.stack_pointer = top;
}
#endif

// ---- State of one launch --------------------------------------------------------------------------------------

struct Fiber {
    Context context;
    char* stack = nullptr;
    void* asan_fake_stack = nullptr;
    int thread = 0;  // linear index in the block
    dim3 index;
    bool finished = false;
    const uint64_t* gate = nullptr;  // the meeting's generation counter; the fiber may go on once it has moved
    uint64_t gate_seen = 0;
    const char* waiting_at = nullptr;

    bool runnable() const { return !finished && (gate == nullptr || *gate != gate_seen); }
};

struct Warp {
    uint64_t generation = 0;
    int arrived = 0;
    const char* operation = nullptr;
    void* payload[WARP] = {};
};

struct SharedBlock {
    std::unique_ptr<unsigned char[]> bytes;  // on the heap, so that the address sanitizer sees an overrun
    size_t size = 0;
    uint64_t poisoned_for_block = 0;
};

struct Machine {
    Launch launch;
    const std::function<void()>* kernel = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    uint64_t barrier_generation = 0;
    int barrier_arrived = 0;
    dim3 block_index;
    uint64_t block_serial = 0;
    Fiber* running = nullptr;
    Context scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    std::map<const void*, SharedBlock> shared;
    std::string error;
    std::mt19937_64 random;
};

inline thread_local Machine* machine = nullptr;

// ---- Fibers ---------------------------------------------------------------------------------------------------

inline void leave_to_scheduler() {
    Machine& m = *machine;
    Fiber& fiber = *m.running;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(fiber.finished ? nullptr : &fiber.asan_fake_stack, m.scheduler_stack,
                                   m.scheduler_stack_bytes);
#endif
    switch_context(fiber.context, m.scheduler);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

inline void resume(Fiber& fiber) {
    Machine& m = *machine;
    m.running = &fiber;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, STACK_BYTES);
#endif
    switch_context(m.scheduler, fiber.context);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
    m.running = nullptr;
    if (!m.error.empty()) throw Error(m.error);
}

inline std::string describe(const dim3& at) {
    return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

/// Ends the launch with an error; `format` is printf's. Called by emulated instructions, on the fiber that made the
/// mistake. The fiber is abandoned, so nothing that owns memory may be alive on its stack.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    Machine& m = *machine;
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    m.error = "block " + describe(m.block_index) + " thread " + std::to_string(m.running->thread) + ": " + text;
    for (;;) leave_to_scheduler();
}

inline void fiber_main() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_stack, &machine->scheduler_stack_bytes);
#endif
    (*machine->kernel)();
    machine->running->finished = true;
    for (;;) leave_to_scheduler();
}

inline void wait_at(const char* place, const uint64_t& generation) {
    Fiber& fiber = *machine->running;
    fiber.gate = &generation;
    fiber.gate_seen = generation;
    fiber.waiting_at = place;
    leave_to_scheduler();
    fiber.gate = nullptr;
    fiber.waiting_at = nullptr;
}

// ---- Meetings -------------------------------------------------------------------------------------------------

/// Stricter than the hardware: a thread that left the kernel early does not count as arrived.
inline void block_barrier() {
    Machine& m = *machine;
    if (++m.barrier_arrived == int(m.fibers.size())) {
        m.barrier_arrived = 0;
        ++m.barrier_generation;
        return;
    }
    wait_at("__syncthreads", m.barrier_generation);
}

inline int lane() { return machine->running->thread % WARP; }

/// All 32 lanes bring a `payload`; the last to arrive runs `finish(payloads)` for all of them.
template <class Payload, class Finish>
void warp_meet(const char* operation, unsigned mask, Payload& payload, Finish finish) {
    if (mask != FULL_MASK) fail("%s: only full-warp collectives are emulated", operation);
    Warp& warp = machine->warps[machine->running->thread / WARP];
    if (warp.arrived > 0 && std::strcmp(warp.operation, operation) != 0)
        fail("%s while another lane of the warp is at %s", operation, warp.operation);
    warp.operation = operation;
    warp.payload[lane()] = &payload;
    if (++warp.arrived < WARP) return wait_at(operation, warp.generation);
    Payload* all[WARP];
    for (int i = 0; i < WARP; ++i) all[i] = static_cast<Payload*>(warp.payload[i]);
    finish(all);
    warp.arrived = 0;
    ++warp.generation;
}

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
    struct Payload {
        T value, result;
        int source;
    } mine{value, value, source};
    warp_meet(operation, mask, mine, [](Payload** all) {
        for (int i = 0; i < WARP; ++i) all[i]->result = all[all[i]->source]->value;
    });
    return mine.result;
}

inline unsigned ballot(const char* operation, unsigned mask, bool vote) {
    struct Payload {
        bool vote;
        unsigned result;
    } mine{vote, 0};
    warp_meet(operation, mask, mine, [](Payload** all) {
        unsigned bits = 0;
        for (int i = 0; i < WARP; ++i) bits |= unsigned(all[i]->vote) << i;
        for (int i = 0; i < WARP; ++i) all[i]->result = bits;
    });
    return mine.result;
}

inline float bf16_bits_to_float(uint32_t bits) {
    uint32_t word = bits << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

/// mma.sync.m16n8k16 (row, col, f32 += bf16 * bf16): gathers the fragments of all lanes and multiplies.
/// With group = lane / 4 and pair = lane % 4, a lane holds
///   a[h]: row group + 8 (h % 2), columns 2 pair + 8 (h / 2) and the next;   d[e]: row group + 8 (e / 2), column 2 pair + e % 2
///   b[h]: rows 2 pair + 8 h and the next, column group.
/// Sums in rising k; the hardware's order and inner precision are its own, so results agree only within rounding.
inline void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    struct Payload {
        float* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    warp_meet("mma.m16n8k16", FULL_MASK, mine, [](Payload** all) {
        float left[16][16], right[16][8];
        for (int i = 0; i < WARP; ++i) {
            const int group = i / 4, pair = i % 4;
            for (int h = 0; h < 4; ++h) {
                const int row = group + 8 * (h % 2), column = 2 * pair + 8 * (h / 2);
                left[row][column] = bf16_bits_to_float(all[i]->a[h] & 0xffff);
                left[row][column + 1] = bf16_bits_to_float(all[i]->a[h] >> 16);
            }
            for (int h = 0; h < 2; ++h) {
                const int row = 2 * pair + 8 * h;
                right[row][group] = bf16_bits_to_float(all[i]->b[h] & 0xffff);
                right[row + 1][group] = bf16_bits_to_float(all[i]->b[h] >> 16);
            }
        }
        for (int i = 0; i < WARP; ++i)
            for (int e = 0; e < 4; ++e) {
                const int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
                float sum = all[i]->d[e];
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                all[i]->d[e] = sum;
            }
    });
}

// ---- Shared memory --------------------------------------------------------------------------------------------

/// One block's shared array, known by the address of a tag at its declaration. Filled with 0xff, which reads as NaN
/// in every float type, when a block's first thread gets here: what the kernel did not write is seen at once.
inline unsigned char* shared_bytes(const void* tag, size_t size) {
    Machine& m = *machine;
    SharedBlock& block = m.shared[tag];
    if (!block.bytes) {
        block.bytes.reset(new unsigned char[size]);
        block.size = size;
        size_t fixed = 0;
        for (const auto& [key, other] : m.shared) fixed += key == nullptr ? 0 : other.size;
        if (fixed > STATIC_SHARED_LIMIT) fail("more than 48 KiB of static shared memory: use DYNAMIC_SHARED");
    }
    if (block.poisoned_for_block != m.block_serial) {
        std::memset(block.bytes.get(), 0xff, size);
        block.poisoned_for_block = m.block_serial;
    }
    return block.bytes.get();
}

inline unsigned char* dynamic_shared_bytes() { return shared_bytes(nullptr, machine->launch.dynamic_shared_bytes); }

template <class T>
const T* require_aligned(const T* pointer, size_t bytes, const char* operation) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        fail("%s: address is not a multiple of %zu", operation, bytes);
    return pointer;
}

// ---- Scheduler ------------------------------------------------------------------------------------------------

/// Lets every runnable lane of a warp go on to its next meeting. False when none could.
inline bool step_warp(Machine& m, int warp, const std::vector<int>& lanes) {
    bool moved = false;
    for (int l : lanes) {
        Fiber& fiber = m.fibers[warp * WARP + l];
        if (!fiber.runnable()) continue;
        resume(fiber);
        moved = true;
    }
    return moved;
}

[[noreturn]] inline void report_deadlock(const Machine& m) {
    std::map<std::string, int> counts;
    for (const Fiber& fiber : m.fibers)
        ++counts[fiber.finished ? "have left the kernel" : std::string("wait at ") + fiber.waiting_at];
    std::string text = "deadlock in block " + describe(m.block_index) + ":";
    for (const auto& [what, count] : counts) text += " " + std::to_string(count) + " threads " + what + ";";
    throw Error(text);
}

inline void run_block(Machine& m) {
    ++m.block_serial;
    m.barrier_arrived = 0;
    for (Warp& warp : m.warps) warp.arrived = 0;
    for (Fiber& fiber : m.fibers) {
        fiber.finished = false;
        fiber.gate = nullptr;
        fiber.asan_fake_stack = nullptr;
        prepare_context(fiber.context, fiber.stack, STACK_BYTES, fiber_main);
    }
    const Schedule schedule = m.launch.schedule;
    std::vector<int> warps(m.warps.size()), lanes(WARP);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    if (schedule == Schedule::EagerReverse) {
        std::reverse(warps.begin(), warps.end());
        std::reverse(lanes.begin(), lanes.end());
    }
    const auto finished = [&m] {
        for (const Fiber& fiber : m.fibers)
            if (!fiber.finished) return false;
        return true;
    };
    while (!finished()) {
        if (schedule == Schedule::Random) {
            std::shuffle(warps.begin(), warps.end(), m.random);
            std::shuffle(lanes.begin(), lanes.end(), m.random);
        }
        bool moved = false;
        for (int warp : warps) {
            const bool eager = schedule == Schedule::Random ? m.random() % 2 == 0 : schedule != Schedule::RoundRobin;
            bool stepped = step_warp(m, warp, lanes);
            moved |= stepped;
            while (eager && stepped) stepped = step_warp(m, warp, lanes);
        }
        if (!moved) report_deadlock(m);
    }
}

/// One mapping for all stacks, with an inaccessible page below each: a stack overflow faults instead of spreading.
struct Stacks {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), pitch = STACK_BYTES + page, bytes;
    char* base;
    explicit Stacks(int count) : bytes(pitch * count) {
        void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping == MAP_FAILED) throw Error("no memory for the stacks");
        base = static_cast<char*>(mapping);
        for (int i = 0; i < count; ++i) mprotect(base + i * pitch, page, PROT_NONE);
    }
    ~Stacks() {
#ifdef EMU_ASAN
        ASAN_UNPOISON_MEMORY_REGION(base, bytes);  // after an error, frames were abandoned with their red zones
#endif
        munmap(base, bytes);
    }
    Stacks(const Stacks&) = delete;
    char* at(int i) const { return base + i * pitch + page; }
};

/// Runs `kernel` once per thread of the grid. Blocks run one after the other, so a kernel that waits for another
/// block never ends here (nor is it sure to on a GPU).
inline void launch(const Launch& launch, const std::function<void()>& kernel) {
    const dim3 &grid = launch.grid, &block = launch.block;
    const int threads = int(block.x * block.y * block.z);
    if (threads == 0 || threads > 1024 || threads % WARP != 0) throw Error("a block needs 32, 64, ... 1024 threads");
    if (launch.dynamic_shared_bytes > SHARED_LIMIT) throw Error("more shared memory than any supported GPU has");
    if (machine != nullptr) throw Error("launch inside a launch");

    const Stacks stacks(threads);
    Machine m;
    m.launch = launch;
    m.kernel = &kernel;
    m.random.seed(launch.seed);
    m.fibers.resize(threads);
    m.warps.resize(threads / WARP);
    for (int i = 0; i < threads; ++i) {
        m.fibers[i].thread = i;
        m.fibers[i].stack = stacks.at(i);
        m.fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    }
    std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), size_t(0));
    if (launch.schedule == Schedule::EagerReverse) std::reverse(order.begin(), order.end());
    if (launch.schedule == Schedule::Random) std::shuffle(order.begin(), order.end(), m.random);

    struct Attach {
        explicit Attach(Machine* m) { machine = m; }
        ~Attach() { machine = nullptr; }
    } attach(&m);
    for (size_t i : order) {
        m.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (size_t(grid.x) * grid.y));
        run_block(m);
    }
}

}  // namespace emu

// ---- The CUDA names that kernels use --------------------------------------------------------------------------

#define threadIdx (emu::machine->running->index)
#define blockIdx (emu::machine->block_index)
#define blockDim (emu::machine->launch.block)
#define gridDim (emu::machine->launch.grid)
#define __launch_bounds__(...)

inline void __syncthreads() { emu::block_barrier(); }
inline void __threadfence() {}
inline void __syncwarp(unsigned mask = emu::FULL_MASK) { emu::ballot("__syncwarp", mask, false); }
inline unsigned __ballot_sync(unsigned mask, bool vote) { return emu::ballot("__ballot_sync", mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return emu::ballot("__any_sync", mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return emu::ballot("__all_sync", mask, vote) == emu::FULL_MASK; }

// A source outside the lane's group of `width` lanes gives the lane its own value back, as on the device.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = emu::WARP) {
    return emu::shuffle("__shfl_sync", mask, value, (emu::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = emu::WARP) {
    const int lane = emu::lane(), source = lane ^ bits;
    return emu::shuffle("__shfl_xor_sync", mask, value, source < (lane | (width - 1)) + 1 ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = emu::WARP) {
    const int lane = emu::lane(), source = lane + int(delta);
    return emu::shuffle("__shfl_down_sync", mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = emu::WARP) {
    const int lane = emu::lane(), source = lane - int(delta);
    return emu::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

// Only one fiber runs at a time, so a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) { T old = *at; *at = T(old + value); return old; }
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) { T old = *at; *at = old < value ? value : old; return old; }
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) { T old = *at; *at = value < old ? value : old; return old; }
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) { T old = *at; *at = value; return old; }
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}

struct EmuLaunch { unsigned grid_x, grid_y, block_x, dynamic_shared_bytes, schedule, flags; unsigned long long seed; };
template <class F> int loramux_emu_run(const EmuLaunch* l, char* error, unsigned long long n, F body) {
    try {
        emu::Launch launch;
        launch.grid = dim3(l->grid_x, l->grid_y); launch.block = dim3(l->block_x);
        launch.dynamic_shared_bytes = l->dynamic_shared_bytes; launch.schedule = emu::Schedule(l->schedule); launch.seed = l->seed;
        emu::launch(launch, body);
        return 0;
    } catch (const std::exception& e) { std::snprintf(error, n, "%s", e.what()); return 1; }
}
