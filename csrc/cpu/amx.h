// Matrix tiles: eight registers of 16 rows by 64 bytes. c += a b, where a's rows hold k, and b's rows k by fours (bytes) or
// pairs (bfloat16) of 16 columns, as packed weights, keys and values lie anyway. One product of tiles takes 16 cycles.
//
// Tiles 0-3 are a square of accumulators, 4 and 5 its rows, 6 and 7 its columns.
#pragma once

#include "simd.h"

namespace dk {
namespace {

constexpr int kTileRows = 16, kTileLanes = 16;

struct Nothing {
    DK_INLINE void operator()() const {}
};

#if defined(DK_EMULATE_TILES)  // in memory, for tests: any machine runs them, and a sanitizer sees what they read
constexpr bool kTiles = true;
thread_local char emulated[8][kTileRows][64];
DK_INLINE void tiles_begin() {}
DK_INLINE void tiles_end() {}
template <int kTile>
DK_INLINE void tile_load(const void* p, int64_t step) {
    for (int r = 0; r < kTileRows; ++r) std::memcpy(emulated[kTile][r], static_cast<const char*>(p) + r * step, 64);
}
template <int kTile>
DK_INLINE void tile_store(void* p, int64_t step) {
    for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char*>(p) + r * step, emulated[kTile][r], 64);
}
template <int kTile>
DK_INLINE void tile_zero() {
    std::memset(emulated[kTile], 0, sizeof emulated[kTile]);
}
template <bool kBytes, int kTo, int kA, int kB>
DK_INLINE void tile_dot() {
    for (int r = 0; r < kTileRows; ++r) {
        U sum = bit_cast<U>(load(reinterpret_cast<float*>(emulated[kTo][r])));
        for (int k = 0; k < kTileLanes; ++k) {
            const U b = bit_cast<U>(load(reinterpret_cast<float*>(emulated[kB][k])));
            uint32_t a;
            std::memcpy(&a, emulated[kA][r] + 4 * k, 4);
            if (kBytes)
                for (int i = 0; i < 32; i += 8) sum += (b >> i & 255u) * static_cast<uint32_t>(static_cast<int8_t>(a >> i));
            else
                sum = bit_cast<U>(bit_cast<F>(sum) + bit_cast<F>(b << 16) * bit_cast<F>(U{} + (a << 16)) +
                                  bit_cast<F>(b & 0xffff0000u) * bit_cast<F>(U{} + (a & 0xffff0000u)));
        }
        store(reinterpret_cast<float*>(emulated[kTo][r]), bit_cast<F>(sum));
    }
}
#elif defined(__AMX_TILE__)
constexpr bool kTiles = true;

// This thread's tiles, configured; what has released them again costs the system nothing to switch. (No destructor does it:
// objects must need nothing of C++'s exceptions.)
DK_INLINE void tiles_begin() {
    struct {
        uint8_t palette = 1, row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const whole;
    asm volatile("ldtilecfg %0" ::"m"(whole));
}
DK_INLINE void tiles_end() { asm volatile("tilerelease"); }

// Steps are in bytes. gcc 12's own intrinsics do not say that they read memory.
template <int kTile>
DK_INLINE void tile_load(const void* p, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(step), "i"(kTile) : "memory");
}
template <int kTile>
DK_INLINE void tile_store(void* p, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(step), "i"(kTile) : "memory");
}
template <int kTile>
DK_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <bool kBytes, int kTo, int kA, int kB>  // of i8 and u8, or of bfloat16
DK_INLINE void tile_dot() {
    if constexpr (kBytes)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}
#else
constexpr bool kTiles = false;
DK_INLINE void tiles_begin() {}
DK_INLINE void tiles_end() {}
template <int kTile>
DK_INLINE void tile_load(const void*, int64_t) {}
template <int kTile>
DK_INLINE void tile_store(void*, int64_t) {}
template <int kTile>
DK_INLINE void tile_zero() {}
template <bool kBytes, int kTo, int kA, int kB>
DK_INLINE void tile_dot() {}
#endif

// c[16 kTall][16 kWide] = (or +=) a b. k counts lanes, in whole tiles; steps count lanes from row to row, b_next from b's first
// tile of columns to its second. b's tiles are asked for kAhead steps ahead, where they come from far. aside() is called in
// every step: tiles are multiplied while the vector units do something else.
template <bool kBytes, bool kAdd, int kTall, int kWide, int kAhead = 0, class G = Nothing>
DK_INLINE void square(const void* a, int64_t a_step, const void* b, int64_t b_step, int64_t b_next, void* c, int64_t c_step,
                      int64_t k, G aside = {}) {
    const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
    char* const to = static_cast<char*>(c);
    const int64_t down = kTileRows * a_step * 4, along = kTileLanes * 4, c_down = kTileRows * c_step * 4;
    if constexpr (kAdd) {
        tile_load<0>(to, c_step * 4);
        if constexpr (kWide > 1) tile_load<1>(to + along, c_step * 4);
        if constexpr (kTall > 1) tile_load<2>(to + c_down, c_step * 4);
        if constexpr (kTall > 1 && kWide > 1) tile_load<3>(to + c_down + along, c_step * 4);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; i += kTileLanes, left += along, right += kTileRows * b_step * 4) {
        if constexpr (kAhead > 0)
            for (int64_t r = kAhead * kTileRows; r < (kAhead + 1) * kTileRows; ++r)
                prefetch(right + r * b_step * 4, 64 * kWide);
        tile_load<6>(right, b_step * 4);
        tile_load<4>(left, a_step * 4);
        tile_dot<kBytes, 0, 4, 6>();
        if constexpr (kWide > 1) tile_load<7>(right + b_next * 4, b_step * 4);
        if constexpr (kWide > 1) tile_dot<kBytes, 1, 4, 7>();
        if constexpr (kTall > 1) tile_load<5>(left + down, a_step * 4);
        if constexpr (kTall > 1) tile_dot<kBytes, 2, 5, 6>();
        if constexpr (kTall > 1 && kWide > 1) tile_dot<kBytes, 3, 5, 7>();
        aside();
    }
    tile_store<0>(to, c_step * 4);
    if constexpr (kWide > 1) tile_store<1>(to + along, c_step * 4);
    if constexpr (kTall > 1) tile_store<2>(to + c_down, c_step * 4);
    if constexpr (kTall > 1 && kWide > 1) tile_store<3>(to + c_down + along, c_step * 4);
}

}  // namespace
}  // namespace dk
