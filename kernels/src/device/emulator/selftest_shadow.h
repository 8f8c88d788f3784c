// Self-test of the shadows alone: accesses in a given order, and which of them is the first that races. A kernel's races
// often show in several ways; here each rule stands alone.
#pragma once

#include "races.h"
#include "selftest_check.h"

#include <string>
#include <vector>

namespace {

using emu::Access;

struct SharedStep {
    u16 thread;
    Access kind;
    u32 barrier, meeting;
};

struct SharedCase {
    const char* what;
    std::vector<SharedStep> steps;
    bool races;  // at its last step, and not before
};

const SharedCase SHARED_CASES[] = {
    {"write, read by another warp", {{0, Access::Write, 1, 1}, {32, Access::Read, 1, 2}}, true},
    {"a barrier between", {{0, Access::Write, 1, 1}, {32, Access::Read, 2, 1}}, false},
    {"write, read by its thread", {{0, Access::Write, 1, 1}, {0, Access::Read, 1, 1}}, false},
    {"write, read by another lane", {{0, Access::Write, 1, 1}, {1, Access::Read, 1, 1}}, true},
    {"a __syncwarp between", {{0, Access::Write, 1, 1}, {1, Access::Read, 1, 2}}, false},
    {"write, write by another warp", {{0, Access::Write, 1, 1}, {32, Access::Write, 1, 1}}, true},
    {"read, write by another warp", {{0, Access::Read, 1, 1}, {32, Access::Write, 1, 1}}, true},
    {"read, write by another lane", {{0, Access::Read, 1, 1}, {1, Access::Write, 1, 1}}, true},
    {"read, then a __syncwarp", {{0, Access::Read, 1, 1}, {1, Access::Write, 1, 2}}, false},
    {"reads, write by the last reader", {{1, Access::Read, 1, 1}, {0, Access::Read, 1, 1}, {0, Access::Write, 1, 1}}, true},
    {"reads, write by the first reader", {{0, Access::Read, 1, 1}, {1, Access::Read, 1, 1}, {0, Access::Write, 1, 1}}, true},
    {"reads of two warps, write by one", {{0, Access::Read, 1, 1}, {32, Access::Read, 1, 1}, {0, Access::Write, 1, 1}}, true},
    {"reads of two warps, write by the other", {{0, Access::Read, 1, 1}, {32, Access::Read, 1, 1}, {32, Access::Write, 1, 1}}, true},
    {"read before and after __syncwarp", {{0, Access::Read, 1, 1}, {1, Access::Read, 1, 2}, {1, Access::Write, 1, 2}}, false},
    {"read again after __syncwarp", {{0, Access::Read, 1, 1}, {1, Access::Read, 1, 2}, {2, Access::Write, 1, 2}}, true},
    {"reads of an older interval", {{0, Access::Read, 1, 1}, {32, Access::Read, 1, 1}, {0, Access::Read, 2, 1}, {0, Access::Write, 2, 1}}, false},
    {"atomics", {{0, Access::Atomic, 1, 1}, {32, Access::Atomic, 1, 1}, {0, Access::Atomic, 1, 1}}, false},
    {"atomics, read by the last", {{0, Access::Atomic, 1, 1}, {32, Access::Atomic, 1, 1}, {32, Access::Read, 1, 1}}, true},
    {"own atomic, read", {{0, Access::Atomic, 1, 1}, {0, Access::Read, 1, 1}}, false},
    {"atomics of an older interval", {{0, Access::Atomic, 1, 1}, {32, Access::Atomic, 2, 1}, {32, Access::Read, 2, 1}}, false},
    {"write, atomic by another warp", {{0, Access::Write, 1, 1}, {32, Access::Atomic, 1, 1}}, true},
    {"ldmatrix of an own row", {{0, Access::Write, 1, 1}, {0, Access::WarpRead, 1, 1}}, true},
    {"ldmatrix after __syncwarp", {{0, Access::Write, 1, 1}, {0, Access::WarpRead, 1, 2}}, false},
};

void check_shared_shadow() {
    for (const SharedCase& test : SHARED_CASES) {
        emu::SharedShadow shadow;
        shadow.start_launch(4);
        for (size_t i = 0; i < test.steps.size(); ++i) {
            const SharedStep& step = test.steps[i];
            const bool raced = shadow.access(1, 2, step.kind, step.thread, {step.barrier, step.meeting}).found;
            check(raced == (test.races && i + 1 == test.steps.size()), std::string("shared shadow: ") + test.what);
        }
        check(!shadow.access(3, 1, Access::Write, 99, {1, 1}).found, "bytes do not share a mark");
    }
    emu::SharedShadow shadow;
    shadow.start_launch(16);
    shadow.access(0, 16, Access::Write, 0, {1, 1});
    shadow.start_copy(0, 16);
    check(shadow.access(4, 4, Access::Read, 0, {1, 1}).in_flight, "a copy in flight, read by its thread");
    check(shadow.access(4, 4, Access::Read, 32, {2, 1}).in_flight, "a copy in flight over a barrier");
    shadow.land_copy(0, 16, {2, 1});
    check(!shadow.access(4, 4, Access::Read, 0, {2, 1}).found, "a landed copy, read by its thread");
    check(shadow.access(4, 4, Access::Read, 32, {2, 1}).found, "a landed copy, read by another warp");
    check(!shadow.access(4, 4, Access::Read, 32, {3, 1}).found, "a landed copy after a barrier");
}

struct GlobalStep {
    enum What { READ, NC, FRESH, WRITE, ATOMIC, FENCE } what;
    u32 block;
    u16 thread;
    u32 barrier = 1;
    u32 word = 0;
};

struct GlobalCase {
    const char* what;
    std::vector<GlobalStep> steps;
    bool races;
};

using S = GlobalStep;
const GlobalCase GLOBAL_CASES[] = {
    {"write, write", {{S::WRITE, 0, 0}, {S::WRITE, 1, 0}}, true},
    {"write, read", {{S::WRITE, 0, 0}, {S::READ, 1, 0}}, true},
    {"read, write", {{S::READ, 0, 0}, {S::WRITE, 1, 0}}, true},
    {"reads, write by one of them", {{S::READ, 0, 0}, {S::READ, 1, 0}, {S::WRITE, 1, 0}}, true},
    {"reads", {{S::READ, 0, 0}, {S::NC, 1, 0}, {S::FRESH, 2, 0}, {S::READ, 2, 0}}, false},
    {"read and write of one block", {{S::READ, 0, 0}, {S::WRITE, 0, 0}, {S::READ, 0, 0}, {S::FRESH, 0, 0}}, false},
    {"words apart", {{S::WRITE, 0, 0}, {S::WRITE, 1, 0, 1, 1}}, false},
    {"read-only load of what the block wrote", {{S::WRITE, 0, 0}, {S::NC, 0, 0}}, true},
    {"the same after a fence", {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::NC, 0, 0}}, true},
    {"write of what the block loaded read-only", {{S::NC, 0, 0}, {S::WRITE, 0, 0}}, true},
    {"write of what it loaded both ways", {{S::READ, 0, 0}, {S::NC, 0, 0}, {S::WRITE, 0, 0}}, true},
    {"threads of a block, no barrier", {{S::WRITE, 0, 0}, {S::READ, 0, 32}}, true},
    {"threads of a block write, no barrier", {{S::WRITE, 0, 0}, {S::WRITE, 0, 32}}, true},
    {"threads of a block, a barrier", {{S::WRITE, 0, 0}, {S::READ, 0, 32, 2}, {S::WRITE, 0, 32, 2}}, false},
    {"write, fence, atomic; atomic, fresh load",
     {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::ATOMIC, 0, 0, 1, 1}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, false},
    {"the same with a plain load",
     {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::ATOMIC, 0, 0, 1, 1}, {S::ATOMIC, 1, 0, 1, 1}, {S::READ, 1, 0}}, true},
    {"no fence", {{S::WRITE, 0, 0}, {S::ATOMIC, 0, 0, 1, 1}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, true},
    {"no atomic by the reader", {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::ATOMIC, 0, 0, 1, 1}, {S::FRESH, 1, 0}}, true},
    {"a fence before the write", {{S::FENCE, 0, 0}, {S::WRITE, 0, 0}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, true},
    {"another thread's fence", {{S::WRITE, 0, 0}, {S::FENCE, 0, 1}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, true},
    {"another thread's fence after a barrier", {{S::WRITE, 0, 0}, {S::FENCE, 0, 1, 2}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, false},
    {"another block's fence", {{S::WRITE, 0, 0}, {S::FENCE, 1, 0, 2}, {S::ATOMIC, 1, 0, 2, 1}, {S::FRESH, 1, 0, 2}}, true},
    {"written again after the fence",
     {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::WRITE, 0, 0}, {S::ATOMIC, 1, 0, 1, 1}, {S::FRESH, 1, 0}}, true},
    {"write of what another published", {{S::WRITE, 0, 0}, {S::FENCE, 0, 0}, {S::ATOMIC, 1, 0, 1, 1}, {S::WRITE, 1, 0}}, true},
    {"atomics", {{S::ATOMIC, 0, 0}, {S::ATOMIC, 1, 0}, {S::FRESH, 2, 0}, {S::ATOMIC, 2, 0}}, false},
    {"atomics of one block, its read", {{S::ATOMIC, 0, 0}, {S::READ, 0, 0}}, false},
    {"atomic, plain read by another", {{S::ATOMIC, 0, 0}, {S::READ, 1, 0}}, true},
    {"atomics, plain read", {{S::ATOMIC, 0, 0}, {S::ATOMIC, 1, 0}, {S::READ, 1, 0}}, true},
    {"atomics, plain write", {{S::ATOMIC, 0, 0}, {S::ATOMIC, 1, 0}, {S::WRITE, 1, 0}}, true},
    {"plain read, atomic by another", {{S::READ, 0, 0}, {S::ATOMIC, 1, 0}}, true},
    {"plain write, atomic by another", {{S::WRITE, 0, 0}, {S::ATOMIC, 1, 0}}, true},
};

void check_global_shadow() {
    const Access KINDS[] = {Access::Read, Access::ReadOnly, Access::Fresh, Access::Write, Access::Atomic};
    emu::GlobalShadow shadow;
    for (const GlobalCase& test : GLOBAL_CASES) {
        shadow.start_launch();
        u32 running = ~0u;
        for (size_t i = 0; i < test.steps.size(); ++i) {
            const GlobalStep& step = test.steps[i];
            if (step.block != running) shadow.start_block();
            running = step.block;
            if (step.what == S::FENCE) {
                shadow.fence(step.thread, step.barrier);
                continue;
            }
            const char* at = reinterpret_cast<const char*>(uintptr_t(0x7000ffc)) + 4 * step.word;  // words on two pages
            const bool raced = shadow.access(at, 4, KINDS[step.what], step.block, step.thread, {step.barrier, 1}).wrong != nullptr;
            check(raced == (test.races && i + 1 == test.steps.size()), std::string("global shadow: ") + test.what);
        }
    }
}

void check_shadows() {
    check_shared_shadow();
    check_global_shadow();
}

}  // namespace
