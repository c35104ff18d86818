// out[i] = whatever 4096 * rounds multiply-adds in registers come to: the peak of the instruction set in force
//
// Idea: two units of latency four are kept busy by eight chains, those of AVX-512's products, of up to eight cycles, by
// sixteen. A bf16 is widened from the first cache, as kernels do, or multiplied in pairs; an int8 product is what this rung has
// for it: four of u8 * i8 into i32, pairs into i16, or int32. Matrix tiles have four accumulators, as a kernel does.
// Takes: out float32 [items], an item a thread's; what = "f32", "bf16" or "int8". Not an op: the bench calls it.
// Floor: itself. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/roofline.cpp
#include "amx.h"
#include "parallel.h"
#include "simd.h"

namespace dk {
namespace {

constexpr int kProducts = 4096, kChains = kLanes == 16 ? 16 : 8;

float f32(int64_t rounds) {
    F sum[kChains];
    for (int k = 0; k < kChains; ++k) sum[k] = splat(static_cast<float>(k + 2));  // equal ones would be merged
    const F a = splat(0.9999f), b = splat(1e-4f);
    for (int64_t i = 0; i < rounds * (kProducts / kChains / kLanes); ++i)
#pragma GCC unroll 16
        for (int k = 0; k < kChains; ++k) sum[k] = fma(sum[k], a, b);
    F total = {};
#pragma GCC unroll 16
    for (int k = 0; k < kChains; ++k) total += sum[k];
    return total[0];
}

template <bool kBytes>
float tiles(int64_t rounds) {
    constexpr int kTileProducts = kTileRows * kTileLanes * kTileLanes * (kBytes ? 4 : 2);
    alignas(64) float ones[kTileRows * kTileLanes];
    for (float& x : ones) x = bit_cast<float>(kBytes ? 0x01010101u : 0x3f803f80u);
    tiles_begin();
    tile_load<4>(ones, 64), tile_load<5>(ones, 64), tile_load<6>(ones, 64), tile_load<7>(ones, 64);
    for (int64_t i = 0; i < rounds * kProducts / (4 * kTileProducts); ++i) {
        tile_dot<kBytes, 0, 4, 6>(), tile_dot<kBytes, 1, 4, 7>();
        tile_dot<kBytes, 2, 5, 6>(), tile_dot<kBytes, 3, 5, 7>();
    }
    tile_store<0>(ones, 64);
    tiles_end();
    return ones[0];
}

#if defined(__AVX512BF16__)  // pairs, without widening
float half(int64_t rounds) {
    __m512 sum[kChains];
    for (int k = 0; k < kChains; ++k) sum[k] = _mm512_set1_ps(static_cast<float>(k + 2));
    const __m512bh a = bit_cast<__m512bh>(U{} + 0x3f7f3f7fu), b = bit_cast<__m512bh>(U{} + 0x38d238d2u);
    for (int64_t i = 0; i < rounds * (kProducts / kChains / (2 * kLanes)); ++i)
#pragma GCC unroll 16
        for (int k = 0; k < kChains; ++k) sum[k] = _mm512_dpbf16_ps(sum[k], a, b);
    F total = {};
#pragma GCC unroll 16
    for (int k = 0; k < kChains; ++k) total += sum[k];
    return total[0];
}
#else
float half(int64_t rounds) {
    alignas(64) bf16 line[kChains * kLanes];
    for (int k = 0; k < kChains * kLanes; ++k) line[k].bits = static_cast<uint16_t>(0x3f80 + k);
    F sum[kChains] = {};
    const F a = splat(1e-4f);
    for (int64_t i = 0; i < rounds * (kProducts / kChains / kLanes); ++i) {
        asm volatile("" : "+m"(line));  // changed, for all that is known: widened anew
#pragma GCC unroll 16
        for (int k = 0; k < kChains; k += 2) {
            const Pair x = load_pair(line + k * kLanes);
            sum[k] = fma(x.lo, a, sum[k]), sum[k + 1] = fma(x.hi, a, sum[k + 1]);
        }
    }
    F total = {};
#pragma GCC unroll 16
    for (int k = 0; k < kChains; ++k) total += sum[k];
    return total[0];
}
#endif

float int8(int64_t rounds) {
    constexpr int kEach = 4 * kLanes;  // int8 of a vector
    alignas(64) int8_t line[kChains * kEach];
    std::memset(line, 3, sizeof line);
    I sum[kChains] = {};
#if defined(__AVX512VNNI__)
    const __m512i b = _mm512_set1_epi8(-2);
    const auto dot = [&](I s, I a) __attribute__((always_inline)) {
        return bit_cast<I>(_mm512_dpbusd_epi32(bit_cast<__m512i>(s), bit_cast<__m512i>(a), b));
    };
#elif defined(__AVX512BW__)
    const __m512i b = _mm512_set1_epi8(-2), one = _mm512_set1_epi16(1);
    const auto dot = [&](I s, I a) __attribute__((always_inline)) {
        const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(a), b);
        return s + bit_cast<I>(_mm512_madd_epi16(pairs, one));
    };
#elif defined(__AVX2__)
    const __m256i b = _mm256_set1_epi8(-2), one = _mm256_set1_epi16(1);
    const auto dot = [&](I s, I a) __attribute__((always_inline)) {
        const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(a), b);
        return s + bit_cast<I>(_mm256_madd_epi16(pairs, one));
    };
#else
    const auto dot = [&](I s, I a) __attribute__((always_inline)) {
        for (int shift = 0; shift < 32; shift += 8) s += (a << shift >> 24) * (I{} - 2);
        return s;
    };
#endif
    for (int64_t i = 0; i < rounds * (kProducts / kChains / kEach); ++i) {
        asm volatile("" : "+m"(line));
#pragma GCC unroll 16
        for (int k = 0; k < kChains; ++k) {
            I a;
            std::memcpy(&a, line + k * kEach, sizeof a);
            sum[k] = dot(sum[k], a);
        }
    }
    I total = {};
#pragma GCC unroll 16
    for (int k = 0; k < kChains; ++k) total += sum[k];
    return static_cast<float>(total[0]);
}

Refusal roofline(Stream, View out, int64_t rounds, Text what) {
    if (out.dtype != DType::f32 || out.ndim != 1 || !out.contiguous()) return "out: not contiguous float32 [items]";
    float (*const run)(int64_t) = what == "f32"    ? f32
                                  : what == "bf16" ? (kTiles ? tiles<false> : half)
                                  : what == "int8" ? (kTiles ? tiles<true> : int8)
                                                   : nullptr;
    if (!run) return "what: not f32, bf16 or int8";
    float* const to = static_cast<float*>(out.data);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = run(rounds);
    };
    parallel_for(out.numel(), 1, body);
    return nullptr;
}

}  // namespace
}  // namespace dk

using dk::roofline;
DK_ENTRY(roofline, "out rounds what")
