// What DoRA and trained biases change, in place on the output of the base product and before its deltas are expanded:
//
//   y[row][first_col + o] = elem(y0 + sum over the row's items of item.scale * (gain[o] * y0 + shift[o]))
//
// y0 is y as it came in. Gains and shifts are f32, [2][d_out] behind desc.vectors, which only the first rank block of an
// adapter has; rows and slices without them keep their bits. Sums are f32, y is rounded once. A thread takes 8 outputs of
// one slice for the rows of a tile. Bytes per unit: 64 of vectors for each item that has them, 32 of y for each row.

#include "lora.cuh"

constexpr u32 GAIN_THREADS = 256;
constexpr u32 OUTPUTS = 8;  // of a thread

struct LoraGainShiftArgs {
    SiteWork site;
    elem* y;                          // [rows][y_stride]
    u32 y_stride;                     // elements, a multiple of 8
    u32 first_col[SITE_SLICES_MAX];   // multiples of 8
    u32 d_out[SITE_SLICES_MAX];       // multiples of 16
    u32 reserved;
};

/// Adds scale * (gain * y0 + shift) of 4 outputs.
DEVICE void add_vectors(float* sum, const float* y0, const Float4& gain, const Float4& shift, float scale) {
    sum[0] += scale * (gain.x * y0[0] + shift.x);
    sum[1] += scale * (gain.y * y0[1] + shift.y);
    sum[2] += scale * (gain.z * y0[2] + shift.z);
    sum[3] += scale * (gain.w * y0[3] + shift.w);
}

/// One row's 8 outputs.
DEVICE void change_row(const SiteWork& site, const RowTile& tile, u32 slice, u32 column, u32 d_out, elem* y) {
    const Words4 words = load16_fresh(y);
    float y0[OUTPUTS], sum[OUTPUTS];
    unpack2(words.x, y0[0], y0[1]);
    unpack2(words.y, y0[2], y0[3]);
    unpack2(words.z, y0[4], y0[5]);
    unpack2(words.w, y0[6], y0[7]);
    UNROLL
    for (u32 i = 0; i < OUTPUTS; ++i) sum[i] = y0[i];
    for (u32 i = 0; i < tile.item_count; ++i) {
        const LoraItem item = site.items[tile.first_item + i];
        const BlockDesc desc = lora_desc(site, item, slice);
        if (desc.vectors == 0) continue;
        const float* gain = reinterpret_cast<const float*>(site.arena + u64(desc.vectors - 1) * ARENA_UNIT_BYTES) + column;
        const float* shift = gain + d_out;
        add_vectors(sum, y0, loadf4(gain), loadf4(shift), item.scale);
        add_vectors(sum + 4, y0 + 4, loadf4(gain + 4), loadf4(shift + 4), item.scale);
    }
    store16(y, {pack2(sum[0], sum[1]), pack2(sum[2], sum[3]), pack2(sum[4], sum[5]), pack2(sum[6], sum[7])});
}

KERNEL_ENTRY(lora_gain_shift, LoraGainShiftArgs, GAIN_THREADS, 4) {
    u32 per_tile = 0;
    UNROLL
    for (u32 slice = 0; slice < SITE_SLICES_MAX; ++slice) per_tile += args.d_out[slice] / OUTPUTS;
    const u64 units = u64(args.site.counts->row_tiles) * per_tile;
    const u64 stride = u64(gridDim.x) * GAIN_THREADS;
    for (u64 unit = u64(blockIdx.x) * GAIN_THREADS + threadIdx.x; unit < units; unit += stride) {
        const RowTile tile = args.site.tiles[unit / per_tile];
        const u32 part = u32(unit % per_tile);
        u32 slice = 0, before = 0, start = 0, first_col = args.first_col[0], d_out = args.d_out[0];
        UNROLL
        for (u32 next = 1; next < SITE_SLICES_MAX; ++next) {
            before += args.d_out[next - 1] / OUTPUTS;
            if (part >= before) slice = next, start = before, first_col = args.first_col[next], d_out = args.d_out[next];
        }
        bool touched = false;
        for (u32 i = 0; i < tile.item_count; ++i) {
            touched |= lora_desc(args.site, args.site.items[tile.first_item + i], slice).vectors != 0;
        }
        if (!touched) continue;
        const u32 column = (part - start) * OUTPUTS;
        elem* y = args.y + u64(tile.first_row) * args.y_stride + first_col + column;
        for (u32 row = 0; row < tile.row_count; ++row, y += args.y_stride) {
            change_row(args.site, tile, slice, column, d_out, y);
        }
    }
}
