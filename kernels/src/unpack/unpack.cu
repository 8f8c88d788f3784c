// Spreads one packed bundle over the places that a step's kernels read: to[i] = bundle[from[i] ..][.. bytes[i]].
//
// The bundle lies in page-locked host memory, which the GPU reads over the bus: one launch in place of a copy for each
// list, and no copy engine to wait for. A graph's kernels have fixed arguments, so their lists need fixed places; only this
// launch, outside the graph, knows where in the ring the host wrote.
//
// One thread takes 16 bytes, and every section is cut into UNPACK_PARTS units of their own: a block that walked through the
// sections would wait for the bus once for each. A bundle of 64 rows is some 20 KB, so one round trip is what it takes.

#include "portable.cuh"
#include "step.cuh"

constexpr u32 UNPACK_THREADS = 256;
constexpr u32 SECTIONS = 16;
constexpr u32 UNPACK_PARTS = 8;

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
    const u32 count = u32(args.count);
    for (u32 unit = blockIdx.x; unit < count * UNPACK_PARTS; unit += gridDim.x) {
        const Section section = args.sections[unit % count];
        const u32 words = (section.bytes + 15) / 16, part = unit / count;
        for (u32 word = part * UNPACK_THREADS + threadIdx.x; word < words; word += UNPACK_PARTS * UNPACK_THREADS)
            store16(section.to + u64(word) * 16, load16_fresh(args.bundle + section.from + u64(word) * 16));
    }
}
