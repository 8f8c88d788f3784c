// The emulator's runtime: scheduler, meetings, memory and atomics. Compiled once, without thread-sanitizer
// instrumentation; kernels see emulator.h.
#include "machine.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace emu {

EmuIndex thread_index() noexcept { return {machine->running->thread, 0, 0}; }
EmuIndex block_index() noexcept { return machine->block; }
EmuIndex block_extent() noexcept { return {machine->launch.block_x, 1, 1}; }
EmuIndex grid_extent() noexcept { return {machine->launch.grid_x, machine->launch.grid_y, 1}; }

// ---- Meetings -------------------------------------------------------------------------------------------------

static void flush_traffic(Machine& m) {
    if (!m.counting) return;
    for (size_t warp = 0; warp < m.warps.size(); ++warp) m.traffic.flush(warp);
}

/// Stricter than the hardware: a thread that left the kernel early does not count as arrived, and all threads must be at
/// one call.
int block_barrier(Barrier kind, bool vote, int line) {
    static const char* const NAMES[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
    Machine& m = *machine;
    const char* name = NAMES[int(kind)];
    if (m.barrier_arrived > 0 && (m.barrier_name != name || m.barrier_line != line))
        fail("%s in line %d while another thread is at %s in line %d", name, line, m.barrier_name, m.barrier_line);
    m.barrier_name = name;
    m.barrier_line = line;
    m.votes += vote;
    if (++m.barrier_arrived < m.threads) {
        wait_at(name, m.barrier_generation);
        return m.vote_result;  // the next barrier cannot complete before this thread reaches it
    }
    m.vote_result = kind == Barrier::Or ? m.votes > 0 : kind == Barrier::And ? m.votes == m.threads : int(m.votes);
    m.votes = m.barrier_arrived = 0;
    ++m.barrier_generation;
    flush_traffic(m);
    return m.vote_result;
}

/// All 32 lanes bring a `payload`; the last to arrive runs `finish(payloads)` for all of them.
template <class Payload, class Finish>
void warp_meet(const char* operation, int line, u32 mask, Payload& payload, Finish finish) {
    if (mask != FULL_MASK) fail("%s: only full-warp collectives are emulated", operation);
    Warp& warp = machine->warp();
    if (warp.arrived > 0 && (warp.line != line || std::strcmp(warp.operation, operation) != 0))
        fail("%s in line %d while another lane of the warp is at %s in line %d", operation, line, warp.operation, warp.line);
    warp.operation = operation;
    warp.line = line;
    warp.payload[machine->running->thread % WARP] = &payload;
    if (++warp.arrived < WARP) return wait_at(operation, warp.generation);
    Payload* all[WARP];
    for (u32 i = 0; i < WARP; ++i) all[i] = static_cast<Payload*>(warp.payload[i]);
    finish(all);
    warp.arrived = 0;
    ++warp.generation;
    if (machine->counting) machine->traffic.flush(machine->running->thread / WARP);
}

u32 ballot(const char* operation, u32 mask, bool vote, int line) {
    struct Payload {
        bool vote;
        u32 result;
    } mine{vote, 0};
    warp_meet(operation, line, mask, mine, [](Payload** all) {
        u32 bits = 0;
        for (u32 i = 0; i < WARP; ++i) bits |= u32(all[i]->vote) << i;
        for (u32 i = 0; i < WARP; ++i) all[i]->result = bits;
    });
    return mine.result;
}

/// A source outside the lane's group of `width` lanes gives the lane its own value back, as on the device.
u64 shuffle(Shuffle kind, u32 mask, u64 value, u32 operand, int width, int line) {
    static const char* const NAMES[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
    if (width <= 0 || width > int(WARP) || (width & (width - 1)) != 0) fail("%s: width %d is no power of two up to 32", NAMES[int(kind)], width);
    const u32 lane = machine->running->thread % WARP, first = lane & ~u32(width - 1), last = lane | u32(width - 1);
    u32 source = lane;
    switch (kind) {
        case Shuffle::Index: source = first + (operand & u32(width - 1)); break;
        case Shuffle::Xor: source = (lane ^ operand) <= last ? lane ^ operand : lane; break;
        case Shuffle::Down: source = operand <= last - lane ? lane + operand : lane; break;
        case Shuffle::Up: source = operand <= lane - first ? lane - operand : lane; break;
    }
    struct Payload {
        u64 value, result;
        u32 source;
    } mine{value, value, source};
    warp_meet(NAMES[int(kind)], line, mask, mine, [](Payload** all) {
        for (u32 i = 0; i < WARP; ++i) all[i]->result = all[all[i]->source]->value;
    });
    return mine.result;
}

/// mma.sync.m16n8k16 (row, col, f32 += 16-bit * 16-bit): gathers the fragments of all lanes and multiplies.
/// With group = lane / 4 and pair = lane % 4, a lane holds
///   a[h]: row group + 8 (h % 2), columns 2 pair + 8 (h / 2) and the next;   d[e]: row group + 8 (e / 2), column 2 pair + e % 2
///   b[h]: rows 2 pair + 8 h and the next, column group.
/// Sums in rising k; the hardware's order and inner precision are its own, so results agree only within rounding.
Bytes16 mma_16x8x16(Bytes16 d, Bytes16 a, u64 b, bool is_f16, int line) {
    struct Payload {
        float d[4];
        u16 a[8], b[4];
        bool is_f16;
    } mine;
    std::memcpy(mine.d, &d, sizeof d);
    std::memcpy(mine.a, &a, sizeof a);
    std::memcpy(mine.b, &b, sizeof b);
    mine.is_f16 = is_f16;
    warp_meet("mma.m16n8k16", line, FULL_MASK, mine, [](Payload** all) {
        float left[16][16], right[16][8], sums[16][8];
        const bool is_f16 = all[0]->is_f16;
        const auto value = [is_f16](u16 bits) {
            return is_f16 ? f16_to_float(bits) : __builtin_bit_cast(float, u32(bits) << 16);
        };
        for (u32 i = 0; i < WARP; ++i) {
            const u32 group = i / 4, pair = i % 4;
            for (u32 e = 0; e < 8; ++e) left[group + 8 * (e / 2 % 2)][2 * pair + 8 * (e / 4) + e % 2] = value(all[i]->a[e]);
            for (u32 e = 0; e < 4; ++e) right[2 * pair + 8 * (e / 2) + e % 2][group] = value(all[i]->b[e]);
            for (u32 e = 0; e < 4; ++e) sums[group + 8 * (e / 2)][2 * pair + e % 2] = all[i]->d[e];
        }
        for (u32 row = 0; row < 16; ++row)
            for (u32 k = 0; k < 16; ++k)
                for (u32 column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
        for (u32 i = 0; i < WARP; ++i)
            for (u32 e = 0; e < 4; ++e) all[i]->d[e] = sums[i / 4 + 8 * (e / 2)][2 * (i % 4) + e % 2];
    });
    std::memcpy(&d, mine.d, sizeof d);
    return d;
}

Bytes16 ldmatrix(const void* shared_row, int tiles, bool transposed, int line) {
    static const char* const NAMES[] = {"ldmatrix.x2", "ldmatrix.x2.trans", "ldmatrix.x4", "ldmatrix.x4.trans"};
    const char* name = NAMES[(tiles == 4 ? 2 : 0) + transposed];
    Machine& m = *machine;
    if (m.running->thread % WARP < u32(tiles) * 8) {
        if (!m.in_arena(shared_row)) fail("%s: the address is not in shared memory", name);
        require_aligned(shared_row, 16, name);
        check_shared(m, shared_row, 16, Access::WarpRead);
        count_access(m, __builtin_return_address(0), shared_row, 16, Access::WarpRead);
    }
    struct Payload {
        const u8* row;
        u32 words[4];
    } mine{static_cast<const u8*>(shared_row), {}};
    const auto finish = [tiles, transposed](Payload** all) {
        for (u32 lane = 0; lane < WARP; ++lane)
            for (u32 tile = 0; tile < u32(tiles); ++tile) {
                u16 pair[2];
                for (u32 e = 0; e < 2; ++e) {
                    const u32 across = lane / 4, along = lane % 4 * 2 + e;
                    const u32 row = transposed ? along : across, column = transposed ? across : along;
                    std::memcpy(&pair[e], all[tile * 8 + row]->row + 2 * column, 2);
                }
                std::memcpy(&all[lane]->words[tile], pair, 4);
            }
    };
    warp_meet(name, line, FULL_MASK, mine, finish);
    return __builtin_bit_cast(Bytes16, mine.words);
}

// ---- Memory -----------------------------------------------------------------------------------------------------

static void* place_array(Machine& m, const void* tag, const char* name, size_t bytes, size_t alignment) {
    if (m.arrays.size() == MAX_ARRAYS) fail("more than %zu shared arrays", MAX_ARRAYS);
    size_t all = bytes, fixed = tag == nullptr ? 0 : bytes;
    for (const SharedArray& array : m.arrays) all += array.bytes, fixed += array.tag == nullptr ? 0 : array.bytes;
    if (fixed > STATIC_SHARED_LIMIT) fail("more than 48 KiB of static shared memory: use DYNAMIC_SHARED");
    if (all > SHARED_LIMIT) fail("more shared memory than any supported GPU has");
    const size_t end = m.arrays.empty() ? 0 : m.arrays.back().offset + m.arrays.back().bytes;
    const size_t offset = (end + 2 * ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN + alignment % ARENA_ALIGN;
#ifdef EMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(m.arena + offset / 8 * 8, bytes + offset % 8);
#endif
    m.arrays.push_back({tag, name, u32(offset), u32(bytes), 0});
    return m.arena + offset;
}

void* shared_array(const void* tag, const char* name, u64 bytes, u64 alignment) {
    Machine& m = *machine;
    auto array = std::find_if(m.arrays.begin(), m.arrays.end(), [tag](const SharedArray& a) { return a.tag == tag; });
    if (array == m.arrays.end()) {
        place_array(m, tag, name, bytes, alignment);
        array = m.arrays.end() - 1;
    }
    u8* at = m.arena + array->offset;
    if (array->ready_for_block != m.block_serial) {
        std::memset(at, 0xff, bytes);
        array->ready_for_block = m.block_serial;
    }
    return at;
}

void* dynamic_shared() {
    const u32 bytes = machine->launch.dynamic_shared_bytes;
    if (bytes == 0) fail("DYNAMIC_SHARED in a launch with dynamic_shared_bytes = 0");
    return shared_array(nullptr, "dynamic shared memory", bytes, 16);
}

template <class T>
static T load(const void* from, Load kind, const char* name, const void* site) {
    Machine& m = *machine;
    require_aligned(from, sizeof(T), name);
    if (m.in_arena(from)) fail("%s: loads global memory, and the address is in shared memory", name);
    check_access(m, from, sizeof(T), kind == Load::Fresh ? Access::Fresh : Access::ReadOnly);
    count_access(m, site, from, sizeof(T), Access::Read);
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

Bytes16 load16(const void* from, Load kind) {
    return load<Bytes16>(from, kind, "16-byte load", __builtin_return_address(0));
}
u64 load8(const void* from, Load kind) { return load<u64>(from, kind, "8-byte load", __builtin_return_address(0)); }

template <class T>
static void store(void* to, T value, const char* name, const void* site) {
    Machine& m = *machine;
    require_aligned(to, sizeof value, name);
    check_access(m, to, sizeof value, Access::Write);
    count_access(m, site, to, sizeof value, Access::Write);
    std::memcpy(to, &value, sizeof value);
}

void store16(void* to, Bytes16 value) { store(to, value, "16-byte store", __builtin_return_address(0)); }
void store8(void* to, u64 value) { store(to, value, "8-byte store", __builtin_return_address(0)); }

/// Until it lands, the destination reads as NaN.
void cp_async16(void* shared, const void* global, bool valid) {
    Machine& m = *machine;
    if (!m.in_arena(shared)) fail("cp_async16: the destination is not in shared memory");
    require_aligned(shared, 16, "cp_async16 to shared memory");
    check_shared(m, shared, 16, Access::Write);
    if (valid) {
        require_aligned(global, 16, "cp_async16 from global memory");
        if (m.in_arena(global)) fail("cp_async16: the source is in shared memory");
        check_access(m, global, 16, Access::Fresh);
        count_access(m, __builtin_return_address(0), global, 16, Access::Read);
    }
    count_access(m, __builtin_return_address(0), shared, 16, Access::Write);
    std::memset(shared, 0xff, 16);
    if (m.racing) m.shared_shadow.start_copy(u32(static_cast<u8*>(shared) - m.arena), 16);
    m.running->copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), m.running->groups, valid});
}

void cp_async_commit() { ++machine->running->groups; }

void cp_async_wait(int groups_left) {
    Machine& m = *machine;
    Fiber& fiber = *m.running;
    size_t landed = 0;
    for (; landed < fiber.copies.size(); ++landed) {
        const PendingCopy& copy = fiber.copies[landed];
        if (copy.group + u32(groups_left) >= fiber.groups) break;
        if (copy.valid) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
        if (m.racing) m.shared_shadow.land_copy(u32(copy.to - m.arena), 16, m.now());
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + std::ptrdiff_t(landed));
}

// ---- Scheduler --------------------------------------------------------------------------------------------------

static void fiber_main() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_stack, &machine->scheduler_stack_bytes);
#endif
    char thrown[128] = "";  // out of memory in the runtime, say; the launch must not end on a fiber's stack
    try {
        machine->kernel->thread(machine->args);
    } catch (const std::exception& exception) {
        std::snprintf(thrown, sizeof thrown, "%s", exception.what());
    }
    if (thrown[0] != 0) fail("exception: %s", thrown);
    Fiber& fiber = *machine->running;
    if (!fiber.copies.empty()) fail("the kernel ends with %zu cp.async copies in flight", fiber.copies.size());
    fiber.finished = true;
    ++machine->finished;
    for (;;) leave_to_scheduler();
}

/// Lets every runnable lane of a warp go on to its next meeting. False when none could.
static bool step_warp(Machine& m, u32 warp, const std::vector<u32>& lanes) {
    bool moved = false;
    for (u32 lane : lanes) {
        Fiber& fiber = m.fibers[warp * WARP + lane];
        if (!fiber.runnable()) continue;
        resume(fiber);
        moved = true;
    }
    return moved;
}

[[noreturn]] static void report_deadlock(const Machine& m) {
    std::map<std::string, u32> counts;
    for (u32 i = 0; i < m.threads; ++i)
        ++counts[m.fibers[i].finished ? "have left the kernel" : std::string("wait at ") + m.fibers[i].waiting_at];
    std::string text = std::string("kernel ") + m.kernel->name + ", block (" + std::to_string(m.block.x) + "," +
                       std::to_string(m.block.y) + "): deadlock:";
    for (const auto& [what, count] : counts) text += " " + std::to_string(count) + " threads " + what + ";";
    throw Failure(text);
}

enum Schedule : u32 { ROUND_ROBIN, EAGER, EAGER_REVERSE, SHUFFLED, SCHEDULES };

static void start_block(Machine& m) {
    ++m.block_serial;
    ++m.barrier_generation;
    m.barrier_arrived = m.votes = m.finished = 0;
    m.global_shadow.start_block();
    for (Warp& warp : m.warps) warp.arrived = 0;
    for (u32 i = 0; i < m.threads; ++i) {
        Fiber& fiber = m.fibers[i];
        fiber.finished = false;
        fiber.gate = nullptr;
        fiber.asan_fake_stack = nullptr;
        fiber.groups = 0;
        fiber.copies.clear();
        prepare_stack(fiber.stackful, fiber.stack, fiber_main);
    }
}

static void run_block(Machine& m, std::vector<u32>& warps, std::vector<u32>& lanes) {
    start_block(m);
    const u32 schedule = m.launch.schedule;
    while (m.finished < m.threads) {
        if (schedule == SHUFFLED) {
            std::shuffle(warps.begin(), warps.end(), m.random);
            std::shuffle(lanes.begin(), lanes.end(), m.random);
        }
        bool moved = false;
        for (u32 warp : warps) {
            const bool eager = schedule == SHUFFLED ? m.random() % 2 == 0 : schedule != ROUND_ROBIN;
            bool stepped = step_warp(m, warp, lanes);
            moved |= stepped;
            while (eager && stepped) stepped = step_warp(m, warp, lanes);
        }
        if (!moved) report_deadlock(m);
    }
    flush_traffic(m);
}

static void check_launch(const Kernel& kernel, const EmuLaunch& launch) {
    const std::string name = std::string("kernel ") + kernel.name + ": ";
    if (launch.block_x == 0 || launch.block_x > MAX_THREADS || launch.block_x % WARP != 0)
        throw Failure(name + "a block needs 32, 64, ... 1024 threads");
    if (launch.block_x > kernel.max_threads) throw Failure(name + "more threads in a block than KERNEL_ENTRY states");
    if (launch.grid_x == 0 || launch.grid_y == 0) throw Failure(name + "the grid is empty");
    if (u64(launch.grid_x) * launch.grid_y > BLOCK_MASK || launch.grid_y > 65535) throw Failure(name + "the grid is too large");
    if (launch.dynamic_shared_bytes > SHARED_LIMIT) throw Failure(name + "more shared memory than any supported GPU has");
    if (launch.schedule >= SCHEDULES) throw Failure(name + "there is no such schedule");
    if (launch.flags & EMU_RACES && !kernel.instrumented)
        throw Failure(name + "checking for races needs a build with -fsanitize=thread (see emulator.h)");
    if (machine != nullptr) throw Failure(name + "launched inside a launch");
}

static void start_launch(Machine& m, const Kernel& kernel, const EmuLaunch& launch, const void* args) {
    m.kernel = &kernel;
    m.launch = launch;
    m.args = args;
    m.racing = launch.flags & EMU_RACES;
    m.counting = launch.flags & EMU_COUNT;
    m.threads = launch.block_x;
    m.warps.assign(m.threads / WARP, Warp{});
    m.arrays.clear();
    m.error.clear();
    m.random.seed(launch.seed);
    m.stacks.grow(m.threads);
    if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
    for (u32 i = 0; i < m.threads; ++i) m.fibers[i].thread = i, m.fibers[i].stack = m.stacks.at(i);
    if (m.racing) {
        m.shared_shadow.start_launch(ARENA_BYTES);
        m.global_shadow.start_launch();
    }
    if (m.counting) m.traffic.start_launch(m.warps.size());
#ifdef EMU_ASAN
    ASAN_POISON_MEMORY_REGION(m.arena, ARENA_BYTES);
#endif
}

static void run_grid(Machine& m) {
    const u32 blocks = m.launch.grid_x * m.launch.grid_y;
    std::vector<u32> order(blocks), warps(m.warps.size()), lanes(WARP);
    for (std::vector<u32>* list : {&order, &warps, &lanes}) {
        std::iota(list->begin(), list->end(), 0u);
        if (m.launch.schedule == EAGER_REVERSE) std::reverse(list->begin(), list->end());
    }
    if (m.launch.schedule == SHUFFLED) std::shuffle(order.begin(), order.end(), m.random);
    for (u32 i : order) {
        m.block = {i % m.launch.grid_x, i / m.launch.grid_x, 0};
        run_block(m, warps, lanes);
    }
}

static thread_local std::unique_ptr<Machine> mine;  // kept from launch to launch

int launch(const Kernel& kernel, const EmuLaunch& launch, const void* args, char* error, u64 error_bytes) noexcept {
    try {
        check_launch(kernel, launch);
        if (!mine) mine.reset(new Machine);
        start_launch(*mine, kernel, launch, args);
        struct Attach {
            explicit Attach(Machine* m) { machine = m; }
            ~Attach() { machine = nullptr; }
        } attach(mine.get());
        run_grid(*mine);
        return 0;
    } catch (const std::exception& failure) {
        if (mine) {
            mine->stacks.forget_frames();
            mine->shared_shadow.forget();
        }
        if (error_bytes > 0) std::snprintf(error, error_bytes, "%s", failure.what());
        return 1;
    }
}

}  // namespace emu

void emu_counters(EmuCounters* counters) { *counters = emu::mine ? emu::mine->traffic.counters : EmuCounters{}; }

#include "names.h"
