// What the Linears and the convolution over 8-bit codes share: y = activation(x W^T * x_scale * weight_scale + bias + low up) *
// gate + residual
//
// Idea: a tile of y's sums stays in registers over all of K. A panel of 64 outputs of the weight lies as pack_w8 leaves it, or
// is unpacked so: code + 128, so that x's codes enter the product as they are: sum (w + 128) x - 128 sum x, which wraps in 32
// bits and ends exact. x is laid out once for a block of rows, tile by tile in the order of the product (row by row for matrix
// tiles), and then meets one panel after the other. Matrix tiles leave the vector units idle: the epilogue of the tile before
// fills them. Floor: K multiply-adds a result.
#pragma once

#include "activation.h"
#include "amx.h"
#include "norm.h"

namespace dk {
namespace {

constexpr int kPanel = 64, kDepth = 4;                          // pack_w8's
constexpr int64_t kBlockBytes = 256 * 1024 * (kTiles ? 2 : 1);  // of x's codes: a part of the second cache
constexpr int64_t kAhead = 6;                                   // words of the weight that are asked for ahead
constexpr int64_t kSerialProducts = 1024 * 1024;                // work below this is not worth a second thread

// What sums a tile, by what the instruction set has: matrix tiles, bytes by fours, words by pairs, or nothing.
#if defined(__AMX_INT8__) || defined(DK_EMULATE_TILES)
typedef int8_t Code;
constexpr int kRowsOfTile = 2 * kTileRows, kVectors = 2, kWide = kLanes;
#elif defined(__AVX512VNNI__)
typedef int8_t Code;
constexpr int kRowsOfTile = 12, kVectors = 2, kWide = kLanes;
DK_INLINE U weights(const uint8_t* p) { return bit_cast<U>(_mm512_loadu_si512(p)); }
DK_INLINE U broadcast(const Code* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return U{} + word;
}
DK_INLINE U dot(U sum, U w, U x) {
    return bit_cast<U>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
}
#elif defined(__AVX2__)  // a column's sum is in two lanes, its even and its odd pairs
typedef int16_t Code;
constexpr int kRowsOfTile = kLanes == 16 ? 12 : 6, kVectors = 2, kWide = kLanes / 2;
DK_INLINE U broadcast(const Code* p) {
    typedef uint64_t L __attribute__((vector_size(sizeof(U))));
    uint64_t words;
    std::memcpy(&words, p, sizeof words);
    return bit_cast<U>(L{} + words);
}
#if defined(__AVX512BW__)
DK_INLINE U weights(const uint8_t* p) {
    return bit_cast<U>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
DK_INLINE U dot(U sum, U w, U x) { return sum + bit_cast<U>(_mm512_madd_epi16(bit_cast<__m512i>(w), bit_cast<__m512i>(x))); }
#else
DK_INLINE U weights(const uint8_t* p) {
    return bit_cast<U>(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
DK_INLINE U dot(U sum, U w, U x) { return sum + bit_cast<U>(_mm256_madd_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(x))); }
#endif
#else
typedef int8_t Code;
constexpr int kRowsOfTile = 4, kVectors = 1, kWide = kLanes;
DK_INLINE U weights(const uint8_t* p) {
    U words;
    std::memcpy(&words, p, sizeof words);
    return words;
}
DK_INLINE U broadcast(const Code* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return U{} + word;
}
DK_INLINE U dot(U sum, U w, U x) {
    for (int k = 0; k < 32; k += 8) sum += (w >> k & 255u) * bit_cast<U>(bit_cast<I>(x << (24 - k)) >> 24);
    return sum;
}
#endif
constexpr int kColumnsOfTile = kVectors * kWide;
constexpr int kFewRows = kTiles ? kTileRows : kRowsOfTile == 4 ? 2 : kRowsOfTile / 3;  // of a tile that is not full
constexpr int64_t kWordStep = kTiles ? kDepth : kRowsOfTile * kDepth;                  // where x's codes are laid out

// What the epilogue wants to know of a row: found once, for divisions take longer than the rest of it.
struct Known {
    int64_t gate, residual;  // where theirs begin
    float scale;
    int32_t offset;  // 128 times the sum of its codes
};

struct Call {
    View y, x_scale;
    Rows x_rows, scale_rows, low_rows;
    Operand weight_scale, bias, gate, residual, low, up;
    const int8_t* x;
    int64_t x_step;
    int64_t rows, columns, depth, words;  // y is [rows, columns]; words = ceil(depth / 4)
    int64_t rank;                         // of low [rows, rank] and up [rank, columns]; 0 where there are none
    bool narrow;                          // low and up are bfloat16, and go through matrix tiles
    int64_t line, low_line;               // codes that a row takes where it is laid out; numbers that one of low takes
    int64_t block;                        // rows of x that are laid out at a time, whole tiles
    int64_t panel_room;                   // bytes of an unpacked panel, or 0
    int64_t row_room;                     // bytes of a row that is put together before it is laid out, or 0
    char* scratch;

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
    int64_t blocks() const { return (rows + block - 1) / block; }
    // A thread's room: x's codes, a panel, low's rows and up's panel, what is known of a row.
    int64_t codes() const { return block * line * static_cast<int64_t>(sizeof(Code)); }
    int64_t low_room() const { return block * low_line * (narrow ? 2 : 4); }
    int64_t up_room() const { return low_line * kPanel * (narrow ? 2 : 4); }
    int64_t room() const {
        return (codes() + panel_room + low_room() + up_room() + block * static_cast<int64_t>(sizeof(Known)) + row_room + 63) /
               64 * 64;
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

// What goes on beside a product: the epilogue of another tile, by rows.
struct Aside {
    const Call* call;
    Tile* tile;
    void (*finish)(const Call&, Tile&, int);
    DK_INLINE void operator()(int rows) const {
        if (tile->done < tile->rows) finish(*call, *tile, rows);
    }
};

// A Linear's x: where row r's codes lie, c.x_step apart. (A convolution puts them together, in `room`.)
struct Matrix {
    DK_INLINE const int8_t* row(const Call& c, int64_t r, int8_t*) const { return c.x + c.x_rows.offset<int64_t>(r); }
};

DK_INLINE uint32_t sum_of(const int8_t* x, int64_t n) {
    uint32_t sum = 0;
    int64_t k = 0;
#if defined(__AVX512VNNI__)
    __m512i sums = _mm512_setzero_si512();
    for (; k + 64 <= n; k += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(x + k));
    sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(sums));
#endif
    for (; k < n; ++k) sum += static_cast<uint32_t>(x[k]);
    return sum;
}

// x's rows from `from` on, [tile][word][row][4], or for matrix tiles [row][line], where past a row's words lies anything;
// zeros past the last row; and what is to be known of each.
template <class X>
void lay_out(const Call& c, const X& source, int64_t from, int64_t rows, Code* to, int8_t* room, Known* known) {
    const int64_t tile = kRowsOfTile * c.line, row_step = kTiles ? c.line : kDepth;
    for (int64_t r = 0; r < (rows + kRowsOfTile - 1) / kRowsOfTile * kRowsOfTile; ++r) {
        Code* const row = to + r / kRowsOfTile * tile + r % kRowsOfTile * row_step;
        const auto put = [&](int64_t k, const int8_t* codes, int64_t step, int64_t n) __attribute__((always_inline)) {
            int32_t sum = 0;
            Code four[kDepth] = {};
            for (int64_t i = 0; i < n; ++i) {
                four[i] = codes[i * step];
                sum += codes[i * step];
            }
            std::memcpy(row + k * kWordStep, four, sizeof four);
            return sum;
        };
        uint32_t sum = 0;
        const int8_t* const x = r < rows ? source.row(c, from + r, kTiles ? reinterpret_cast<int8_t*>(row) : room) : nullptr;
        const int64_t whole = c.depth / kDepth;
        if (kTiles && x && c.x_step == 1) {
            sum = sum_of(x, whole * kDepth);
            if (static_cast<const void*>(x) != row) std::memcpy(row, x, static_cast<size_t>(whole * kDepth));
        } else if (x && c.x_step == 1)
            for (int64_t k = 0; k < whole; ++k) sum += static_cast<uint32_t>(put(k, x + k * kDepth, 1, kDepth));
        else
            for (int64_t k = 0; k < whole; ++k)
                sum += static_cast<uint32_t>(put(k, x ? x + k * kDepth * c.x_step : x, c.x_step, x ? kDepth : 0));
        if (whole < c.words)
            sum += static_cast<uint32_t>(put(whole, x ? x + whole * kDepth * c.x_step : x, c.x_step, x ? c.depth % kDepth : 0));
        if (r >= rows) continue;
        known[r].offset = static_cast<int32_t>(128u * sum);
        std::memcpy(&known[r].scale, static_cast<const float*>(c.x_scale.data) + c.scale_rows.offset<int64_t>(from + r),
                    sizeof(float));
        known[r].gate = c.gate.present ? c.gate.rows.offset<int64_t>(from + r) : 0;
        known[r].residual = c.residual.present ? c.residual.rows.offset<int64_t>(from + r) : 0;
    }
}

// Sums of a tile's first kRows rows, [kRowsOfTile][kColumnsOfTile].
#if defined(__AMX_INT8__) || defined(DK_EMULATE_TILES)
template <int kRows>
__attribute__((noinline)) void multiply(const uint8_t* w, const Code* x, const Call& c, uint32_t* to, const Aside& aside) {
    constexpr int kTall = kRows / kTileRows;
    const int64_t line = c.line, words = c.words, whole = words / kTileLanes * kTileLanes;
    const int rows = static_cast<int>(kRowsOfTile * kTileLanes / (words + 1) + 1);  // of the other tile, a step
    const auto step = [&]() __attribute__((always_inline)) { aside(rows); };
    if (c.rows <= kRowsOfTile)  // each weight is read once, and comes from far
        square<true, false, kTall, kVectors, 4>(x, line / kDepth, w, kPanel, kLanes, to, kColumnsOfTile, whole, step);
    else
        square<true, false, kTall, kVectors, 2>(x, line / kDepth, w, kPanel, kLanes, to, kColumnsOfTile, whole, step);
    if (whole == words) return;
    alignas(64) uint8_t rest[kTileLanes][kColumnsOfTile * kDepth] = {};  // zeros for what lies past the words of x
    for (int64_t k = whole; k < words; ++k) std::memcpy(rest[k - whole], w + k * kPanel * kDepth, sizeof rest[0]);
    square<true, true, kTall, kVectors>(x + whole * kDepth, line / kDepth, rest, kColumnsOfTile, kLanes, to, kColumnsOfTile,
                                        kTileLanes);
}
#else
template <int kRows>
__attribute__((noinline)) void multiply(const uint8_t* w, const Code* x, const Call& c, uint32_t* to, const Aside&) {
    U sum[kRows][kVectors] = {};
#pragma GCC unroll 1
    for (int64_t k = 0; k < c.words; ++k, w += kPanel * kDepth, x += kRowsOfTile * kDepth) {
        prefetch(w + kAhead * kPanel * kDepth, kColumnsOfTile * kDepth);
        U b[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) b[v] = weights(w + v * kWide * kDepth);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const U a = broadcast(x + r * kDepth);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[r][v] = dot(sum[r][v], b[v], a);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, to += kColumnsOfTile) {
        if constexpr (kWide == kLanes) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) std::memcpy(to + v * kLanes, &sum[r][v], sizeof(U));
        } else {  // even and odd pairs
            const Pair two = {bit_cast<F>(sum[r][0]), bit_cast<F>(sum[r][kVectors - 1])};
#if defined(__AVX512F__)
            const F even = __builtin_shufflevector(two.lo, two.hi, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                    odd = __builtin_shufflevector(two.lo, two.hi, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
            const F even = __builtin_shufflevector(two.lo, two.hi, 0, 2, 4, 6, 8, 10, 12, 14),
                    odd = __builtin_shufflevector(two.lo, two.hi, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
            const U both = bit_cast<U>(even) + bit_cast<U>(odd);
            std::memcpy(to, &both, sizeof both);
        }
    }
}
#endif

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

// to[kRows][kColumnsOfTile] = low up, of a tile's rows
template <int kRows>
__attribute__((noinline)) void low_rank(const Call& c, const float* low, const float* up, float* to) {
    constexpr int kWidth = kColumnsOfTile / kLanes, kAtOnce = kRows < 12 ? kRows : kTiles ? 8 : 12;
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
            for (int v = 0; v < kWidth; ++v) store(to + (first + r) * kColumnsOfTile + v * kLanes, sum[r][v]);
    }
}
template <int kRows>
__attribute__((noinline)) void low_rank(const Call& c, const bf16* low, const bf16* up, float* to) {
    if constexpr (kTiles)
        square<false, false, kRows / kTileRows, kVectors>(low, c.low_line / 2, up, kPanel, kLanes, to, kColumnsOfTile,
                                                          c.low_line / 2);
}

template <class T, int kActivation>
__attribute__((noinline)) void finish(const Call& c, Tile& t, int rows) {
    const int end = t.rows - t.done < rows ? t.rows : t.done + rows;
    for (; t.done < end; ++t.done) {
        const int r = t.done;
        const Known& row = t.known[r];
        T* const to = static_cast<T*>(c.y.data) + (t.row + r) * c.columns + t.column;
        for (int i = 0; i < t.columns; i += kLanes) {
            const int n = t.columns - i < kLanes ? t.columns - i : kLanes;
            U sum;
            std::memcpy(&sum, t.sums + r * kColumnsOfTile + i, sizeof sum);
            const F exact = __builtin_convertvector(bit_cast<I>(sum - static_cast<uint32_t>(row.offset)), F);
            F h = exact * row.scale * load(t.scale + i) + load(t.bias + i);
            if (t.added) h += load(t.added + r * kColumnsOfTile + i);
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
template <class T, int kActivation, class X, class W>
void run(const Call& c, const X& source, const W& weight, int64_t thread, int64_t begin, int64_t end) {
    char* const mine = c.scratch + thread * c.room();
    Code* const codes = reinterpret_cast<Code*>(mine);
    uint8_t* const unpacked = reinterpret_cast<uint8_t*>(mine + c.codes());
    char *const low = mine + c.codes() + c.panel_room, *const up = low + c.low_room();
    Known* const known = reinterpret_cast<Known*>(up + c.up_room());
    int8_t* const row = reinterpret_cast<int8_t*>(known + c.block);
    alignas(64) uint32_t sums[2][kRowsOfTile * kColumnsOfTile];
    alignas(64) float added[2][kRowsOfTile * kColumnsOfTile], scale[2][kPanel], bias[2][kPanel] = {};
    Tile waiting{};
    int side = 0;
    int64_t laid_out = -1;
    tiles_begin();
    for (int64_t cell = begin; cell < end; ++cell) {
        const int64_t block = cell / c.panels(), panel = cell % c.panels(), from = block * c.block, first = panel * kPanel;
        const int64_t rows = c.rows - from < c.block ? c.rows - from : c.block;
        const int64_t columns = c.columns - first < kPanel ? c.columns - first : kPanel;
        // The tile that waits may be of the panel before.
        float *const scales = scale[cell % 2], *const biases = bias[cell % 2];
        if (block != laid_out) {
            finish<T, kActivation>(c, waiting, kRowsOfTile);
            lay_out(c, source, from, rows, codes, row, known);
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
        const uint8_t* const w = weight.panel(c, panel, unpacked);
        for (int64_t j = 0; j < columns; j += kColumnsOfTile)
            for (int64_t r = 0; r < rows; r += kRowsOfTile, side ^= 1) {
                const int n = static_cast<int>(rows - r < kRowsOfTile ? rows - r : kRowsOfTile);
                const Code* const x = codes + r * c.line;
                const Aside aside{&c, &waiting, finish<T, kActivation>};
                (n <= kFewRows ? multiply<kFewRows> : multiply<kRowsOfTile>)(w + j * kDepth, x, c, sums[side], aside);
                finish<T, kActivation>(c, waiting, kRowsOfTile);
                const auto branch = [&](auto* low, const auto* up) __attribute__((always_inline)) {
                    low += r * c.low_line;
                    n <= kFewRows ? low_rank<kFewRows>(c, low, up, added[side])
                                  : low_rank<kRowsOfTile>(c, low, up, added[side]);
                };
                if (c.narrow)
                    branch(reinterpret_cast<bf16*>(low), reinterpret_cast<bf16*>(up) + 2 * j);
                else if (c.rank)
                    branch(reinterpret_cast<float*>(low), reinterpret_cast<float*>(up) + j);
                const int wide = static_cast<int>(columns - j < kColumnsOfTile ? columns - j : kColumnsOfTile);
                waiting = {
                    sums[side], c.rank ? added[side] : nullptr, known + r, scales + j, biases + j, from + r, first + j, n, wide,
                    0};
                if (!kTiles) finish<T, kActivation>(c, waiting, kRowsOfTile);
            }
    }
    finish<T, kActivation>(c, waiting, kRowsOfTile);
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

// How x is laid out, once c.rows and c.depth are known.
Refusal plan(Call& c) {
    if (c.depth > INT32_MAX / (128 * 128)) return "x: rows whose products need more than 32 bits";
    c.words = (c.depth + kDepth - 1) / kDepth;
    c.line = kTiles ? ((c.depth + 63) / 64 | 1) * 64 : c.words * kDepth;  // odd numbers of cache lines: rows don't share a set
    const int64_t tile = kRowsOfTile * c.line * static_cast<int64_t>(sizeof(Code));
    const int64_t tiles = (c.rows + kRowsOfTile - 1) / kRowsOfTile, most = tile ? kBlockBytes / tile : tiles;
    const int64_t blocks = most < 1 ? tiles : (tiles + most - 1) / most;
    c.block = (blocks ? (tiles + blocks - 1) / blocks : 1) * kRowsOfTile;  // of one size, or a thread would wait for the other
    return nullptr;
}

bool packed(const Call& c, const View& weight) {  // as pack_w8 leaves a weight
    return weight.dtype == DType::u8 && weight.ndim == 4 && weight.shape[0] == c.panels() && weight.shape[1] == c.words &&
           weight.shape[2] == kPanel && weight.shape[3] == kDepth && weight.contiguous();
}

// pack_w8's panels, as they lie
struct Packed {
    const uint8_t* data;
    DK_INLINE const uint8_t* panel(const Call& c, int64_t p, uint8_t*) const { return data + p * c.words * kPanel * kDepth; }
};

[[maybe_unused]] Refusal describe(Call& c, View y, View x, View x_scale, View weight_scale, Optional bias, Optional low,
                                  Optional up, Optional gate, Optional residual) {
    if (x.dtype != DType::i8 || x_scale.dtype != DType::f32) return "x or x_scale: not int8 and float32";
    if (!rows_of(x, c.x_rows) || x_scale.ndim != x.ndim - 1 || y.ndim != x.ndim)
        return "x: fewer than 1 or more than 8 dimensions, or not x_scale's or y's";
    c.x = static_cast<const int8_t*>(x.data), c.x_scale = x_scale;
    c.rows = 1, c.depth = x.size(-1), c.x_step = x.step(-1);
    for (int k = 0; k < x.ndim - 1; ++k) {
        if (y.shape[k] != x.shape[k] || x_scale.shape[k] != x.shape[k]) return "x_scale: not one a row of x";
        c.rows *= x.shape[k];
        if (x.shape[k] != 1) c.scale_rows.push(x.shape[k], x_scale.stride[k]);
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
        c.narrow = kTiles && c.rank && low.dtype == DType::bf16 && up.dtype == DType::bf16;
        c.low_line = c.narrow ? (c.rank + 31) / 32 * 32 : c.rank;
    }
    return plan(c);
}

int64_t threads_of(const Call& c) { return c.rows * c.columns * (c.depth + 1) < kSerialProducts ? 1 : dk_parallel_threads(); }

int64_t scratch_of(const Call& c) { return c.rows * c.columns == 0 ? 0 : threads_of(c) * c.room(); }

template <class X, class W>
Refusal linear(Stream stream, Call& c, const X& source, const W& weight, Text activation, Text dtype) {
    const DType wanted = dtype == "float32" ? DType::f32 : dtype == "float16" ? DType::f16 : DType::bf16;
    if (c.y.dtype != wanted || (wanted == DType::bf16 && !(dtype == "bfloat16"))) return "dtype: not a known one, or not y's";
    c.scratch = static_cast<char*>(stream.scratch);
    int kind = -1;
    for (int k = kNone; k <= kSilu; ++k)
        if (activation == kActivations[k]) kind = k;
    if (kind >= 0 && c.rows * c.columns == 0) return nullptr;
    return for_value(Values<kNone, kGelu, kGeluTanh, kSilu>{}, kind, "activation: not a known one", [&](auto which) {
        return for_dtype(Floats{}, c.y.dtype, "dtype: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
            using T = typename TypeOf<decltype(tag)::value>::type;
            const int64_t threads = threads_of(c), cells = c.blocks() * c.panels();
            auto body = [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i)
                    run<T, decltype(which)::value>(c, source, weight, i, cells * i / threads, cells * (i + 1) / threads);
            };
            parallel_for(threads, 1, body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk
