// y = activation(x W^T * weight_scale + bias + low up) * gate + residual over floats of x and 4-bit codes of W
//
// Idea: linear.h. A code of 4 bits times its group's whole scale lies in -128..112: exact in bfloat16, as its product with a
// bfloat16 of x is in float32. A panel is unpacked to bfloat16, inputs side by side in pairs, by chunks that stay in a near
// cache. Where x is bfloat16, matrix tiles take them so, and vector units that multiply pairs; others take one half of a pair
// after the other, in float32.
// Chunks are summed apart and then together: more exact than one long sum. Of few rows unpacking would take longer than the
// product: there codes are looked up as they are, and scales meet the sums of their groups.
// Takes: x of any strides and any of the three floats, as y is; bias, low, up, gate and residual likewise, each of its own.
// Floor: K multiply-adds a result; of few rows, half a byte of the weight each.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/linear_w4a16.cpp
#include "pack_w4.h"
#include "pairs.h"

namespace dk {
namespace {

constexpr int64_t kStepOfTiles = 32;  // inputs that a product of tiles takes

// x's row r, a vector at a time
template <class G>
DK_INLINE void each_of_row(const Call& c, int64_t r, G f) {
    Operand x;
    x.view = c.x;
    x.each(c.x_rows.offset<int64_t>(r), 0, c.depth, f);
}

// The second float of a pair.
DK_INLINE F upper(U pair) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // a mask would take the register that the sums leave
    pair >>= 16;
    asm("" : "+x"(pair));
    return bit_cast<F>(pair << 16);
#else
    return bit_cast<F>(pair & 0xffff0000u);
#endif
}

struct Nowhere {};  // x is read as it lies

// Through the vector units: float32; or bfloat16, in pairs
template <bool kPaired>
struct Vectors {
    using Element = std::conditional_t<kPaired, bf16, float>;  // of x: [tile][input][kRows], or [tile][pair][kRows][2]
#if defined(__AVX512F__)
    static constexpr int kRows = 12, kFew = 4, kWidth = 2;
#elif defined(__AVX2__)
    static constexpr int kRows = 6, kFew = 2, kWidth = 2;
#else
    static constexpr int kRows = 4, kFew = 2, kWidth = 1;
#endif
    static constexpr int kColumns = kWidth * kLanes;
    static constexpr bool kInTiles = false;
    static constexpr int64_t kStep = kRows, kChunk = kPaired ? 256 : 128;

    static int64_t line(const Call& c) { return c.depth + c.depth % 2; }

    DK_INLINE static F sum(const uint32_t* p, const Known&) { return load(reinterpret_cast<const float*>(p)); }

    static int64_t place(int64_t i) { return kPaired ? i / 2 * 2 * kRows + i % 2 : i * kRows; }

    static void lay_out(const Call& c, Nowhere, int64_t from, int64_t rows, Element* to, int8_t*, Known*) {
        for (int64_t r = 0; r < (rows + kRows - 1) / kRows * kRows; ++r) {
            Element* const row = to + r / kRows * kRows * c.line + r % kRows * (kPaired ? 2 : 1);
            for (int64_t i = r < rows ? c.depth : 0; i < c.line; ++i) row[place(i)] = {};
            if (r < rows)
                each_of_row(c, from + r, [&](int64_t i, F v) __attribute__((always_inline)) {
                    Element near[kLanes];
                    store(near, v);
                    for (int l = 0; l < kLanes && i + l < c.depth; ++l) row[place(i + l)] = near[l];
                });
        }
    }

    // to[kSome][kColumns] = (or +=) the sum over n inputs
    template <int kSome>
    __attribute__((noinline)) static void run(const uint8_t* w, const Element* x, int64_t n, bool add, float* to) {
        F sum[kSome][kWidth] = {};
#pragma GCC unroll 1
        for (int64_t k = 0; k < n; k += 2, w += PackedW4::kRow, x += 2 * kRows) {
            if constexpr (kPaired) {
                F b[kWidth];
#pragma GCC unroll 2
                for (int v = 0; v < kWidth; ++v) std::memcpy(&b[v], w + v * sizeof b[v], sizeof b[v]);
#pragma GCC unroll 12
                for (int r = 0; r < kSome; ++r) {
                    uint32_t pair;
                    std::memcpy(&pair, x + 2 * r, sizeof pair);
#pragma GCC unroll 2
                    for (int v = 0; v < kWidth; ++v) sum[r][v] = dot(bit_cast<F>(U{} + pair), b[v], sum[r][v]);
                }
            } else {
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    F b[kWidth];
#pragma GCC unroll 2
                    for (int v = 0; v < kWidth; ++v) {
                        U pair;
                        std::memcpy(&pair, w + v * sizeof pair, sizeof pair);
                        b[v] = half ? upper(pair) : bit_cast<F>(pair << 16);
                    }
#pragma GCC unroll 12
                    for (int r = 0; r < kSome; ++r)
#pragma GCC unroll 2
                        for (int v = 0; v < kWidth; ++v) sum[r][v] = fma(splat(x[half * kRows + r]), b[v], sum[r][v]);
                }
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < kSome; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kWidth; ++v) {
                float* const p = to + r * kColumns + v * kLanes;
                store(p, add ? sum[r][v] + load(p) : sum[r][v]);
            }
    }

    // The halves of a chunk are summed apart, for the same reason as chunks are.
    template <int kSome>
    static void multiply(const uint8_t* w, const Element* x, const Call&, int64_t n, bool add, uint32_t* to, Aside&) {
        if constexpr (kPaired) return run<kSome>(w, x, n, add, reinterpret_cast<float*>(to));  // bfloat16 would not show it
        constexpr int64_t kHalf = kChunk / 2;
        alignas(64) float all[kSome * kColumns];
        run<kSome>(w, x, n < kHalf ? n : kHalf, false, all);
        if (n > kHalf) run<kSome>(w + kHalf / 2 * PackedW4::kRow, x + kHalf * kRows, n - kHalf, true, all);
        for (int i = 0; i < kSome * kColumns; i += kLanes) {
            float* const p = reinterpret_cast<float*>(to) + i;
            store(p, add ? load(all + i) + load(p) : load(all + i));
        }
    }
};

// bfloat16, through matrix tiles
struct Tiles {
    using Element = bf16;  // of x: [row][line], zeros up to a whole product
    static constexpr int kRows = 2 * kTileRows, kColumns = 2 * kTileLanes, kFew = kTileRows;
    static constexpr bool kInTiles = true;
    static constexpr int64_t kStep = 1, kChunk = 2048;

    // An odd number of cache lines: rows don't share a set.
    static int64_t line(const Call& c) { return ((c.depth + kStepOfTiles - 1) / kStepOfTiles | 1) * kStepOfTiles; }

    DK_INLINE static F sum(const uint32_t* p, const Known&) { return load(reinterpret_cast<const float*>(p)); }

    static void lay_out(const Call& c, Nowhere, int64_t from, int64_t rows, bf16* to, int8_t*, Known*) {
        for (int64_t r = 0; r < (rows + kTileRows - 1) / kTileRows * kTileRows; ++r, to += c.line) {
            const int64_t depth = r < rows ? c.depth : 0;
            std::memset(to + depth, 0, static_cast<size_t>(c.line - depth) * sizeof(bf16));
            if (r < rows)
                each_of_row(c, from + r, [&](int64_t i, F v) __attribute__((always_inline)) {
                    const int64_t n = c.depth - i;
                    n < kLanes ? store(to + i, v, static_cast<int>(n)) : store(to + i, v);
                });
        }
    }

    template <int kSome>
    __attribute__((noinline)) static void multiply(const uint8_t* w, const bf16* x, const Call& c, int64_t n, bool add,
                                                   uint32_t* to, Aside& aside) {
        constexpr int kTall = kSome / kTileRows;
        const int64_t lanes = (n + kStepOfTiles - 1) / kStepOfTiles * kTileLanes;
        const int rows = static_cast<int>(kRows * kTileLanes / (lanes + 1) + 1);  // of the other tile, a step
        const auto step = [&]() __attribute__((always_inline)) { aside(rows); };
        if (add)
            square<false, true, kTall, 2>(x, c.line / 2, w, kPanel, kTileLanes, to, kColumns, lanes, step);
        else
            square<false, false, kTall, 2>(x, c.line / 2, w, kPanel, kTileLanes, to, kColumns, lanes, step);
    }
};

#if defined(__AMX_BF16__) || defined(DK_EMULATE_TILES)
constexpr bool kByGroups = true;
// bfloat16 through matrix tiles, of so few rows that unpacking takes longer than the product: a code is looked up, and its
// group's scale waits for the group's sums. Codes of a word lie 16 bits apart where they are looked up, so the inputs that
// make a pair are 0 and 2 of eight, 4 and 6, 1 and 3, 5 and 7: x is laid out in that order.
struct Groups : Tiles {
    static constexpr int64_t kChunk = 128;

    static void lay_out(const Call& c, Nowhere x, int64_t from, int64_t rows, bf16* to, int8_t* room, Known* known) {
        Tiles::lay_out(c, x, from, rows, to, room, known);
        for (int64_t r = 0; r < rows; ++r, to += c.line)
            for (int64_t k = 0; k < c.depth; k += PackedW4::kEight) {
                bf16 of[PackedW4::kEight];
                std::memcpy(of, to + k, sizeof of);
                for (int i = 0; i < 4; ++i) to[k + i] = of[2 * i], to[k + 4 + i] = of[2 * i + 1];
            }
    }

    // w: of each group its scales, float32 [64], and its codes
    template <int kSome>
    __attribute__((noinline)) static void multiply(const uint8_t* w, const bf16* x, const Call& c, int64_t n, bool add,
                                                   uint32_t* to, Aside&) {
        alignas(64) float group[kSome * kColumns];
        const int rows = c.rows < kSome ? static_cast<int>(c.rows) : kSome;
        if (n == 0) std::memset(to, 0, sizeof group);
        for (int64_t k = 0, some; k < n; k += some) {
            some = n - k < c.group ? n - k : c.group;
            const int64_t lanes = (some + kStepOfTiles - 1) / kStepOfTiles * kTileLanes;
            const float* const scale = reinterpret_cast<const float*>(w);
            w += PackedW4::kRow;
            square<false, false, kSome / kTileRows, 2>(x + k, c.line / 2, w, kPanel, kTileLanes, group, kColumns, lanes);
            w += lanes * PackedW4::kRow;
            for (int v = 0; v < kColumns; v += kLanes) {
                const F by = load(scale + v);
                for (int r = 0; r < rows; ++r) {
                    float* const sum = reinterpret_cast<float*>(to) + r * kColumns + v;
                    store(sum, fma(load(group + r * kColumns + v), by, add || k > 0 ? load(sum) : F{}));
                }
            }
        }
    }
};

struct WeightByGroups : PackedW4 {
    __attribute__((noinline)) const uint8_t* panel(const Call&, int64_t p, int64_t first, int64_t n, uint8_t* to) const {
        alignas(64) uint16_t values[32];  // of a code in bfloat16, twice: of five bits that are looked up the last is another's
        for (int i = 0; i < 32; ++i) {
            const float value = static_cast<float>(i % 16 - 8);
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            values[i] = static_cast<uint16_t>(bits >> 16);
        }
        const __m512i table = _mm512_load_si512(values);
        const int64_t step = (group / 2 + 1) * kRow;
        const int shift = group == 64 ? 3 : 4;  // words of a group
        each(p, first, n, [&](int64_t j, U scale) __attribute__((always_inline)) {
            const F by = __builtin_convertvector(bit_cast<I>(scale), F);
            return [=](int64_t i, U words) __attribute__((always_inline)) {
                const int64_t of = i >> shift, k = i - (of << shift);
                uint8_t* const at = to + of * step + j * kDepth;
                if (k == 0) store(reinterpret_cast<float*>(at), by);
#pragma GCC unroll 4
                for (int h = 0; h < 4; ++h)
                    _mm512_storeu_si512(at + (1 + 4 * k + h) * kRow,
                                        _mm512_permutexvar_epi16(bit_cast<__m512i>(words >> 4 * h), table));
            };
        });
        const int64_t last = n % group, there = (last + kEight - 1) / kEight * kEight;
        const int64_t whole = (last + kStepOfTiles - 1) / kStepOfTiles * kStepOfTiles;
        if (there < whole)
            std::memset(to + n / group * step + kRow + there / 2 * kRow, 0, static_cast<size_t>((whole - there) / 2 * kRow));
        return to;
    }
};
#else
constexpr bool kByGroups = false;
struct Groups : Tiles {};
struct WeightByGroups : PackedW4 {};
#endif

struct Weight : PackedW4 {
    // [pair of inputs][64][2] of bfloat16, zeros up to a whole product of tiles
    __attribute__((noinline)) const uint8_t* panel(const Call&, int64_t p, int64_t first, int64_t n, uint8_t* to) const {
        each(p, first, n, [&](int64_t j, U scale) __attribute__((always_inline)) {
            const F by = __builtin_convertvector(bit_cast<I>(scale), F);
            return [=](int64_t i, U words) __attribute__((always_inline)) {
                const auto exact = [&](int shift) __attribute__((always_inline)) {
                    return bit_cast<U>(__builtin_convertvector(bit_cast<I>((words >> shift & 15u) - 8u), F) * by);
                };
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const int at = k % 2 * 16 + k / 2 * 4;
                    const U pair = exact(at) >> 16 | exact(at + 8);  // a small whole number has zeros in its lower half
                    std::memcpy(to + (4 * i + k) * kRow + j * kDepth, &pair, sizeof pair);
                }
            };
        });
        const int64_t there = (first + n + kEight - 1) / kEight * kEight - first;
        const int64_t whole = (n + kStepOfTiles - 1) / kStepOfTiles * kStepOfTiles;
        if (there < whole) std::memset(to + there / 2 * kRow, 0, static_cast<size_t>((whole - there) / 2 * kRow));
        return to;
    }
};

bool by_groups(const Call& c) { return kByGroups && c.x.dtype == DType::bf16 && c.rows <= Groups::kRows; }

Refusal describe(Call& c, PackedW4& w, View y, View x, View weight, View group_scale, View weight_scale, Optional bias,
                 Optional low, Optional up, Optional gate, Optional residual) {
    if (x.dtype > DType::bf16 || y.dtype != x.dtype) return "x: not float32, float16 or bfloat16, or not of y's dtype";
    if (Refusal why = describe_rows(c, y, x, weight_scale, bias, low, up, gate, residual)) return why;
    if (Refusal why = w.describe(c, weight, group_scale)) return why;
    c.group = w.group;
    if (by_groups(c))
        plan<Groups>(c, Groups::line(c), Groups::kChunk);
    else if (kTiles && x.dtype == DType::bf16)
        plan<Tiles>(c, Tiles::line(c), Tiles::kChunk, 2 * kBlockBytes);
    else if (kPairs<bf16> && x.dtype == DType::bf16)
        plan<Vectors<true>>(c, Vectors<true>::line(c), Vectors<true>::kChunk);
    else
        plan<Vectors<false>>(c, Vectors<false>::line(c), Vectors<false>::kChunk);
    c.panel_room = ((c.chunk + kStepOfTiles - 1) / kStepOfTiles * kStepOfTiles / 2 + (c.chunk + 63) / 64) * w.kRow;
    return nullptr;
}

int64_t bytes(Stream, View y, View x, View weight, View group_scale, View weight_scale, Optional bias, Optional low,
              Optional up, Optional gate, Optional residual, Text) {
    Call c{};
    PackedW4 w{};
    return describe(c, w, y, x, weight, group_scale, weight_scale, bias, low, up, gate, residual) ? 0 : scratch_of(c);
}

Refusal linear_w4a16(Stream stream, View y, View x, View weight, View group_scale, View weight_scale, Optional bias,
                     Optional low, Optional up, Optional gate, Optional residual, Text activation) {
    Call c{};
    PackedW4 w{};
    if (Refusal why = describe(c, w, y, x, weight, group_scale, weight_scale, bias, low, up, gate, residual)) return why;
    return for_value(Floats{}, y.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        if constexpr (decltype(tag)::value == DType::bf16) {
            if constexpr (kByGroups)
                if (by_groups(c)) return linear<Groups, T>(stream, c, Nowhere{}, WeightByGroups{w}, activation);
            if constexpr (kTiles) return linear<Tiles, T>(stream, c, Nowhere{}, Weight{w}, activation);
            if constexpr (kPairs<bf16>) return linear<Vectors<true>, T>(stream, c, Nowhere{}, Weight{w}, activation);
        }
        return linear<Vectors<false>, T>(stream, c, Nowhere{}, Weight{w}, activation);
    });
}

}  // namespace
}  // namespace dk

using dk::linear_w4a16;
DK_ENTRY_WITH_SCRATCH(linear_w4a16, "out x weight group_scale weight_scale bias low up gate residual activation", dk::bytes)
