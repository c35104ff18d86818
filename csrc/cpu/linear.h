// What the Linears and the convolution over codes share: y = activation(x W^T * x_scale * weight_scale + bias + low up) * gate
// + residual
//
// Idea: a tile of y's sums stays in registers over all of K, or over a chunk of it, for which a panel of 64 outputs of the
// weight is unpacked. x is laid out once for a block of rows, in the order of the product, and then meets one panel after the
// other. Matrix tiles leave the vector units idle: the epilogue of the tile before fills them. How x and a panel lie and what
// sums a tile is a product's: of codes linear_int8.h's, of floats linear_w4a16.cpp's.
// Floor: K multiply-adds a result.
#pragma once

#include "activation.h"
#include "amx.h"
#include "norm.h"

namespace dk {
namespace {

constexpr int kPanel = 64, kDepth = 4;                          // pack_w8's and pack_w4's
constexpr int64_t kBlockBytes = 256 * 1024 * (kTiles ? 2 : 1);  // of x, as it lies: a part of the second cache
constexpr int64_t kMostBytes = 16 * kBlockBytes;  // of x, where chunks of it meet chunks of the weight: each thread has its own
constexpr int64_t kWhole = 128;                   // inputs that begin a chunk: those of a group
constexpr int64_t kSerialProducts = 1024 * 1024;  // work below this is not worth a second thread

// What the epilogue wants to know of a row: found once, for divisions take longer than the rest of it.
struct Known {
    int64_t gate, residual;  // where theirs begin
    float scale;             // of codes, as is the offset: 128 times their sum
    int32_t offset;
};

struct Call {
    View y, x_scale;
    Rows x_rows, scale_rows, low_rows;
    Operand weight_scale, bias, gate, residual, low, up;
    View x;
    int64_t rows, columns, depth;  // y is [rows, columns]
    int64_t rank;                  // of low [rows, rank] and up [rank, columns]; 0 where there are none
    bool narrow;                   // low and up are bfloat16, and go through matrix tiles
    int64_t line, low_line;        // numbers that a row takes where it is laid out, and that one of low takes
    int64_t line_bytes;            // of the first
    int64_t apart, block;          // rows of x that are laid out at a time, and the room for them: whole tiles
    int64_t chunk;                 // inputs of a panel that meet all rows of a block before the next do
    int64_t group;                 // of 4-bit codes that share a scale
    int64_t panel_room;            // bytes of what is unpacked of a panel, or 0
    int64_t row_room;              // bytes of a row that is put together before it is laid out, or 0
    char* scratch;

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
    int64_t blocks() const { return (rows + apart - 1) / apart; }
    // A thread's room: x, a panel, low's rows and up's panel, sums that wait for the next chunk, what is known of a row.
    int64_t x_room() const { return block * line_bytes; }
    int64_t low_room() const { return block * low_line * (narrow ? 2 : 4); }
    int64_t up_room() const { return low_line * kPanel * (narrow ? 2 : 4); }
    int64_t sums_room() const { return chunk < depth ? block * kPanel * 4 : 0; }
    int64_t known_room() const { return block * static_cast<int64_t>(sizeof(Known)); }
    int64_t room() const {
        return (x_room() + panel_room + low_room() + up_room() + sums_room() + known_room() + row_room + 63) / 64 * 64;
    }
};

// A tile of sums, and how many of its rows have had their epilogue.
struct Tile {
    const uint32_t* sums;
    const float* added;  // low up, or nullptr
    const Known* known;
    const float *scale, *bias;
    int64_t row, column;
    int rows, columns, done;
};

// What goes on beside a product, by rows: the epilogue of another tile; and the lines that the product's own will write, far
// apart, are asked for: to wait for them took longer than all the rest.
struct Aside {
    const Call* call;
    Tile* tile;
    void (*finish)(const Call&, Tile&, int);
    char* to;
    int64_t apart, bytes;  // from a row to the next, and of one
    int left;
    DK_INLINE void ask(int rows) {
        for (; rows > 0 && left > 0; --rows, --left, to += apart) prefetch_for_write(to, static_cast<size_t>(bytes));
    }
    DK_INLINE void operator()(int rows) {
        ask(rows);
        if (tile->done < tile->rows) finish(*call, *tile, rows);
    }
};

// low's rows, and a panel of up, as their product wants them: float32, [row][rank] and [rank][64], or for matrix tiles
// bfloat16, [row][low_line] and by pairs of ranks [low_line / 2][64][2].
template <class L>
void lay_out_low(const Call& c, int64_t from, int64_t rows, L* to) {
    for (int64_t r = 0; r < rows; ++r, to += c.low_line) {
        for (int64_t i = c.rank; i < c.low_line; ++i) to[i] = L{};
        c.low.each(c.low_rows.offset<int64_t>(from + r), 0, c.rank, [&](int64_t i, F v) __attribute__((always_inline)) {
            const int64_t n = c.rank - i;
            n < kLanes ? store(to + i, v, static_cast<int>(n)) : store(to + i, v);
        });
    }
}

void lay_out_up(const Call& c, int64_t column, char* to) {
    const int64_t columns = c.columns - column < kPanel ? c.columns - column : kPanel, pair = c.narrow ? 2 : 1;
    const auto row = [&](int64_t r, int64_t i) __attribute__((always_inline)) {
        const int64_t n = columns - i < 0 ? 0 : columns - i < kLanes ? columns - i : kLanes;
        return r < c.rank ? c.up.load_at(r * c.up.view.stride[0], column + i, static_cast<int>(n)) : F{};
    };
    for (int64_t r = 0; r < c.low_line; r += pair)
        for (int64_t i = 0; i < kPanel; i += kLanes, to += sizeof(U)) {
            U v = bit_cast<U>(row(r, i));
            if (c.narrow) v = v >> 16 | (bit_cast<U>(row(r + 1, i)) & 0xffff0000u);  // exact: they are bfloat16s
            std::memcpy(to, &v, sizeof v);
        }
}

// to[kRows][P::kColumns] = low up, of a tile's rows
template <class P, int kRows>
__attribute__((noinline)) void low_rank(const Call& c, const float* low, const float* up, float* to) {
    constexpr int kWidth = P::kColumns / kLanes, kAtOnce = kRows < 12 ? kRows : P::kInTiles ? 8 : 12;
#pragma GCC unroll 1
    for (int first = 0; first < kRows; first += kAtOnce) {
        F sum[kAtOnce][kWidth] = {};
#pragma GCC unroll 1
        for (int64_t k = 0; k < c.rank; ++k) {
#pragma GCC unroll 12
            for (int r = 0; r < kAtOnce; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < kWidth; ++v)
                    sum[r][v] = fma(splat(low[(first + r) * c.low_line + k]), load(up + k * kPanel + v * kLanes), sum[r][v]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < kAtOnce; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kWidth; ++v) store(to + (first + r) * P::kColumns + v * kLanes, sum[r][v]);
    }
}
template <class P, int kRows>
__attribute__((noinline)) void low_rank(const Call& c, const bf16* low, const bf16* up, float* to) {
    if constexpr (P::kInTiles)
        square<false, false, kRows / kTileRows, P::kColumns / kTileLanes>(low, c.low_line / 2, up, kPanel, kLanes, to,
                                                                          P::kColumns, c.low_line / 2);
}

template <class P, class T, int kActivation>
__attribute__((noinline)) void finish(const Call& c, Tile& t, int rows) {
    const int end = t.rows - t.done < rows ? t.rows : t.done + rows;
    for (; t.done < end; ++t.done) {
        const int r = t.done;
        const Known& row = t.known[r];
        T* const to = static_cast<T*>(c.y.data) + (t.row + r) * c.columns + t.column;
        for (int i = 0; i < t.columns; i += kLanes) {
            const int n = t.columns - i < kLanes ? t.columns - i : kLanes;
            F h = P::sum(t.sums + r * P::kColumns + i, row) * load(t.scale + i) + load(t.bias + i);
            if (t.added) h += load(t.added + r * P::kColumns + i);
            h = activated<kActivation>(h);
            if (c.gate.present) h *= c.gate.load_at(row.gate, t.column + i, n);
            if (c.residual.present) h += c.residual.load_at(row.residual, t.column + i, n);
            h = quiet(h);
            if (n == kLanes)
                store(to + i, h);
            else
                store(to + i, h, n);
        }
    }
}

// A thread's part of the cells (block of rows, panel), the blocks outermost.
template <class P, class T, int kActivation, class X, class W>
void run(const Call& c, const X& source, const W& weight, int64_t thread, int64_t begin, int64_t end) {
    using Element = typename P::Element;
    constexpr int kTile = P::kRows * P::kColumns;
    char* const mine = c.scratch + thread * c.room();
    Element* const laid = reinterpret_cast<Element*>(mine);
    uint8_t* const unpacked = reinterpret_cast<uint8_t*>(mine + c.x_room());
    char *const low = mine + c.x_room() + c.panel_room, *const up = low + c.low_room(), *const waits = up + c.up_room();
    Known* const known = reinterpret_cast<Known*>(waits + c.sums_room());
    int8_t* const room = reinterpret_cast<int8_t*>(waits + c.sums_room() + c.known_room());
    alignas(64) uint32_t sums[2][kTile];
    alignas(64) float added[2][kTile], scale[2][kPanel], bias[2][kPanel] = {};
    Tile waiting{};
    int side = 0;
    int64_t laid_out = -1;
    tiles_begin();
    for (int64_t cell = begin; cell < end; ++cell) {
        const int64_t block = cell / c.panels(), panel = cell % c.panels(), from = block * c.apart, first = panel * kPanel;
        const int64_t rows = c.rows - from < c.apart ? c.rows - from : c.apart;
        const int64_t columns = c.columns - first < kPanel ? c.columns - first : kPanel;
        // The tile that waits may be of the panel before; but where sums wait for the next chunk, its place is wanted.
        float *const scales = scale[cell % 2], *const biases = bias[cell % 2];
        if (block != laid_out || c.chunk < c.depth) finish<P, T, kActivation>(c, waiting, P::kRows);
        if (block != laid_out) {
            P::lay_out(c, source, from, rows, laid, room, known);
            for (int64_t r = 0; r < rows; ++r) {
                known[r].gate = c.gate.present ? c.gate.rows.offset<int64_t>(from + r) : 0;
                known[r].residual = c.residual.present ? c.residual.rows.offset<int64_t>(from + r) : 0;
            }
            if (c.narrow)
                lay_out_low(c, from, rows, reinterpret_cast<bf16*>(low));
            else if (c.rank)
                lay_out_low(c, from, rows, reinterpret_cast<float*>(low));
            laid_out = block;
        }
        c.weight_scale.each(0, first, columns, [&](int64_t i, F v) __attribute__((always_inline)) { store(scales + i, v); });
        if (c.bias.present)
            c.bias.each(0, first, columns, [&](int64_t i, F v) __attribute__((always_inline)) { store(biases + i, v); });
        if (c.rank) lay_out_up(c, first, up);
        for (int64_t k = 0; k == 0 || k < c.depth; k += c.chunk) {
            const int64_t some = c.depth - k < c.chunk ? c.depth - k : c.chunk;
            const bool last = k + some == c.depth;
            const uint8_t* const w = weight.panel(c, panel, k, some, unpacked);
            uint32_t* waits_at = reinterpret_cast<uint32_t*>(waits);
            for (int64_t j = 0; j < columns; j += P::kColumns)
                for (int64_t r = 0; r < rows; r += P::kRows, waits_at += kTile) {
                    const int n = static_cast<int>(rows - r < P::kRows ? rows - r : P::kRows);
                    const Element* const x = laid + r * c.line + k * P::kStep;
                    uint32_t* const to = c.chunk < c.depth ? waits_at : sums[side];
                    constexpr int64_t kSize = sizeof(T), kWritten = P::kColumns * kSize;
                    char* const y = static_cast<char*>(c.y.data) + ((from + r) * c.columns + first + j) * kSize;
                    Aside aside{&c, &waiting, finish<P, T, kActivation>, y, c.columns * kSize, kWritten, last ? n : 0};
                    if (!P::kInTiles) aside.ask(n);
                    if (n <= P::kFew)
                        P::template multiply<P::kFew>(w + j * kDepth, x, c, some, k > 0, to, aside);
                    else
                        P::template multiply<P::kRows>(w + j * kDepth, x, c, some, k > 0, to, aside);
                    if (!last) continue;
                    finish<P, T, kActivation>(c, waiting, P::kRows);
                    const auto branch = [&](auto* low, const auto* up) __attribute__((always_inline)) {
                        low += r * c.low_line;
                        n <= P::kFew ? low_rank<P, P::kFew>(c, low, up, added[side])
                                     : low_rank<P, P::kRows>(c, low, up, added[side]);
                    };
                    if (c.narrow)
                        branch(reinterpret_cast<bf16*>(low), reinterpret_cast<bf16*>(up) + 2 * j);
                    else if (c.rank)
                        branch(reinterpret_cast<float*>(low), reinterpret_cast<float*>(up) + j);
                    const int wide = static_cast<int>(columns - j < P::kColumns ? columns - j : P::kColumns);
                    waiting = {
                        to, c.rank ? added[side] : nullptr, known + r, scales + j, biases + j, from + r, first + j, n, wide, 0};
                    side ^= 1;
                    if (!P::kInTiles) finish<P, T, kActivation>(c, waiting, P::kRows);
                }
        }
    }
    finish<P, T, kActivation>(c, waiting, P::kRows);
    tiles_end();
}

// What follows the sums, once c.rows, c.depth and y are known.
Refusal describe_epilogue(Call& c, View y, View weight_scale, Optional bias, Optional gate, Optional residual) {
    if (weight_scale.dtype != DType::f32) return "weight_scale: not float32";
    if (weight_scale.ndim != 1 || !y.contiguous()) return "y or weight_scale: not contiguous, or not [N]";
    c.y = y, c.columns = weight_scale.shape[0];
    if (y.size(-1) != c.columns) return "weight_scale: not one an output";
    if (bias && bias.ndim != 1) return "bias: not [N]";
    Optional scale;
    static_cast<View&>(scale) = weight_scale;
    const Optional given[] = {scale, bias, gate, residual};
    Operand* const operands[] = {&c.weight_scale, &c.bias, &c.gate, &c.residual};
    for (int k = 0; k < 4; ++k)
        if (Refusal why = describe(*operands[k], given[k], y)) return why;
    return nullptr;
}

// A Linear's rows: x, y, and what is neither x's nor the weight's codes.
[[maybe_unused]] Refusal describe_rows(Call& c, View y, View x, View weight_scale, Optional bias, Optional low, Optional up,
                                       Optional gate, Optional residual) {
    if (!rows_of(x, c.x_rows) || y.ndim != x.ndim) return "x: fewer than 1 or more than 8 dimensions, or not y's";
    c.x = x, c.rows = 1, c.depth = x.size(-1);
    for (int k = 0; k < x.ndim - 1; ++k) {
        if (y.shape[k] != x.shape[k]) return "y: not of x's rows";
        c.rows *= x.shape[k];
    }
    if (residual && !residual.same_shape(y)) return "residual: not of the result's shape";
    if (Refusal why = describe_epilogue(c, y, weight_scale, bias, gate, residual)) return why;
    if (low ? !up : !!up) return "low, up: one without the other";
    if (low) {
        if (low.dtype > DType::bf16 || up.dtype > DType::bf16) return "low or up: not float32, float16 or bfloat16";
        if (low.ndim != y.ndim || up.ndim != 2 || up.shape[1] != c.columns || low.size(-1) != up.shape[0])
            return "low or up: not [..., R] and [R, N]";
        for (int k = 0; k < y.ndim - 1; ++k)
            if (low.shape[k] != y.shape[k]) return "low: not of x's rows";
        if (low.size(-1) > INT32_MAX) return "low: more than 2^31 ranks";
        if (!rows_of(low, c.low_rows)) return "low: more than 8 dimensions";
        c.low.view = low, c.up.view = up, c.rank = up.shape[0];
    }
    return nullptr;
}

int64_t threads_of(const Call& c) { return c.rows * c.columns * (c.depth + 1) < kSerialProducts ? 1 : dk_parallel_threads(); }

// How x is laid out for a product that takes `line` numbers a row and all of c.depth, or up to `chunk` of it, at a time: as
// many rows as fill `bytes` with what a chunk meets.
template <class P>
void plan(Call& c, int64_t line, int64_t chunk = INT64_MAX, int64_t bytes = kBlockBytes) {
    c.line = line, c.line_bytes = line * static_cast<int64_t>(sizeof(typename P::Element));
    const int64_t chunks = chunk < c.depth ? (c.depth + chunk - 1) / chunk : 1, even = (c.depth + chunks - 1) / chunks;
    c.chunk = chunks > 1 ? (even + kWhole - 1) / kWhole * kWhole : c.depth ? c.depth : 1;
    c.narrow = P::kInTiles && c.rank && c.low.view.dtype == DType::bf16 && c.up.view.dtype == DType::bf16;
    c.low_line = c.narrow ? (c.rank + 31) / 32 * 32 : c.rank;
    const int64_t met = c.chunk < c.depth ? c.chunk * static_cast<int64_t>(sizeof(typename P::Element)) : c.line_bytes;
    const int64_t tiles = (c.rows + P::kRows - 1) / P::kRows, room = met ? bytes / (P::kRows * met) : tiles;
    const int64_t whole = c.line_bytes ? kMostBytes / (P::kRows * c.line_bytes) : tiles, most = room < whole ? room : whole;
    // As many for each thread, and of one size, or a thread would wait for the other.
    int64_t blocks = most < 1 ? tiles : (tiles + most - 1) / most;
    if (blocks > 1) blocks = (blocks + threads_of(c) - 1) / threads_of(c) * threads_of(c);
    blocks = blocks > tiles ? tiles : blocks;
    const int64_t each = blocks ? (c.rows + blocks - 1) / blocks : 1;
    c.apart = (each + P::kFew - 1) / P::kFew * P::kFew, c.block = (each + P::kRows - 1) / P::kRows * P::kRows;
}

int64_t scratch_of(const Call& c) { return c.rows * c.columns == 0 ? 0 : threads_of(c) * c.room(); }

// y's dtype is T.
template <class P, class T, class X, class W>
Refusal linear(Stream stream, Call& c, const X& source, const W& weight, Text activation) {
    c.scratch = static_cast<char*>(stream.scratch);
    int kind = -1;
    for (int k = kNone; k <= kSilu; ++k)
        if (activation == kActivations[k]) kind = k;
    if (kind >= 0 && c.rows * c.columns == 0) return nullptr;
    return for_value(Values<kNone, kGelu, kGeluTanh, kSilu>{}, kind, "activation: not a known one", [&](auto which) -> Refusal {
        const int64_t threads = threads_of(c), cells = c.blocks() * c.panels();
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                run<P, T, decltype(which)::value>(c, source, weight, i, cells * i / threads, cells * (i + 1) / threads);
        };
        parallel_for(threads, 1, body);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk
