// What attention's forward and backward share on a CPU: packing, and the product that every pass over the scores is.
//
// Queries are taken kRows at a time, keys kKeys at a time: their scores stay in the first cache, and a chunk's keys and
// values, widened and packed once, in the second.
#pragma once

#include "../attention.h"
#include "../dispatch.h"
#include "amx.h"
#include "pairs.h"
#include "parallel.h"

namespace dk {
namespace {

constexpr int kRows = kTiles ? 2 * kTileRows : 24;  // divisible by every tile's rows
constexpr int kKeys = 256;                          // of a chunk
constexpr int kPanel = 64;                          // keys side by side in packed k
constexpr int kLine = kKeys + 16;                   // floats from row to row of a block of scores, or queries: no power of two
constexpr float kLog2e = 1.4426950408889634f;

constexpr int kTileVectors = kLanes == 16 ? 4 : 3;
constexpr int tile_rows(int vectors) {  // as many accumulators as the registers hold beside the operands
    if (kLanes == 16) return vectors == 1 ? 12 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
    return vectors == 1 ? 12 : vectors == 2 ? 6 : 4;
}

DK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The same as pairs.h for 8-bit codes, four in a lane: k's + 128 by q's, less 128 times the sum of q's. Elsewhere they are
// widened: sums of 256 products are exact in float32 too.
#if defined(__AVX512VNNI__) || (defined(__AVX512F__) && defined(DK_EMULATE_DOTS))
constexpr bool kQuads = true;
typedef U Products;
DK_INLINE F load_quads(const void* p, int64_t n) {
    return bit_cast<F>(_mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1 : ~0ull, p));
}
DK_INLINE F whole(U sum, int32_t less) { return __builtin_convertvector(bit_cast<I>(sum) - less, F); }
#else
constexpr bool kQuads = false;
typedef F Products;
DK_INLINE F load_quads(const void*, int64_t) { return F{}; }
DK_INLINE F whole(F sum, int32_t) { return sum; }
DK_INLINE F dot_codes(F q, F k, F sum) { return fma(q, k, sum); }
#endif
#if defined(__AVX512VNNI__)
DK_INLINE U dot_codes(U q, U k, U sum) {
    return bit_cast<U>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(k), bit_cast<__m512i>(q)));
}
#elif defined(__AVX512F__) && defined(DK_EMULATE_DOTS)
DK_INLINE U dot_codes(U q, U k, U sum) {
    for (int i = 0; i < 32; i += 8) sum += (k >> i & 255u) * bit_cast<U>(bit_cast<I>(q << (24 - i)) >> 24);
    return sum;
}
#endif
template <class T>
constexpr bool kDots = kPairs<T> || (sizeof(T) == 1 && kQuads);
template <class T, bool kDot = kDots<T>>
constexpr int kInLane = !kDot ? 1 : 4 / static_cast<int>(sizeof(T));  // elements in a lane
template <bool kDot>
constexpr int kDepth = kTiles && kDot ? kTileLanes : 1;  // lanes of a product's depth are zeros up to a multiple
template <class V>
DK_INLINE V splat_bits(const float* x) {
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bit_cast<V>(I{} + bits);
}

// How a tile sums and what it stores: lanes of floats, or of pairs, as they come.
template <bool kDot>
struct Plain {
    static constexpr bool kFinishes = false;
    typedef F Sum;
    DK_INLINE Plain at(int64_t, int64_t) const { return {}; }
    DK_INLINE F step(F left, F right, F sum) const { return kDot ? dot(left, right, sum) : fma(left, right, sum); }
    DK_INLINE F end(F sum, int, int) const { return sum; }
};

// c[r][...] = (or +=) sum over k of a(r, k) b[k][...]: a(r, k) is a[r kLine + k], or turned a[k kLine + r].
template <int kTall, int kWide, bool kTurned, bool kAdd, class S>
__attribute__((noinline)) void tile(const float* a, const float* b, int64_t b_step, float* c, int64_t c_step, int64_t depth,
                                    S how) {
    typedef typename S::Sum V;  // what sums are is what operands are: gcc copies registers where their types differ
    V sum[kTall][kWide] = {};
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; ++k) {
        V right[kWide];
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) std::memcpy(&right[v], b + v * kLanes, sizeof right[v]);
#pragma GCC unroll 12
        for (int r = 0; r < kTall; ++r) {
            const V left = splat_bits<V>(a + (kTurned ? r : r * kLine));
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) sum[r][v] = how.step(left, right[v], sum[r][v]);
        }
        a += kTurned ? kLine : 1, b += b_step;
    }
#if defined(__AVX2__)
    if constexpr (S::kFinishes)  // or gcc stores each sum in every step, for what is done with it after the last
#pragma GCC unroll 12
        for (int r = 0; r < kTall; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) asm("" : "+v"(sum[r][v]));
#endif
#pragma GCC unroll 12
    for (int r = 0; r < kTall; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) {
            float* const to = c + r * c_step + v * kLanes;
            const F found = how.end(sum[r][v], r, v);
            store(to, kAdd ? load(to) + found : found);
        }
}

template <int kWide, bool kTurned, bool kAdd, class S>
void tall(const float* a, int64_t rows, const float* b, int64_t b_step, float* c, int64_t c_step, int64_t depth, S how) {
    constexpr int kTall = tile_rows(kWide);
    int64_t r = 0;
    const auto some = [&](auto n) {
        for (; r + n.value <= rows; r += n.value)
            tile<n.value, kWide, kTurned, kAdd>(a + r * (kTurned ? 1 : kLine), b, b_step, c + r * c_step, c_step, depth,
                                                how.at(r, 0));
    };
    some(std::integral_constant<int, kTall>{});
    some(std::integral_constant<int, 4>{});
    some(std::integral_constant<int, 2>{});
    some(std::integral_constant<int, 1>{});
}

// The same in matrix tiles: whole ones of rows and of depth, b's one behind the other, b_next from column to column.
template <bool kBytes, bool kAdd, int kTall>
__attribute__((noinline)) void tiled(const float* a, const float* b, int64_t b_next, float* c, int64_t c_step, int64_t wide,
                                     int64_t depth) {
    for (; wide > 1; wide -= 2, b += 2 * b_next, c += 2 * kLanes)
        square<kBytes, kAdd, kTall, 2>(a, kLine, b, kTileLanes, b_next, c, c_step, depth);
    if (wide > 0) square<kBytes, kAdd, kTall, 1>(a, kLine, b, kTileLanes, b_next, c, c_step, depth);
}
template <bool kBytes, bool kAdd>
void tiled(const float* a, int64_t rows, const float* b, int64_t b_next, float* c, int64_t c_step, int64_t wide,
           int64_t depth) {
    if (rows > kTileRows) return tiled<kBytes, kAdd, 2>(a, b, b_next, c, c_step, wide, depth);
    tiled<kBytes, kAdd, 1>(a, b, b_next, c, c_step, wide, depth);
}

// `wide` vectors of columns.
template <bool kTurned, bool kAdd, class S = Plain<false>>
void product(const float* a, int64_t rows, const float* b, int64_t b_step, float* c, int64_t c_step, int64_t wide,
             int64_t depth, S how = {}) {
    for (int64_t done = 0; wide > 0;) {
        int64_t w = wide < kTileVectors ? wide : kTileVectors;
        if (wide == kTileVectors + 1 || wide == kTileVectors + 2) w = (wide + 1) / 2;  // 5 as 3 and 2
        if (w == 1) tall<1, kTurned, kAdd>(a, rows, b, b_step, c, c_step, depth, how.at(0, done));
        if (w == 2) tall<2, kTurned, kAdd>(a, rows, b, b_step, c, c_step, depth, how.at(0, done));
        if (w == 3) tall<3, kTurned, kAdd>(a, rows, b, b_step, c, c_step, depth, how.at(0, done));
        if constexpr (kTileVectors > 3)
            if (w == 4) tall<4, kTurned, kAdd>(a, rows, b, b_step, c, c_step, depth, how.at(0, done));
        b += w * kLanes, c += w * kLanes, wide -= w, done += w * kLanes;
    }
}

// 2^x for x not above 0 by much; 0 below -126: a subnormal would cost a hundred cycles wherever it is used. 1.1 ulp; where it
// is rounded to bfloat16 anyway, 1e-7: their sum is not.
template <bool kShort = false>
DK_INLINE F exp2(F x) {
#if defined(__AVX512F__)
    const F r = _mm512_reduce_ps(x, 9);  // x - floor(x)
#elif defined(__AVX2__)
    const F n = _mm256_floor_ps(x), r = x - n;
#else
    const F magic = splat(0x1.8p23f), bounded = choose(x < -127.0f, splat(-127.0f), x), near = (bounded + magic) - magic,
            n = choose(near > bounded, near - 1, near), r = bounded - n;
#endif
    F p = splat(kShort ? 0x1.e974fep-10f : 0x1.c723a4p-13f);
    if constexpr (kShort)
        for (const float c : {0x1.277854p-7f, 0x1.c91ce6p-5f, 0x1.ebdb56p-3f, 0x1.62e4bap-1f, 1.0f}) p = fma(p, r, splat(c));
    else
        for (const float c : {0x1.461914p-10f, 0x1.3d283ap-7f, 0x1.c684c4p-5f, 0x1.ebfda2p-3f, 0x1.62e42ep-1f, 1.0f})
            p = fma(p, r, splat(c));
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), p, x);
#else
    const I whole = __builtin_convertvector(choose(x >= -126.0f, n, F{}), I);
    return choose(x < -126.0f, F{}, bit_cast<F>(bit_cast<I>(p) + (whole << 23)));
#endif
}

constexpr int kChains = kLanes == 16 ? 4 : 1;  // one chain waits for each of its own results; more want registers

[[maybe_unused]] __attribute__((noinline)) float largest_of(const float* s, int64_t width) {
    F most[kChains];
    for (F& m : most) m = splat(-__builtin_inff());
    int64_t j = 0;
    for (; j + kChains * kLanes <= width; j += kChains * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) most[i] = larger(load(s + j + i * kLanes), most[i]);
    for (; j < width; j += kLanes) most[0] = larger(load(s + j), most[0]);
#pragma GCC unroll 4
    for (int i = 1; i < kChains; ++i) most[0] = larger(most[0], most[i]);
    return largest(most[0]);
}

// s = exp2(s factor - base), and their sum. As pairs they take the first half of the memory.
template <bool kDot>
__attribute__((noinline)) float exponentials_of(float* s, int64_t width, float factor, float base) {
    const F scale = splat(factor), less = splat(-base);
    const auto exponential = [&](int64_t at) __attribute__((always_inline)) {
        const F p = exp2<kDot>(fma(load(s + at), scale, less));
        if constexpr (kDot) {
            const H h = halves(p);
            std::memcpy(reinterpret_cast<bf16*>(s) + at, &h, sizeof h);
        } else {
            store(s + at, p);
        }
        return p;
    };
    F sums[kChains] = {};
    int64_t j = 0;
    for (; j + kChains * kLanes <= width; j += kChains * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) sums[i] += exponential(j + i * kLanes);
    for (; j < width; j += kLanes) sums[0] += exponential(j);
#pragma GCC unroll 4
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    return sum(sums[0]);
}

template <class T>
DK_INLINE F some(const T* p, int64_t step, int n) {  // n elements, the rest zero
    return step == 1 ? n >= kLanes ? load(p) : load(p, n) : gather(p, step, n < kLanes ? n : kLanes);
}

DK_INLINE F some(const int8_t* p, int64_t step, int n) {  // codes, widened
    int8_t codes[kLanes] = {};
    if (step == 1 && n >= kLanes)
        std::memcpy(codes, p, sizeof codes);
    else
        for (int i = 0; i < n && i < kLanes; ++i) codes[i] = p[i * step];
#if defined(__AVX512F__)
    __m128i lanes;
    std::memcpy(&lanes, codes, sizeof lanes);
    return __builtin_convertvector(bit_cast<I>(_mm512_cvtepi8_epi32(lanes)), F);
#elif defined(__AVX2__)
    __m128i lanes{};
    std::memcpy(&lanes, codes, sizeof codes);
    return __builtin_convertvector(bit_cast<I>(_mm256_cvtepi8_epi32(lanes)), F);
#else
    F found;
    for (int i = 0; i < kLanes; ++i) found[i] = codes[i];
    return found;
#endif
}

// Tokens are often a page apart, where no prefetcher follows.
template <class T>
DK_INLINE void fetch(const T* token, int64_t token_step, int64_t tokens, int64_t ahead, int64_t elements) {
    if (ahead < tokens) prefetch(token + ahead * token_step, elements * sizeof(T));
}

// The next lanes of a row that has n elements more: widened, or as pairs or quads; zero beyond.
template <bool kDot, class T>
DK_INLINE F lanes(const T* p, int64_t step, int64_t n) {
    if constexpr (kDot) {
        constexpr int64_t all = kInLane<T, true> * kLanes;
        const auto from = [&](const T* at, int64_t left) {
            return sizeof(T) == 1 ? load_quads(at, left) : load_pairs(at, left);
        };
        if (step == 1) return from(p, n);
        T near[all] = {};
        for (int64_t i = 0; i < all && i < n; ++i) near[i] = p[i * step];
        return from(near, all);
    } else {
        return some(p, step, static_cast<int>(n));
    }
}

// Rows of a tensor [B, S, H, D]: to[token][lane of columns], whole vectors.
template <bool kDot, class T>
void pack_rows(const T* from, int64_t token_step, int64_t step, int64_t tokens, int64_t columns, float* to, int64_t to_step) {
    constexpr int64_t in_lane = kInLane<T, kDot>;
    for (int64_t t = 0; t < tokens; ++t) {
        fetch(from + t * token_step, token_step, tokens - t, 16, columns * step);
        for (int64_t i = 0; i < columns; i += in_lane * kLanes)
            store(to + t * to_step + i / in_lane, lanes<kDot>(from + t * token_step + i * step, step, columns - i));
    }
}

// The same with a pair of tokens in a lane: to[pair of tokens][column], or [vector of columns][pair of tokens][column].
template <class T>
void pack_pairs(const T* from, int64_t token_step, int64_t step, int64_t tokens, int64_t columns, float* to, int64_t to_step,
                int64_t to_next) {
    for (int64_t t = 0; t < tokens; t += 2) {
        fetch(from + t * token_step, token_step, tokens - t, 16, columns * step);
        if (t + 1 < tokens) fetch(from + (t + 1) * token_step, token_step, tokens - t - 1, 16, columns * step);
        for (int64_t i = 0; i < columns; i += kLanes) {
            const T* const p = from + t * token_step + i * step;
            const int n = static_cast<int>(columns - i);
            const U even = bit_cast<U>(some(p, step, n)),  // a bfloat16 is a float's upper half
                odd = t + 1 < tokens ? bit_cast<U>(some(p + token_step, step, n)) : U{};
            store(to + t / 2 * to_step + i / kLanes * to_next, bit_cast<F>((even >> 16) | odd));
        }
    }
    for (int64_t pair = (tokens + 1) / 2; pair % kDepth<true>; ++pair)
        for (int64_t i = 0; i < columns; i += kLanes) store(to + pair * to_step + i / kLanes * to_next, F{});
}

// Rows turned: panels of kPanel tokens, to[panel][lane of columns][token]; whole vectors, the last token where there are no
// more. Of codes in quads code + 128.
template <bool kDot, int kPanel = dk::kPanel, class T>
void pack_turned(const T* from, int64_t token_step, int64_t step, int64_t tokens, int64_t columns, float* to) {
    constexpr int64_t in_lane = kInLane<T, kDot>;
    const int64_t all = round_up((columns + in_lane - 1) / in_lane, kDepth<kDot>);
    for (int64_t t = 0; t < tokens; t += kLanes) {
        float* const panel = to + t / kPanel * kPanel * all + t % kPanel;
        const int here = static_cast<int>(tokens - t < kLanes ? tokens - t : kLanes);
        for (int r = 0; r < here; ++r) fetch(from + (t + r) * token_step, token_step, tokens - t - r, kLanes, columns * step);
        for (int64_t i = 0; i < all; i += kLanes) {
            const int wide = static_cast<int>(all - i < kLanes ? all - i : kLanes);
            F square[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) {
                const T* const row = from + (t + (r < here ? r : here - 1)) * token_step;
                square[r] = lanes<kDot>(row + i * in_lane * step, step, columns - i * in_lane);
                if constexpr (in_lane == 4) square[r] = bit_cast<F>(bit_cast<U>(square[r]) ^ 0x80808080u);
            }
            turn(square);
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                if (r < wide) store(panel + (i + r) * kPanel, square[r]);
        }
    }
}

// Keys from `seen` on are none.
DK_INLINE void hide(float* s, int64_t seen, int64_t width) {
    for (; seen < width && seen % kLanes; ++seen) s[seen] = -__builtin_inff();
    for (; seen < width; seen += kLanes) store(s + seen, splat(-__builtin_inff()));
}

// What is added to scores, and what hides them, bit by bit.
struct Masks {
    Lay bias, mask;

    explicit operator bool() const { return bias.dtype != DType::other || mask.dtype != DType::other; }

    // s[j] = s[j] factor + bias unit, or -inf, for `keys` keys from `first` on; `line` is as long as s.
    void apply(int64_t sample, int64_t head, int64_t query, int64_t first, int64_t width, int64_t keys, float factor,
               float unit, float* s, float* line) const {
        const auto at = [&](const Lay& l) { return sample * l.at[0] + head * l.at[1] + query * l.at[2] + first * l.at[3]; };
        if (bias.dtype == DType::other)
            for (int64_t j = 0; j < width; j += kLanes) store(line + j, F{});
        if (bias.dtype == DType::f32) widen_line(static_cast<const float*>(bias.data) + at(bias), bias.at[3], keys, unit, line);
        if (bias.dtype == DType::f16) widen_line(static_cast<const f16*>(bias.data) + at(bias), bias.at[3], keys, unit, line);
        if (bias.dtype == DType::bf16) widen_line(static_cast<const bf16*>(bias.data) + at(bias), bias.at[3], keys, unit, line);
        if (mask.dtype != DType::other) {
            const uint8_t* const seen = static_cast<const uint8_t*>(mask.data) + at(mask);
            for (int64_t j = 0; j < keys; ++j) line[j] = seen[j * mask.at[3]] ? line[j] : -__builtin_inff();
        }
        for (int64_t j = 0; j < width; j += kLanes) {
            const F more = load(line + j), x = fma(load(s + j), splat(factor), more);
            store(s + j, choose(more == -__builtin_inff(), more, x));
        }
    }

    template <class T>
    static void widen_line(const T* from, int64_t step, int64_t keys, float unit, float* to) {
        for (int64_t j = 0; j < keys; j += kLanes)
            store(to + j, unit * some(from + j * step, step, static_cast<int>(keys - j < kLanes ? keys - j : kLanes)));
    }
};

}  // namespace
}  // namespace dk
