// Shadows: who touched which byte of shared and of global memory, and when. Included by emulator.cpp alone.
//
// Shared memory: two accesses by different threads, at least one of them a write, must lie in different barrier intervals
// (block) or, within a warp, in different intervals between `__syncwarp`s. Shuffles, votes and mma order no memory.
// Global memory: blocks order nothing among themselves, except by atomics and by this pattern: write, `__threadfence`,
// atomic in one block; atomic, then a `*_fresh` (or volatile) load in another. Within a block, what one thread wrote
// another may read or write by the rule of shared memory, and a read-only load must not see what this launch wrote. A read
// by one thread and then a write by another of its block is not looked at.
#pragma once

#include "emulator.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emu {

enum class Access { Read, WarpRead, ReadOnly, Fresh, Write, Atomic };

// ---- Shared memory ----------------------------------------------------------------------------------------------

constexpr u16 NOBODY = 0xffff;

/// When something happened: two moments are ordered if their barrier counts differ, or for one warp the meeting counts.
struct Moment {
    u32 barrier, meeting;
};

inline bool together(u16 other, Moment then, u16 thread, Moment now) {
    if (other == NOBODY || other == thread || then.barrier != now.barrier) return false;
    return other / 32 != thread / 32 || then.meeting == now.meeting;
}

struct SharedCell {
    Moment written, read;  // `barrier` 0: never
    u16 writer;
    u16 reader;        // the last one of its warp
    u16 lane_reader;   // another lane of the same warp, in the same meeting interval
    u16 warp_reader;   // a thread of another warp
    bool atomic;       // `written` was an atomic
    bool many_atomics; // by more than one thread since the last barrier
    bool in_flight;    // a cp.async by `writer` has not landed
};

/// What an access collided with.
struct Collision {
    bool found = false;
    u32 byte = 0;      // offset of the first byte concerned
    u16 other = 0;     // thread
    bool wrote = false, in_flight = false;
};

class SharedShadow {
public:
    /// Old marks may stay: their moments never come again.
    void start_launch(size_t bytes) { cells_.resize(bytes); }

    /// After an error, copies were left in flight.
    void forget() { cells_.clear(); }

    Collision access(u32 offset, u32 bytes, Access kind, u16 thread, Moment now) {
        for (u32 i = offset; i < offset + bytes; ++i) {
            const Collision hit = access_byte(cells_[i], kind, thread, now);
            if (hit.found) return {true, i - offset, hit.other, hit.wrote, hit.in_flight};
        }
        return {};
    }

    void start_copy(u32 offset, u32 bytes) {
        for (u32 i = offset; i < offset + bytes; ++i) cells_[i].in_flight = true;
    }

    void land_copy(u32 offset, u32 bytes, Moment now) {
        for (u32 i = offset; i < offset + bytes; ++i) {
            cells_[i].in_flight = false;
            cells_[i].written = now;
        }
    }

private:
    static Collision access_byte(SharedCell& cell, Access kind, u16 thread, Moment now) {
        if (cell.in_flight) return {true, 0, cell.writer, true, true};
        const bool atomic = kind == Access::Atomic, writes = atomic || kind == Access::Write;
        const bool same_interval = cell.written.barrier == now.barrier;
        if (!(atomic && cell.atomic)) {
            if (together(cell.writer, cell.written, thread, now)) return {true, 0, cell.writer, true, false};
            if (same_interval && cell.atomic && cell.many_atomics) return {true, 0, cell.writer, true, false};
            // ldmatrix hands what one lane's address names to the other lanes.
            if (kind == Access::WarpRead && same_interval && cell.writer == thread && cell.written.meeting == now.meeting)
                return {true, 0, cell.writer, true, false};
        }
        if (writes) {
            if (const u16 reader = reader_together(cell, thread, now); reader != NOBODY) return {true, 0, reader, false, false};
            cell.many_atomics = atomic && cell.atomic && same_interval && (cell.many_atomics || cell.writer != thread);
            cell.atomic = atomic;
            cell.writer = thread;
            cell.written = now;
        } else {
            note_read(cell, thread, now);
        }
        return {};
    }

    static u16 reader_together(const SharedCell& cell, u16 thread, Moment now) {
        if (cell.read.barrier != now.barrier) return NOBODY;
        for (u16 reader : {cell.reader, cell.lane_reader, cell.warp_reader})
            if (together(reader, cell.read, thread, now)) return reader;
        return NOBODY;
    }

    // Three readers are enough: of one warp, those since its last `__syncwarp` count, and two of them tell whether one is
    // not the writer; of the other warps any one does.
    static void note_read(SharedCell& cell, u16 thread, Moment now) {
        if (cell.read.barrier != now.barrier) {
            cell.read = now;
            cell.reader = thread;
            cell.lane_reader = cell.warp_reader = NOBODY;
        } else if (cell.reader / 32 != thread / 32) {
            cell.warp_reader = thread;
        } else if (cell.read.meeting != now.meeting) {
            cell.read.meeting = now.meeting;
            cell.reader = thread;
            cell.lane_reader = NOBODY;
        } else if (cell.reader != thread) {
            cell.lane_reader = thread;
        }
    }

    std::vector<SharedCell> cells_;
};

// ---- Global memory ----------------------------------------------------------------------------------------------

/// The state of one byte of global memory in this launch; the low bits hold a block.
enum GlobalState : u32 {
    UNTOUCHED,
    READ_BY_ONE,
    READ_BY_MANY,
    READ_ONLY,    // by read-only loads of one block
    WRITTEN,
    PUBLISHED,    // written, then fenced by the writer or by a thread behind a barrier
    ATOMIC,       // atomics of one block
    ATOMIC_MANY,  // of several
};
constexpr u32 BLOCK_BITS = 29, BLOCK_MASK = (1u << BLOCK_BITS) - 1;

/// What an access collided with, or `wrong` null.
struct GlobalCollision {
    const char* wrong = nullptr;
    size_t byte = 0;
    u32 block = 0;
    u16 thread = NOBODY;  // unless the block matters
};

class GlobalShadow {
public:
    /// Forgets the last launch.
    void start_launch() {
        if (pages_.size() > MAX_KEPT_PAGES) {
            pages_.clear();
            std::memset(recent_, 0, sizeof recent_);
        }
        ++epoch_;
        writes_.clear();
    }

    void start_block() {
        writes_.clear();
        acquired_ = false;
    }

    GlobalCollision access(const void* at, size_t bytes, Access kind, u32 block, u16 thread, Moment now) {
        const uintptr_t first = uintptr_t(at);
        if (kind == Access::Atomic) acquired_ = true;
        for (size_t i = 0; i < bytes; ++i) {
            Page& page = this->page(first + i);
            u32& cell = page.cells[(first + i) % PAGE];
            const char* wrong = nullptr;
            const u32 next = step(cell, kind, block, wrong);
            if (wrong != nullptr) return {wrong, i, cell & BLOCK_MASK, NOBODY};
            const u32 state = cell >> BLOCK_BITS;
            const bool written_here = (state == WRITTEN || state == PUBLISHED) && (cell & BLOCK_MASK) == block;
            if (written_here || kind == Access::Write) {
                WriteMark& mark = page.mark((first + i) % PAGE);
                if (written_here && together(mark.thread, mark.moment, thread, now))
                    return {"written by another thread of this block with no barrier between", i, block, mark.thread};
                if (kind == Access::Write) mark = {now, thread};
            }
            cell = next;
        }
        if (kind == Access::Write) note_write(first, bytes, thread, now.barrier);
        return {};
    }

    /// `__threadfence`: publishes the thread's writes, and the block's from before the last barrier (fences are cumulative).
    void fence(u16 thread, u32 barrier) {
        size_t kept = 0;
        for (const UnpublishedWrite& write : writes_) {
            if (write.thread != thread && write.barrier == barrier) {
                writes_[kept++] = write;
                continue;
            }
            for (uintptr_t at = write.first; at < write.first + write.bytes; ++at)
                if (u32& cell = page(at).cells[at % PAGE]; cell >> BLOCK_BITS == WRITTEN) cell = PUBLISHED << BLOCK_BITS | (cell & BLOCK_MASK);
        }
        writes_.resize(kept);
    }

private:
    static constexpr size_t PAGE = 4096, RECENT = 64, MAX_KEPT_PAGES = 4096;
    struct WriteMark {
        Moment moment;
        u16 thread;
    };
    struct Page {
        uintptr_t number;
        u64 epoch;
        u32 cells[PAGE];
        std::unique_ptr<WriteMark[]> marks;  // of the bytes that a block wrote; most pages are only read

        WriteMark& mark(size_t i) {
            if (!marks) marks.reset(new WriteMark[PAGE]());
            return marks[i];
        }
    };
    struct UnpublishedWrite {
        uintptr_t first;
        size_t bytes;
        u16 thread;
        u32 barrier;
    };

    Page& page(uintptr_t at) {
        const uintptr_t number = at / PAGE;
        Page*& recent = recent_[number % RECENT];
        if (recent == nullptr || recent->number != number) {
            std::unique_ptr<Page>& page = pages_[number];
            if (!page) page.reset(new Page{number, 0, {}, nullptr});
            recent = page.get();
        }
        if (recent->epoch != epoch_) {
            std::memset(recent->cells, 0, sizeof recent->cells);
            recent->epoch = epoch_;
        }
        return *recent;
    }

    void note_write(uintptr_t first, size_t bytes, u16 thread, u32 barrier) {
        if (!writes_.empty()) {
            UnpublishedWrite& last = writes_.back();
            if (last.first + last.bytes == first && last.thread == thread && last.barrier == barrier) {
                last.bytes += bytes;
                return;
            }
        }
        writes_.push_back({first, bytes, thread, barrier});
    }

    u32 step(u32 cell, Access kind, u32 block, const char*& wrong) const {
        const bool mine = (cell & BLOCK_MASK) == block;
        const auto state = [block](GlobalState to) { return u32(to) << BLOCK_BITS | block; };
        const bool reads = kind == Access::Read || kind == Access::WarpRead || kind == Access::Fresh || kind == Access::ReadOnly;
        switch (cell >> BLOCK_BITS) {
            case UNTOUCHED:
                return state(kind == Access::ReadOnly ? READ_ONLY : reads ? READ_BY_ONE : kind == Access::Write ? WRITTEN : ATOMIC);
            case READ_BY_ONE:
                if (reads) return mine ? (kind == Access::ReadOnly ? state(READ_ONLY) : cell) : state(READ_BY_MANY);
                if (!mine) wrong = "read by another block of this launch";
                return state(kind == Access::Write ? WRITTEN : ATOMIC);
            case READ_BY_MANY:
                if (!reads) wrong = "read by another block of this launch";
                return cell;
            case READ_ONLY:
                if (reads) return mine ? cell : state(READ_BY_MANY);
                wrong = mine ? "read by this block with a read-only load (use load*_fresh)" : "read by another block of this launch";
                return cell;
            case WRITTEN:
                if (kind == Access::ReadOnly) wrong = "written in this launch, and this load is read-only (use load*_fresh)";
                else if (!mine) wrong = kind == Access::Fresh ? "written by another block that did not __threadfence after it"
                                                             : "written by another block of this launch";
                return kind == Access::Atomic ? state(ATOMIC) : cell;
            case PUBLISHED:
                if (kind == Access::ReadOnly) wrong = "written in this launch, and this load is read-only (use load*_fresh)";
                else if (mine) return reads ? cell : state(kind == Access::Write ? WRITTEN : ATOMIC);
                else if (kind != Access::Fresh) wrong = "written by another block of this launch (read it with load*_fresh or volatile)";
                else if (!acquired_) wrong = "written by another block, and this block did no atomic that says it may read";
                return cell;
            case ATOMIC:
                if (kind == Access::Atomic) return mine ? cell : state(ATOMIC_MANY);
                if (kind == Access::Fresh || (mine && kind != Access::ReadOnly)) return kind == Access::Write ? state(WRITTEN) : cell;
                wrong = "used with atomics in this launch, which a plain access does not join (use an atomic)";
                return cell;
            default:
                if (kind == Access::Atomic || kind == Access::Fresh) return cell;
                wrong = "used with atomics by several blocks, which a plain access does not join (use an atomic)";
                return cell;
        }
    }

    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
    Page* recent_[RECENT] = {};
    u64 epoch_ = 0;
    std::vector<UnpublishedWrite> writes_;
    bool acquired_ = false;
};

}  // namespace emu
