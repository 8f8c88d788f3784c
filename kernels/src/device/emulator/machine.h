// The state of one OS thread's emulated GPU, and how its fibers give way and fail. Included by emulator.cpp alone.
#pragma once

#include "emulator.h"
#include "fiber.h"
#include "races.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace emu {

constexpr u32 WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;
constexpr size_t STATIC_SHARED_LIMIT = 48 << 10;  // what every CUDA device grants without opt-in
constexpr size_t SHARED_LIMIT = 227 << 10;        // sm_90 and sm_100; sm_80: 163 KiB, sm_86 and sm_89: 99 KiB
constexpr size_t ARENA_ALIGN = 128;
constexpr size_t MAX_ARRAYS = 64;                 // in shared memory, per kernel
constexpr size_t ARENA_BYTES = SHARED_LIMIT + MAX_ARRAYS * 4 * ARENA_ALIGN;  // a gap around each array

// ---- Traffic ----------------------------------------------------------------------------------------------------

/// Collects the accesses of each warp between two meetings and adds them up as the hardware would serve them.
class Traffic {
public:
    EmuCounters counters = {};

    void start_launch(size_t warps) {
        counters = {};
        pending_.assign(warps, {});
    }

    void note(u32 thread, const void* site, const void* at, size_t bytes, bool shared, bool store) {
        const u32 kind = (shared ? 2u : 0u) + (store ? 1u : 0u);
        pending_[thread / 32].push_back({uintptr_t(site), uintptr_t(at), kind, u32(bytes), thread % 32, 0});
    }

    /// The warp's lanes met: what they did since they last met is complete.
    void flush(size_t warp) {
        std::vector<Lane>& lanes = pending_[warp];
        const auto order = [](const Lane& a, const Lane& b) {
            return std::tie(a.site, a.kind, a.lane) < std::tie(b.site, b.kind, b.lane);
        };
        std::stable_sort(lanes.begin(), lanes.end(), order);
        for (size_t i = 1; i < lanes.size(); ++i)
            if (!order(lanes[i - 1], lanes[i])) lanes[i].turn = lanes[i - 1].turn + 1;
        const auto key = [](const Lane& lane) { return std::tie(lane.site, lane.kind, lane.turn); };
        std::stable_sort(lanes.begin(), lanes.end(), [key](const Lane& a, const Lane& b) { return key(a) < key(b); });
        for (size_t first = 0, i = 0; i < lanes.size(); ++i)
            if (i + 1 == lanes.size() || key(lanes[i + 1]) != key(lanes[i])) {
                add(&lanes[first], &lanes[i] + 1);
                first = i + 1;
            }
        lanes.clear();
    }

private:
    struct Lane {
        uintptr_t site, at;
        u32 kind, bytes, lane, turn;
    };

    void add(const Lane* first, const Lane* end) {
        if (first->kind >= 2) return add_shared(first, end);
        std::set<uintptr_t> sectors;
        u64 bytes = 0;
        for (const Lane* lane = first; lane != end; ++lane) {
            bytes += lane->bytes;
            for (uintptr_t sector = lane->at / 32; sector <= (lane->at + lane->bytes - 1) / 32; ++sector) sectors.insert(sector);
        }
        const bool store = first->kind == 1;
        ++(store ? counters.global_stores : counters.global_loads);
        (store ? counters.global_store_bytes : counters.global_load_bytes) += bytes;
        (store ? counters.global_store_sectors : counters.global_load_sectors) += sectors.size();
    }

    // 8 bytes a lane go by half warps, 16 by quarters.
    void add_shared(const Lane* first, const Lane* end) {
        ++counters.shared_accesses;
        const u32 together = first->bytes <= 4 ? 32 : first->bytes <= 8 ? 16 : 8;
        for (u32 part = 0; part < 32; part += together) {
            std::set<uintptr_t> words;
            for (const Lane* lane = first; lane != end; ++lane)
                if (lane->lane / together * together == part)
                    for (uintptr_t word = lane->at / 4; word <= (lane->at + lane->bytes - 1) / 4; ++word) words.insert(word);
            if (words.empty()) continue;
            u32 passes[32] = {};
            for (uintptr_t word : words) ++passes[word % 32];
            counters.shared_wavefronts += *std::max_element(passes, passes + 32);
            ++counters.shared_wavefronts_least;
        }
    }

    std::vector<std::vector<Lane>> pending_;
};

// ---- State ------------------------------------------------------------------------------------------------------

struct PendingCopy {
    u8* to;
    const u8* from;
    u32 group;
    bool valid;
};

struct Fiber {
    Stackful stackful;
    char* stack = nullptr;
    void* asan_fake_stack = nullptr;
    u32 thread = 0;
    bool finished = false;
    const u32* gate = nullptr;  // the meeting's generation counter; the fiber may go on once it has moved
    u32 gate_seen = 0;
    const char* waiting_at = nullptr;
    u32 groups = 0;                   // committed so far
    std::vector<PendingCopy> copies;  // not landed, oldest first

    bool runnable() const { return !finished && (gate == nullptr || *gate != gate_seen); }
};

struct Warp {
    u32 generation = 0;  // collectives so far
    u32 meetings = 1;    // `__syncwarp`s so far: what orders memory
    u32 arrived = 0;
    const char* operation = nullptr;
    int line = 0;
    void* payload[WARP] = {};
};

struct SharedArray {
    const void* tag;
    const char* name;
    u32 offset, bytes;
    u32 ready_for_block;  // `block_serial` of the block it was NaN-filled for
};

struct Machine {
    // Kept from launch to launch.
    StackPool stacks;
    std::unique_ptr<u8[]> arena_bytes{new u8[ARENA_BYTES + ARENA_ALIGN]};
    u8* arena = reinterpret_cast<u8*>((uintptr_t(arena_bytes.get()) + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN);
    std::vector<Fiber> fibers;
    SharedShadow shared_shadow;
    GlobalShadow global_shadow;
    Traffic traffic;
    u32 barrier_generation = 1, block_serial = 0;  // never restart, so old marks are never current

    // Of the running launch.
    const Kernel* kernel = nullptr;
    EmuLaunch launch = {};
    const void* args = nullptr;
    bool racing = false, counting = false;
    u32 threads = 0;
    std::vector<Warp> warps;
    std::vector<SharedArray> arrays;
    std::string error;
    std::mt19937_64 random;

    // Of the running block.
    EmuIndex block = {};
    u32 finished = 0, barrier_arrived = 0;
    const char* barrier_name = nullptr;
    int barrier_line = 0;
    u32 votes = 0;
    int vote_result = 0;
    Fiber* running = nullptr;
    Stackful scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;

    Warp& warp() { return warps[running->thread / WARP]; }
    Moment now() { return {barrier_generation, warp().meetings}; }
    u32 linear_block() const { return block.x + block.y * launch.grid_x; }
    bool in_arena(const void* at) const { return uintptr_t(at) - uintptr_t(arena) < ARENA_BYTES; }
};

// The machine of the launch that this OS thread is in. Initial-exec: a plain load, also from a shared library.
__attribute__((tls_model("initial-exec"))) inline thread_local Machine* machine = nullptr;

// ---- Giving way and failing -----------------------------------------------------------------------------------

inline void leave_to_scheduler() {
    Machine& m = *machine;
    Fiber& fiber = *m.running;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(fiber.finished ? nullptr : &fiber.asan_fake_stack, m.scheduler_stack,
                                   m.scheduler_stack_bytes);
#endif
    switch_stack(fiber.stackful, m.scheduler);
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
    switch_stack(m.scheduler, fiber.stackful);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
    m.running = nullptr;
    if (!m.error.empty()) throw Failure(m.error);
}

/// Ends the launch with an error; `format` is printf's. Called on the fiber that made the mistake. The fiber is abandoned,
/// so nothing that owns memory may be alive on its stack.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    Machine& m = *machine;
    char text[512];
    int length = std::snprintf(text, sizeof text, "kernel %s, block (%u,%u), thread %u: ", m.kernel->name, m.block.x, m.block.y,
                               m.running->thread);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text + length, sizeof text - size_t(length), format, arguments);
    va_end(arguments);
    m.error = text;
    for (;;) leave_to_scheduler();
}

inline void wait_at(const char* place, const u32& generation) {
    Fiber& fiber = *machine->running;
    fiber.gate = &generation;
    fiber.gate_seen = generation;
    fiber.waiting_at = place;
    leave_to_scheduler();
    fiber.gate = nullptr;
    fiber.waiting_at = nullptr;
}

// ---- Memory accesses --------------------------------------------------------------------------------------------

inline const SharedArray* array_at(const Machine& m, u32 offset, u32 bytes) {
    for (const SharedArray& array : m.arrays)
        if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return &array;
    return nullptr;
}

inline const char* verb(Access kind) {
    return kind == Access::Write ? "writes" : kind == Access::Atomic ? "does an atomic on" : "reads";
}

inline void check_shared(Machine& m, const void* at, u32 bytes, Access kind) {
    const u32 offset = u32(static_cast<const u8*>(at) - m.arena);
    const SharedArray* array = array_at(m, offset, bytes);
    if (array == nullptr) fail("%s %u bytes of shared memory that belong to no array, or past one's end", verb(kind), bytes);
    if (!m.racing) return;
    const Collision hit = m.shared_shadow.access(offset, bytes, kind, u16(m.running->thread), m.now());
    if (!hit.found) return;
    const u32 byte = offset - array->offset + hit.byte;
    if (hit.in_flight)
        fail("race in shared memory: %s %s, byte %u, where a cp.async of thread %u is in flight", verb(kind), array->name, byte,
             hit.other);
    fail("race in shared memory: %s %s, byte %u, which thread %u %s, with no %s between", verb(kind), array->name, byte, hit.other,
         hit.wrote ? "wrote" : "read", hit.other / WARP == m.running->thread / WARP ? "__syncwarp" : "__syncthreads");
}

/// The kernel argument that points nearest below an address: what a global address is called in an error.
inline std::string name_of_address(const Machine& m, uintptr_t at) {
    uintptr_t best = 0;
    u32 best_offset = 0;
    for (u32 offset = 0; offset + sizeof(uintptr_t) <= m.kernel->args_bytes; offset += sizeof(uintptr_t)) {
        uintptr_t value;
        std::memcpy(&value, static_cast<const u8*>(m.args) + offset, sizeof value);
        if (value <= at && value > best) best = value, best_offset = offset;
    }
    if (best == 0) return "global memory";
    return "byte " + std::to_string(at - best) + " after the pointer at offset " + std::to_string(best_offset) + " of the arguments";
}

inline void check_global(Machine& m, const void* at, size_t bytes, Access kind) {
    if (!m.racing) return;
    const GlobalCollision hit = m.global_shadow.access(at, bytes, kind, m.linear_block(), u16(m.running->thread), m.now());
    if (hit.wrong == nullptr) return;
    char name[160], other[48];  // `fail` does not return: no string may own memory here
    std::snprintf(name, sizeof name, "%s", name_of_address(m, uintptr_t(at) + hit.byte).c_str());
    if (hit.thread != NOBODY) std::snprintf(other, sizeof other, "thread %u", hit.thread);
    else std::snprintf(other, sizeof other, "block (%u,%u)", hit.block % m.launch.grid_x, hit.block / m.launch.grid_x);
    fail("race in global memory: %s %s, %s; the other is %s", verb(kind), name, hit.wrong, other);
}

/// An access by kernel code, whichever memory it turns out to be.
inline void check_access(Machine& m, const void* at, size_t bytes, Access kind) {
    if (m.in_arena(at)) return check_shared(m, at, u32(bytes), kind);
    if (m.stacks.holds(at)) {
        if (uintptr_t(at) - uintptr_t(m.running->stack) >= STACK_BYTES) fail("%s another thread's local memory", verb(kind));
        return;
    }
    if (uintptr_t(at) - uintptr_t(m.args) < m.kernel->args_bytes) return;
    check_global(m, at, bytes, kind);
}

/// Counts an access by kernel code at `site`, a place in the code.
inline void count_access(Machine& m, const void* site, const void* at, size_t bytes, Access kind) {
    if (!m.counting || m.stacks.holds(at) || uintptr_t(at) - uintptr_t(m.args) < m.kernel->args_bytes) return;
    m.traffic.note(m.running->thread, site, at, bytes, m.in_arena(at), kind == Access::Write || kind == Access::Atomic);
}

inline void require_aligned(const void* at, size_t bytes, const char* operation) {
    if (uintptr_t(at) % bytes != 0) fail("%s: address is not a multiple of %zu", operation, bytes);
}

}  // namespace emu
