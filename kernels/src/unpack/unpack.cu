// Spreads one packed bundle over the places that a step's kernels read: to[i] = bundle[from[i] ..][.. bytes[i]].
//
// The bundle lies in page-locked host memory, which the GPU reads over the bus: one launch in place of a copy for each
// list, and no copy engine to wait for. A graph's kernels have fixed arguments, so their lists need fixed places; only this
// launch, outside the graph, knows where in the ring the host wrote.
//
// One thread takes 16 bytes. A bundle of 64 rows is some 20 KB, so the kernel is bound by one round trip of the bus.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 UNPACK_THREADS = 256;
constexpr u32 SECTIONS = 16;

struct Section {
    u8* to;
    u32 from;   // bytes from the bundle's start, a multiple of 16
    u32 bytes;  // rounded up to 16 by the reader: the bundle and the places have room for that
};

struct UnpackArgs {
    const u8* bundle;
    u64 count;
    Section sections[SECTIONS];
};

KERNEL_ENTRY(unpack, UnpackArgs, UNPACK_THREADS, 4) {
    for (u32 i = 0; i < u32(args.count); ++i) {
        const Section section = args.sections[i];
        const u32 words = (section.bytes + 15) / 16;
        for (u32 word = blockIdx.x * UNPACK_THREADS + threadIdx.x; word < words; word += gridDim.x * UNPACK_THREADS)
            store16(section.to + u64(word) * 16, load16_fresh(args.bundle + section.from + u64(word) * 16));
    }
}
