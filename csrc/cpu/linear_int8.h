// The product of 8-bit codes: linear.h's sums, in int32 and exact.
//
// Idea: a panel of the weight lies as pack_w8 leaves it, or is unpacked so: code + 128, so that x's codes enter the product as
// they are: sum (w + 128) x - 128 sum x, which wraps in 32 bits and ends exact. x lies tile by tile in the order of the
// product, or row by row for matrix tiles.
#pragma once

#include "linear.h"

namespace dk {
namespace {

constexpr int64_t kAhead = 6;  // words of the weight that are asked for ahead

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

// A Linear's x: where row r's codes lie. (A convolution puts them together, in `room`.)
struct Matrix {
    DK_INLINE const int8_t* row(const Call& c, int64_t r, int8_t*) const {
        return static_cast<const int8_t*>(c.x.data) + c.x_rows.offset<int64_t>(r);
    }
    DK_INLINE int64_t apart(const Call& c) const { return c.x.step(-1); }
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

struct Int8 {
    using Element = Code;
    static constexpr int kRows = kRowsOfTile, kColumns = kVectors * kWide;
    static constexpr int kFew = kTiles ? kTileRows : kRows == 4 ? 2 : kRows / 3;  // of a tile that is not full
    static constexpr bool kInTiles = kTiles;
    static constexpr int64_t kStep = kTiles ? 1 : kRows;  // from an input to the next, where x is laid out

    DK_INLINE static F sum(const uint32_t* p, const Known& row) {
        U sum;
        std::memcpy(&sum, p, sizeof sum);
        return __builtin_convertvector(bit_cast<I>(sum - static_cast<uint32_t>(row.offset)), F) * row.scale;
    }

    DK_INLINE static void know(const Call& c, int64_t row, uint32_t sum, Known& of) {
        of.offset = static_cast<int32_t>(128u * sum);
        std::memcpy(&of.scale, static_cast<const float*>(c.x_scale.data) + c.scale_rows.offset<int64_t>(row), sizeof of.scale);
    }

#if defined(__AVX512VNNI__)
    // A tile's words, by rows, to [word][row], 16 at a time.
    static void turned(const int8_t* const (&x)[kRows], int64_t words, Code* to) {
        for (int64_t k = 0; k < words; k += kLanes) {
            const int n = static_cast<int>(words - k < kLanes ? words - k : kLanes);
            F square[kLanes] = {};
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                if (i < kRows) square[i] = load(reinterpret_cast<const float*>(x[i % kRows] + k * kDepth), n);
            turn(square);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                if (i < n) store(reinterpret_cast<float*>(to + (k + i) * kRows * kDepth), square[i], kRows);
        }
    }
#endif

    // x's rows from `from` on, [tile][word][row][4], or for matrix tiles [row][line], where past a row's words lies anything;
    // zeros past the last row; and what is to be known of each.
    template <class X>
    static void lay_out(const Call& c, const X& source, int64_t from, int64_t rows, Code* to, int8_t* room, Known* known) {
        const int64_t tile = kRows * c.line, row_step = kTiles ? c.line : kDepth, step = source.apart(c),
                      whole = c.depth / kDepth;
        int64_t r = 0;
#if defined(__AVX512VNNI__)
        if constexpr (!kTiles && std::is_same_v<X, Matrix>)  // whole tiles of rows that lie there
            for (; r + kRows <= rows && step == 1 && c.depth % kDepth == 0; r += kRows, to += tile) {
                const int8_t* x[kRows];
                for (int i = 0; i < kRows; ++i) {
                    x[i] = source.row(c, from + r + i, room);
                    know(c, from + r + i, sum_of(x[i], c.depth), known[r + i]);
                }
                turned(x, whole, to);
            }
#endif
        to -= r / kRows * tile;
        for (; r < (rows + kRows - 1) / kRows * kRows; ++r) {
            Code* const row = to + r / kRows * tile + r % kRows * row_step;
            const auto put = [&](int64_t k, const int8_t* codes, int64_t apart, int64_t n) __attribute__((always_inline)) {
                int32_t sum = 0;
                Code four[kDepth] = {};
                for (int64_t i = 0; i < n; ++i) {
                    four[i] = codes[i * apart];
                    sum += codes[i * apart];
                }
                std::memcpy(row + k * kDepth * kStep, four, sizeof four);
                return sum;
            };
            uint32_t sum = 0;
            const int8_t* const x =
                r < rows ? source.row(c, from + r, kTiles ? reinterpret_cast<int8_t*>(row) : room) : nullptr;
            if (kTiles && x && step == 1) {
                sum = sum_of(x, whole * kDepth);
                if (static_cast<const void*>(x) != row) std::memcpy(row, x, static_cast<size_t>(whole * kDepth));
            } else if (x && step == 1)
                for (int64_t k = 0; k < whole; ++k) sum += static_cast<uint32_t>(put(k, x + k * kDepth, 1, kDepth));
            else
                for (int64_t k = 0; k < whole; ++k)
                    sum += static_cast<uint32_t>(put(k, x ? x + k * kDepth * step : x, step, x ? kDepth : 0));
            if (whole * kDepth < c.depth)
                sum += static_cast<uint32_t>(put(whole, x ? x + whole * kDepth * step : x, step, x ? c.depth % kDepth : 0));
            if (r >= rows) continue;
            know(c, from + r, sum, known[r]);
        }
    }

    // Sums over n inputs, all of them, of a tile's first kSome rows, [kRows][kColumns].
#if defined(__AMX_INT8__) || defined(DK_EMULATE_TILES)
    template <int kSome>
    __attribute__((noinline)) static void multiply(const uint8_t* w, const Code* x, const Call& c, int64_t n, bool,
                                                   uint32_t* to, Aside& aside) {
        constexpr int kTall = kSome / kTileRows;
        const int64_t line = c.line, words = (n + kDepth - 1) / kDepth, whole = words / kTileLanes * kTileLanes;
        const int rows = static_cast<int>(kRows * kTileLanes / (words + 1) + 1);  // of the other tile, a step
        const auto step = [&]() __attribute__((always_inline)) { aside(rows); };
        if (c.rows <= kRows)  // each weight is read once, and comes from far
            square<true, false, kTall, kVectors, 4>(x, line / kDepth, w, kPanel, kLanes, to, kColumns, whole, step);
        else
            square<true, false, kTall, kVectors, 2>(x, line / kDepth, w, kPanel, kLanes, to, kColumns, whole, step);
        if (whole == words) return;
        alignas(64) uint8_t rest[kTileLanes][kColumns * kDepth] = {};  // zeros for what lies past the words of x
        for (int64_t k = whole; k < words; ++k) std::memcpy(rest[k - whole], w + k * kPanel * kDepth, sizeof rest[0]);
        square<true, true, kTall, kVectors>(x + whole * kDepth, line / kDepth, rest, kColumns, kLanes, to, kColumns,
                                            kTileLanes);
    }
#else
    template <int kSome>
    __attribute__((noinline)) static void multiply(const uint8_t* w, const Code* x, const Call&, int64_t n, bool, uint32_t* to,
                                                   Aside&) {
        U sum[kSome][kVectors] = {};
#pragma GCC unroll 1
        for (int64_t k = 0; k < n; k += kDepth, w += kPanel * kDepth, x += kRows * kDepth) {
            prefetch(w + kAhead * kPanel * kDepth, kColumns * kDepth);
            U b[kVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) b[v] = weights(w + v * kWide * kDepth);
#pragma GCC unroll 12
            for (int r = 0; r < kSome; ++r) {
                const U a = broadcast(x + r * kDepth);
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) sum[r][v] = dot(sum[r][v], b[v], a);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < kSome; ++r, to += kColumns) {
            if constexpr (kWide == kLanes) {
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) std::memcpy(to + v * kLanes, &sum[r][v], sizeof(U));
            } else {  // even and odd pairs
                const Pair two = {bit_cast<F>(sum[r][0]), bit_cast<F>(sum[r][kVectors - 1])};
#if defined(__AVX512F__)
                const F even =
                            __builtin_shufflevector(two.lo, two.hi, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                        odd =
                            __builtin_shufflevector(two.lo, two.hi, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
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
};

int64_t words_of(const Call& c) { return (c.depth + kDepth - 1) / kDepth; }

[[maybe_unused]] bool packed(const Call& c, const View& weight) {  // as pack_w8 leaves a weight
    return weight.dtype == DType::u8 && weight.ndim == 4 && weight.shape[0] == c.panels() && weight.shape[1] == words_of(c) &&
           weight.shape[2] == kPanel && weight.shape[3] == kDepth && weight.contiguous();
}

// pack_w8's panels, as they lie
struct Packed {
    const uint8_t* data;
    DK_INLINE const uint8_t* panel(const Call& c, int64_t p, int64_t k, int64_t, uint8_t*) const {
        return data + (p * words_of(c) * kDepth + k) * kPanel;
    }
};

// How codes are laid out, once c.rows and c.depth are known.
Refusal plan_codes(Call& c) {
    if (c.depth > INT32_MAX / (128 * 128)) return "x: rows whose products need more than 32 bits";
    // For tiles an odd number of cache lines: rows don't share a set.
    plan<Int8>(c, kTiles ? ((c.depth + 63) / 64 | 1) * 64 : words_of(c) * kDepth);
    return nullptr;
}

[[maybe_unused]] Refusal describe(Call& c, View y, View x, View x_scale, View weight_scale, Optional bias, Optional low,
                                  Optional up, Optional gate, Optional residual) {
    if (x.dtype != DType::i8 || x_scale.dtype != DType::f32) return "x or x_scale: not int8 and float32";
    if (x_scale.ndim != x.ndim - 1) return "x_scale: not one a row of x";
    if (Refusal why = describe_rows(c, y, x, weight_scale, bias, low, up, gate, residual)) return why;
    c.x_scale = x_scale;
    for (int k = 0; k < x.ndim - 1; ++k) {
        if (x_scale.shape[k] != x.shape[k]) return "x_scale: not one a row of x";
        if (x.shape[k] != 1) c.scale_rows.push(x.shape[k], x_scale.stride[k]);
    }
    return plan_codes(c);
}

template <class X, class W>
Refusal linear_of_codes(Stream stream, Call& c, const X& source, const W& weight, Text activation, Text dtype) {
    const DType wanted = dtype == "float32" ? DType::f32 : dtype == "float16" ? DType::f16 : DType::bf16;
    if (c.y.dtype != wanted || (wanted == DType::bf16 && !(dtype == "bfloat16"))) return "dtype: not a known one, or not y's";
    return for_value(Floats{}, c.y.dtype, "dtype: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        return linear<Int8, typename TypeOf<decltype(tag)::value>::type>(stream, c, source, weight, activation);
    });
}

}  // namespace
}  // namespace dk
