// y = activation(conv(x, W) * x_scale * weight_scale + bias) * gate + residual over 8-bit codes of x and W, channels last
//
// Idea: linear_int8.h, where a row of x is a window of pixels, put together when a block of rows is laid out: once for all
// panels of outputs. A window's lines lie whole where pixels lie side by side; beyond the picture there are zeros.
// Takes: codes and scales as the op does, any strides but the weight's; y, bias, gate and residual of any of the three floats.
// Floor: kernel * kernel * C multiply-adds a result.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/conv2d_w8a8.cpp
#include "linear_int8.h"

namespace dk {
namespace {

struct Window {
    const int8_t* x;
    int64_t step[4], height, width, channels;  // of x [B, H, W, C]
    int64_t lines, columns;                    // of y [B, lines, columns, N]
    int64_t kernel, stride, padding, dilation;

    static int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

    DK_INLINE int64_t apart(const Call&) const { return 1; }
    const int8_t* row(const Call&, int64_t r, int8_t* const room) const {
        if (channels == 0) return room;  // a kernel of any size may look at no pixels at all
        const int64_t left = r % columns * stride - padding, top = r / columns % lines * stride - padding;
        const int8_t* const sample = x + r / columns / lines * step[0];
        const bool dense = step[3] == 1 || channels == 1;
        if (dense && kernel == 1 && padding == 0) return sample + top * step[1] + left * step[2];
        const int64_t run = dense && step[2] == channels && dilation == 1 ? kernel : 1;  // pixels that lie side by side
        int8_t* to = room;
        for (int64_t ky = 0; ky < kernel; ++ky)
            for (int64_t kx = 0; kx < kernel; kx += run, to += run * channels) {
                const int64_t v = top + ky * dilation, h = left + kx * dilation, end = v < 0 || v >= height ? 0 : run;
                const int64_t first = clamp(-h, end), last = clamp(width - h, end);  // of the run, inside of the picture
                if (first >= last) {
                    std::memset(to, 0, static_cast<size_t>(run * channels));
                    continue;
                }
                const int8_t* const from = sample + v * step[1] + (h + first) * step[2];
                std::memset(to, 0, static_cast<size_t>(first * channels));
                if (dense)
                    std::memcpy(to + first * channels, from, static_cast<size_t>((last - first) * channels));
                else
                    for (int64_t i = 0; i < channels; ++i) to[i] = from[i * step[3]];
                std::memset(to + last * channels, 0, static_cast<size_t>((run - last) * channels));
            }
        return room;
    }
};

Refusal describe(Call& c, Window& o, Packed& w, View y, View x, View x_scale, View weight, View weight_scale, Optional bias,
                 Optional gate, Optional residual, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    constexpr int64_t kMost = INT32_MAX;  // of each of them: their products fit into 64 bits
    if (x.dtype != DType::i8 || x_scale.dtype != DType::f32) return "x or x_scale: not int8 and float32";
    if (x.ndim != 4 || y.ndim != 4 || x_scale.ndim != 1) return "x, x_scale: not [B, H, W, C] and [B]";
    if (kernel < 1 || stride < 1 || padding < 0 || dilation < 1 || kernel > kMost || stride > kMost || padding > kMost ||
        dilation > kMost || x.shape[1] > kMost || x.shape[2] > kMost)
        return "kernel, stride, padding or dilation: below its least, or above 2^31";
    o = {static_cast<const int8_t*>(x.data), {}, x.shape[1], x.shape[2], x.shape[3], 0, 0, kernel, stride, padding, dilation};
    for (int k = 0; k < 4; ++k) o.step[k] = x.stride[k];
    if (o.channels > INT32_MAX / (128 * 128) / kernel / kernel) return "x: windows whose products need more than 32 bits";
    const int64_t span = dilation * (kernel - 1) + 1, high = o.height + 2 * padding, wide = o.width + 2 * padding;
    if (high < span || wide < span) return "x: smaller than the kernel";
    o.lines = (high - span) / stride + 1, o.columns = (wide - span) / stride + 1;
    if (y.shape[0] != x.shape[0] || y.shape[1] != o.lines || y.shape[2] != o.columns || x_scale.shape[0] != x.shape[0])
        return "y or x_scale: not of x's samples, or y not of its windows";
    c.rows = x.shape[0] * o.lines * o.columns, c.depth = kernel * kernel * o.channels;
    c.x_scale = x_scale, c.scale_rows.repeat = o.lines * o.columns, c.scale_rows.push(x_scale.shape[0], x_scale.stride[0]);
    if (Refusal why = describe_epilogue(c, y, weight_scale, bias, gate, residual)) return why;
    if (Refusal why = plan_codes(c)) return why;
    if (!packed(c, weight)) return "weight: not pack_w8's, or not contiguous";
    w.data = static_cast<const uint8_t*>(weight.data), c.row_room = kTiles ? 0 : c.depth;
    return nullptr;
}

int64_t bytes(Stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional gate,
              Optional residual, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, Text, Text) {
    Call c{};
    Window o{};
    Packed w{};
    if (describe(c, o, w, y, x, x_scale, weight, weight_scale, bias, gate, residual, kernel, stride, padding, dilation))
        return 0;
    return scratch_of(c);
}

Refusal conv2d_w8a8(Stream stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional gate,
                    Optional residual, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, Text activation,
                    Text dtype) {
    Call c{};
    Window o{};
    Packed w{};
    if (Refusal why =
            describe(c, o, w, y, x, x_scale, weight, weight_scale, bias, gate, residual, kernel, stride, padding, dilation))
        return why;
    return linear_of_codes(stream, c, o, w, activation, dtype);
}

}  // namespace
}  // namespace dk

using dk::conv2d_w8a8;
DK_ENTRY_WITH_SCRATCH(conv2d_w8a8,
                      "out x x_scale weight weight_scale bias gate residual kernel stride padding dilation activation dtype",
                      dk::bytes)
