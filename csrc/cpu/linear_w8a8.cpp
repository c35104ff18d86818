// y = activation(x W^T * x_scale * weight_scale + bias) * gate + residual over 8-bit codes of x and W
//
// Idea: a tile of y's sums stays in registers over all of K. The weight lies as pack_w8 leaves it, code + 128, so that x's
// codes enter the product as they are: sum (w + 128) x - 128 sum x, which wraps in 32 bits and ends exact. x is laid out once
// for a block of rows, tile by tile in the order of the product (row by row for matrix tiles), and then meets one panel of 64
// outputs after the other.
// Takes: codes and scales as the op does, any strides but the weight's; y, bias, gate and residual of any of the three floats.
// Floor: K multiply-adds a result.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/linear_w8a8.cpp
#include "activation.h"
#include "amx.h"
#include "norm.h"

namespace dk {
namespace {

constexpr int kPanel = 64, kDepth = 4;            // pack_w8's
constexpr int64_t kBlockBytes = 256 * 1024;       // of x's codes: a part of the second cache
constexpr int64_t kAhead = 6;                     // words of the weight that are asked for ahead
constexpr int64_t kSerialProducts = 1024 * 1024;  // work below this is not worth a second thread

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

struct Call {
    View y, x_scale;
    Rows x_rows, scale_rows;
    Operand weight_scale, bias, gate, residual;
    const int8_t* x;
    int64_t x_step;
    const uint8_t* weight;
    int64_t rows, columns, depth, words;  // y is [rows, columns]; words = ceil(depth / 4)
    int64_t line;                         // codes that a row takes where it is laid out
    int64_t block;                        // rows of x that are laid out at a time, whole tiles
    char* scratch;

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
    int64_t blocks() const { return (rows + block - 1) / block; }
    int64_t codes() const { return block * line * static_cast<int64_t>(sizeof(Code)); }
    int64_t room() const { return (codes() + block * 4 + 63) / 64 * 64; }  // a thread's: codes, and a sum a row
};

// x's rows from `from` on, [tile][word][row][4], or for matrix tiles [row][line], where past a row's words lies anything;
// zeros past the last row; sums[r] = 128 * the sum of a row.
void lay_out(const Call& c, int64_t from, int64_t rows, Code* to, int32_t* sums) {
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
        const int8_t* const x = r < rows ? c.x + c.x_rows.offset<int64_t>(from + r) : nullptr;
        const int64_t whole = c.depth / kDepth;
        if (kTiles && x && c.x_step == 1) {
            for (int64_t k = 0; k < whole * kDepth; ++k) sum += static_cast<uint32_t>(x[k]);
            std::memcpy(row, x, static_cast<size_t>(whole * kDepth));
        } else if (x && c.x_step == 1)
            for (int64_t k = 0; k < whole; ++k) sum += static_cast<uint32_t>(put(k, x + k * kDepth, 1, kDepth));
        else
            for (int64_t k = 0; k < whole; ++k)
                sum += static_cast<uint32_t>(put(k, x ? x + k * kDepth * c.x_step : x, c.x_step, x ? kDepth : 0));
        if (whole < c.words)
            sum += static_cast<uint32_t>(put(whole, x ? x + whole * kDepth * c.x_step : x, c.x_step, x ? c.depth % kDepth : 0));
        sums[r] = static_cast<int32_t>(128u * sum);
    }
}

// Sums of a tile's first kRows rows, [kRowsOfTile][kColumnsOfTile].
#if defined(__AMX_INT8__) || defined(DK_EMULATE_TILES)
template <int kRows>
__attribute__((noinline)) void multiply(const uint8_t* w, const Code* x, const Call& c, uint32_t* to) {
    constexpr int kTall = kRows / kTileRows;
    const int64_t line = c.line, words = c.words, whole = words / kTileLanes * kTileLanes;
    if (c.rows <= kRowsOfTile)  // each weight is read once
        square<true, false, kTall, kVectors, 4>(x, line / kDepth, w, kPanel, kLanes, to, kColumnsOfTile, whole);
    else
        square<true, false, kTall, kVectors>(x, line / kDepth, w, kPanel, kLanes, to, kColumnsOfTile, whole);
    if (whole == words) return;
    alignas(64) uint8_t rest[kTileLanes][kColumnsOfTile * kDepth] = {};  // zeros for what lies past the words of x
    for (int64_t k = whole; k < words; ++k) std::memcpy(rest[k - whole], w + k * kPanel * kDepth, sizeof rest[0]);
    square<true, true, kTall, kVectors>(x + whole * kDepth, line / kDepth, rest, kColumnsOfTile, kLanes, to, kColumnsOfTile,
                                        kTileLanes);
}
#else
template <int kRows>
__attribute__((noinline)) void multiply(const uint8_t* w, const Code* x, const Call& c, uint32_t* to) {
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

template <class T, int kActivation>
__attribute__((noinline)) void finish(const Call& c, const uint32_t* sums, const int32_t* offsets, int64_t row, int rows,
                                      int64_t column, int columns) {
    alignas(64) float scale[kColumnsOfTile], bias[kColumnsOfTile] = {};
    c.weight_scale.each(0, column, columns, [&](int64_t i, F v) __attribute__((always_inline)) { store(scale + i, v); });
    if (c.bias.present)
        c.bias.each(0, column, columns, [&](int64_t i, F v) __attribute__((always_inline)) { store(bias + i, v); });
    for (int r = 0; r < rows; ++r) {
        float x_scale;
        std::memcpy(&x_scale, static_cast<const float*>(c.x_scale.data) + c.scale_rows.offset<int64_t>(row + r),
                    sizeof x_scale);
        const int64_t gate = c.gate.present ? c.gate.rows.offset<int64_t>(row + r) : 0,
                      residual = c.residual.present ? c.residual.rows.offset<int64_t>(row + r) : 0;
        T* const to = static_cast<T*>(c.y.data) + (row + r) * c.columns + column;
        for (int i = 0; i < columns; i += kLanes) {
            const int n = columns - i < kLanes ? columns - i : kLanes;
            U sum;
            std::memcpy(&sum, sums + r * kColumnsOfTile + i, sizeof sum);
            const F exact = __builtin_convertvector(bit_cast<I>(sum - static_cast<uint32_t>(offsets[r])), F);
            F h = activated<kActivation>(exact * x_scale * load(scale + i) + load(bias + i));
            if (c.gate.present) h *= c.gate.load_at(gate, column + i, n);
            if (c.residual.present) h += c.residual.load_at(residual, column + i, n);
            h = quiet(h);
            if (n == kLanes)
                store(to + i, h);
            else
                store(to + i, h, n);
        }
    }
}

// A thread's part of the cells (block of rows, panel), the blocks outermost.
template <class T, int kActivation>
void run(const Call& c, int64_t thread, int64_t begin, int64_t end) {
    Code* const codes = reinterpret_cast<Code*>(c.scratch + thread * c.room());
    int32_t* const offsets = reinterpret_cast<int32_t*>(c.scratch + thread * c.room() + c.codes());
    alignas(64) uint32_t sums[kRowsOfTile * kColumnsOfTile];
    tiles_begin();
    int64_t laid_out = -1;
    for (int64_t cell = begin; cell < end; ++cell) {
        const int64_t block = cell / c.panels(), panel = cell % c.panels(), from = block * c.block;
        const int64_t rows = c.rows - from < c.block ? c.rows - from : c.block;
        if (block != laid_out) lay_out(c, from, rows, codes, offsets);
        laid_out = block;
        for (int64_t r = 0; r < rows; r += kRowsOfTile) {
            const int n = static_cast<int>(rows - r < kRowsOfTile ? rows - r : kRowsOfTile);
            const Code* const x = codes + r * c.line;
            for (int64_t j = panel * kPanel; j < c.columns && j < (panel + 1) * kPanel; j += kColumnsOfTile) {
                const uint8_t* const w = c.weight + panel * c.words * kPanel * kDepth + j % kPanel * kDepth;
                if (n <= kFewRows)
                    multiply<kFewRows>(w, x, c, sums);
                else
                    multiply<kRowsOfTile>(w, x, c, sums);
                const int64_t columns = c.columns - j < kColumnsOfTile ? c.columns - j : kColumnsOfTile;
                finish<T, kActivation>(c, sums, offsets + r, from + r, n, j, static_cast<int>(columns));
            }
        }
    }
    tiles_end();
}

Refusal describe(Call& c, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional gate,
                 Optional residual) {
    if (x.dtype != DType::i8 || weight.dtype != DType::u8) return "x or weight: not int8 and uint8";
    if (x_scale.dtype != DType::f32 || weight_scale.dtype != DType::f32) return "x_scale or weight_scale: not float32";
    if (weight_scale.ndim != 1 || y.ndim != x.ndim || !y.contiguous()) return "y: not contiguous, or not of x's dimensions";
    c.y = y, c.x_scale = x_scale, c.x = static_cast<const int8_t*>(x.data), c.weight = static_cast<const uint8_t*>(weight.data);
    if (!rows_of(x, c.x_rows) || x_scale.ndim != x.ndim - 1)
        return "x: fewer than 1 or more than 8 dimensions, or not x_scale's";
    c.rows = 1, c.columns = weight_scale.shape[0], c.depth = x.size(-1), c.x_step = x.step(-1);
    for (int k = 0; k < x.ndim - 1; ++k) {
        if (y.shape[k] != x.shape[k] || x_scale.shape[k] != x.shape[k]) return "x_scale: not one a row of x";
        c.rows *= x.shape[k];
        if (x.shape[k] != 1) c.scale_rows.push(x.shape[k], x_scale.stride[k]);
    }
    c.words = (c.depth + kDepth - 1) / kDepth;
    if (c.depth > INT32_MAX / (128 * 128)) return "x: rows whose products need more than 32 bits";
    if (y.size(-1) != c.columns || weight.ndim != 4 || weight.shape[0] != c.panels() || weight.shape[1] != c.words ||
        weight.shape[2] != kPanel || weight.shape[3] != kDepth || !weight.contiguous())
        return "weight: not pack_w8's, or not contiguous";
    Optional scale;
    static_cast<View&>(scale) = weight_scale;
    if (bias && bias.ndim != 1) return "bias: not [N]";
    if (residual && !residual.same_shape(y)) return "residual: not of the result's shape";
    const Optional given[] = {scale, bias, gate, residual};
    Operand* const operands[] = {&c.weight_scale, &c.bias, &c.gate, &c.residual};
    for (int k = 0; k < 4; ++k)
        if (Refusal why = describe(*operands[k], given[k], y)) return why;
    c.line = kTiles ? ((c.depth + 63) / 64 | 1) * 64 : c.words * kDepth;  // odd numbers of cache lines: rows don't share a set
    const int64_t tile = kRowsOfTile * c.line * static_cast<int64_t>(sizeof(Code));
    const int64_t tiles = (c.rows + kRowsOfTile - 1) / kRowsOfTile, most = tile ? kBlockBytes / tile : tiles;
    const int64_t blocks = most < 1 ? tiles : (tiles + most - 1) / most;
    c.block = (blocks ? (tiles + blocks - 1) / blocks : 1) * kRowsOfTile;  // of one size, or a thread would wait for the other
    return nullptr;
}

int64_t threads_of(const Call& c) { return c.rows * c.columns * (c.depth + 1) < kSerialProducts ? 1 : dk_parallel_threads(); }

int64_t bytes(Stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional gate,
              Optional residual, Text, Text) {
    Call c{};
    return describe(c, y, x, x_scale, weight, weight_scale, bias, gate, residual) ? 0 : threads_of(c) * c.room();
}

Refusal linear_w8a8(Stream stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional gate,
                    Optional residual, Text activation, Text dtype) {
    Call c{};
    const DType wanted = dtype == "float32" ? DType::f32 : dtype == "float16" ? DType::f16 : DType::bf16;
    if (y.dtype != wanted || (wanted == DType::bf16 && !(dtype == "bfloat16"))) return "dtype: not a known one, or not y's";
    if (Refusal why = describe(c, y, x, x_scale, weight, weight_scale, bias, gate, residual)) return why;
    c.scratch = static_cast<char*>(stream.scratch);
    int kind = -1;
    for (int k = kNone; k <= kSilu; ++k)
        if (activation == kActivations[k]) kind = k;
    if (kind >= 0 && c.rows * c.columns == 0) return nullptr;
    return for_value(Values<kNone, kGelu, kGeluTanh, kSilu>{}, kind, "activation: not a known one", [&](auto which) {
        return for_dtype(Floats{}, y.dtype, "dtype: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
            using T = typename TypeOf<decltype(tag)::value>::type;
            const int64_t threads = threads_of(c), cells = c.blocks() * c.panels();
            auto body = [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i)
                    run<T, decltype(which)::value>(c, i, cells * i / threads, cells * (i + 1) / threads);
            };
            parallel_for(threads, 1, body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::linear_w8a8;
DK_ENTRY_WITH_SCRATCH(linear_w8a8, "out x x_scale weight weight_scale bias gate residual activation dtype", dk::bytes)
