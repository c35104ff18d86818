// Attention's forward pass on a CPU, of q and k as they are or as 8-bit codes: see attention_forward.cpp, attention_int8.cpp.
#pragma once

#include "attention.h"

namespace dk {
namespace {

struct Call {
    Attention a;
    Lay q_scale, k_scale;  // of codes: [B, S, H]
    void* o;               // [B, Sq, H, Dv]
    float* lse;            // [B, H, Sq]
    int64_t wide;          // Dv, in whole vectors
};

// How products of codes are summed, and stored as scores in units of log2: exact sums, less what k's 128 added, times k's
// scale, times q's.
struct Coded {
    const float *row, *column;  // q's scales, times all that is scaled by; k's
    const int32_t* less;        // 128 times the sum of a query's codes

    DK_INLINE Coded at(int64_t r, int64_t c) const { return {row + r, column + c, less + r}; }
    static constexpr bool kFinishes = true;
    typedef Products Sum;
    DK_INLINE Products step(Products left, Products right, Products sum) const { return dot_codes(left, right, sum); }
    DK_INLINE F end(Products sum, int r, int v) const {
        return whole(sum, less[r]) * load(column + v * kLanes) * splat(row[r]);
    }
};

// One head's rows of queries: of all heads that share a head of k, v, one after the other.
struct Range {
    int64_t sample, kv_head, begin, end;  // row = head in the group * queries + query
};

// Who does what: a slot is a thread, or stands for one. Rows are cut by the number of threads, results are not.
struct Share {
    int64_t slots, pieces, rows;  // pieces of `rows` rows in each sample and head of k, v

    explicit Share(const Attention& a, int64_t rows_of_a_head) {
        const int64_t threads = dk_parallel_threads(), pairs = a.samples * a.kv_heads;
        const int64_t most = (rows_of_a_head + 4 * kRows - 1) / (4 * kRows),
                      wanted = pairs ? (4 * threads + pairs - 1) / pairs : 1;
        const int64_t least = (rows_of_a_head + 42 * kRows - 1) / (42 * kRows);
        pieces = most < 1 ? 1 : wanted < least ? least : wanted < most ? wanted : most;
        rows = round_up((rows_of_a_head + pieces - 1) / pieces, kRows);
        slots = pairs * pieces < threads ? pairs * pieces : threads;
    }
    Range at(const Attention& a, int64_t item) const {
        const int64_t pairs = a.samples * a.kv_heads, pair = item % pairs, begin = item / pairs * rows;
        return {pair / a.kv_heads, pair % a.kv_heads, begin, begin + rows};
    }
};

// One slot's memory.
struct Room {
    float *k, *v, *scores, *q, *line, *o, *top, *total, *block, *q_scale, *k_scale;
    int32_t* less;

    static int64_t slack(int64_t rows) { return round_up(rows, kLanes) + kRows + kLanes; }  // a block is of whole vectors
    static int64_t floats(const Attention& a, int64_t rows) {
        return kKeys * (round_up(a.d, kTileLanes) + round_up(a.dv, kLanes)) + kRows * kLine + kLine +
               4 * round_up(kRows, kLanes) + 2 * round_up(slack(rows), kLanes) + rows * (kLine + round_up(a.dv, kLanes)) +
               2 * round_up(rows, kLanes) + kKeys;
    }
    Room(float* p, const Call& c, int64_t rows) {
        const auto take = [&](int64_t n) {
            float* const here = p;
            p += n;
            return here;
        };
        k = take(kKeys * round_up(c.a.d, kTileLanes)), v = take(kKeys * c.wide), scores = take(kRows * kLine),
        q = take(rows * kLine);
        line = take(kLine), block = take(4 * round_up(kRows, kLanes)), o = take(rows * c.wide),
        top = take(round_up(slack(rows), kLanes));
        total = take(round_up(slack(rows), kLanes));
        q_scale = take(round_up(rows, kLanes)), k_scale = take(kKeys);
        less = reinterpret_cast<int32_t*>(take(round_up(rows, kLanes)));
    }
};

constexpr float kSlack = 8;  // a row is rescaled when its largest score has grown by more, in units of log2
constexpr int kSlots = (kRows + kLanes - 1) / kLanes * kLanes;

// A block's scores become their exponentials, `width` of them in a row. What is gathered so far is rescaled: top (in units of
// log2), total and o, by row. Every row's largest score comes first, then every row's exponentials: within one row each step
// would wait for the one before.
// A rounding of s factor - top is a factor of all of a row; where scores are so large that it could take the row out of range,
// they are scaled first, and the largest one's difference is exactly 0.
template <bool kDot>
void exponentials(float* scores, int64_t rows, int64_t width, float factor, float* top, float* total, float* o, int64_t wide,
                  float* rows_of_4) {
    float *const highest = rows_of_4, *const kept = highest + kSlots, *const base = kept + kSlots, *const sums = base + kSlots;
    const float inf = __builtin_inff();
    for (int r = 0; r < kSlots; ++r) highest[r] = -inf, sums[r] = 0;  // beyond are the next block's rows: nothing new there
    for (int64_t r = 0; r < rows; ++r) highest[r] = largest_of(scores + r * kLine, width);
    I far{}, moved{};
    for (int i = 0; i < kSlots; i += kLanes) {
        const F h = load(highest + i) * factor, before = load(top + i), next = choose(h > before + kSlack, h, before);
        const F from = choose(next == splat(-inf), F{}, next), k = exp2(before - from);
        far |= (h > 0x1p24f) | ((h < -0x1p24f) & (h > -inf)), moved |= k != splat(1);
        store(top + i, next), store(base + i, from), store(kept + i, k);
    }
    if (any(far)) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < width; j += kLanes) store(scores + r * kLine + j, factor * load(scores + r * kLine + j));
        factor = 1;
    }
    for (int64_t r = 0; r < rows; ++r) sums[r] = exponentials_of<kDot>(scores + r * kLine, width, factor, base[r]);
    for (int i = 0; i < kSlots; i += kLanes) store(total + i, fma(load(total + i), load(kept + i), load(sums + i)));
    if (any(moved))
        for (int64_t r = 0; r < rows; ++r)
            if (kept[r] != 1)
                for (int64_t i = 0; i < wide; i += kLanes) store(o + r * wide + i, kept[r] * load(o + r * wide + i));
}

// The rows of one item, and where its operands are.
template <class Q, class T>
struct Work {
    Range range;
    Sequence s;
    int64_t count = 0, reach = 0;  // rows; keys that some row sees
    const Q *q, *k;
    const T* v;

    Work(const Attention& a, const Range& r) : range(r), s(a.sequence(r.sample)) {
        const int64_t all = a.group() * s.queries;
        if (range.end > all) range.end = all;
        count = range.end - range.begin;
        q = static_cast<const Q*>(a.q.data) + s.q_sample * a.q.at[0] + s.q_first * a.q.at[1];
        k = static_cast<const Q*>(a.k.data) + s.k_sample * a.k.at[0] + s.k_first * a.k.at[1] + r.kv_head * a.k.at[2];
        v = static_cast<const T*>(a.v.data) + s.k_sample * a.v.at[0] + s.k_first * a.v.at[1] + r.kv_head * a.v.at[2];
        if (a.causal == Causal::none)
            reach = s.keys;
        else
            for (int64_t row = range.begin; row < range.end; ++row) reach = max(reach, a.seen(s, row % s.queries));
    }
    static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
    const Q* query(const Attention& a, int64_t row) const {
        return q + row % s.queries * a.q.at[1] + (range.kv_head * a.group() + row / s.queries) * a.q.at[2];
    }
};

// What is packed next is fetched while this is computed: a token is often a page from the last, where no prefetcher follows.
template <class Q, class T>
struct Ahead {
    const Q* k;
    const T* v;
    const Q* q;
    int64_t keys, queries, rows;  // q's only with the next item

    DK_INLINE void fetch(const Attention& a, int64_t row, int64_t n) const {  // the part of n of the rows
        for (int64_t t = row * keys / rows; t < (row + n) * keys / rows; ++t) {
            prefetch(k + t * a.k.at[1], a.d * sizeof(Q));
            prefetch(v + t * a.v.at[1], a.dv * sizeof(T));
        }
        for (int64_t t = row * queries / rows; t < (row + n) * queries / rows; ++t)
            prefetch(q + t * a.q.at[1], a.d * sizeof(Q));
    }
};

// Of n rows of one head from `row` on, which are the item's, and packed, from `at` on: q's scales with all that scores are
// scaled by, and 128 times the sums of their codes.
template <class T>
void scales(const Call& c, const Work<int8_t, T>& w, int64_t row, int64_t n, int64_t at, const Room& room) {
    const Attention& a = c.a;
    const Sequence& s = w.s;
    const int64_t head = w.range.kv_head * a.group() + row / s.queries, token = s.q_first + row % s.queries;
    const float* const scale = static_cast<const float*>(c.q_scale.data) + s.q_sample * c.q_scale.at[0] +
                               token * c.q_scale.at[1] + head * c.q_scale.at[2];
    for (int64_t r = at; r < at + n; ++r) room.q_scale[r] = scale[(r - at) * c.q_scale.at[1]] * (a.scale * kLog2e);
    for (int64_t r = at; r < at + n && kQuads; ++r) {
        Products total{};
        for (int64_t i = 0; i < a.d; i += 4 * kLanes)
            total =
                dot_codes(bit_cast<Products>(load(room.q + r * kLine + i / 4)), bit_cast<Products>(U{} + 0x01010101u), total);
        room.less[r] = 128 * static_cast<int32_t>(sum(whole(total, 0)));
    }
}
// Of a chunk's keys; 0 behind them, which nothing sees.
template <class T>
void scales(const Call& c, const Work<int8_t, T>& w, int64_t first, int64_t keys, const Room& room) {
    const Sequence& s = w.s;
    const float* const scale = static_cast<const float*>(c.k_scale.data) + s.k_sample * c.k_scale.at[0] +
                               (s.k_first + first) * c.k_scale.at[1] + w.range.kv_head * c.k_scale.at[2];
    for (int64_t j = 0; j < kKeys; ++j) room.k_scale[j] = j < keys ? scale[j * c.k_scale.at[1]] : 0;
}

template <class S>
DK_INLINE S how_of(const Room& room, int64_t row) {
    if constexpr (std::is_same_v<S, Coded>) return {room.q_scale + row, room.k_scale, room.less + row};
    return {};
}

// What matrix tiles leave of codes' products becomes scores.
[[maybe_unused]] __attribute__((noinline)) void scaled(float* scores, int64_t rows, int64_t width, Coded how) {
    for (int64_t r = 0; r < rows; ++r, scores += kLine, how = how.at(1, 0))
        for (int64_t j = 0; j < width; j += kLanes)
            store(scores + j, how.at(0, j).end(bit_cast<Coded::Sum>(load(scores + j)), 0, 0));
}

template <class Q, class T>
void run(const Call& c, const Work<Q, T>& w, const Work<Q, T>* next, int64_t most_rows, float* memory) {
    constexpr bool kCoded = sizeof(Q) == 1;
    constexpr bool kTiledScores = kTiles && kDots<Q>, kTiledValues = kTiles && kDots<T>;
    const Attention& a = c.a;
    const Sequence& s = w.s;
    const int64_t depth = round_up((a.d + kInLane<Q> - 1) / kInLane<Q>, kDepth<kDots<Q>>);
    const Room room(memory, c, most_rows);
    if constexpr (kTiledScores || kTiledValues) tiles_begin();
    for (int64_t i = 0; i < w.count * c.wide; i += kLanes) store(room.o + i, F{});
    for (int64_t i = 0; i < w.count + kRows + kLanes; ++i) room.top[i] = -__builtin_inff(), room.total[i] = 0;
    const Masks masks{a.bias, a.mask};
    const float factor = kCoded ? 1 : a.scale * kLog2e;  // codes' scores have it already
    const bool plain = !masks && factor > 0;             // the scores' maximum is that of the products
    for (int64_t at = 0, n; at < w.count; at += n) {     // runs of queries of one head
        const int64_t row = w.range.begin + at, rest = s.queries - row % s.queries;
        n = rest < w.count - at ? rest : w.count - at;
        pack_rows<kDots<Q>>(w.query(a, row), a.q.at[1], a.q.at[3], n, a.d, room.q + at * kLine, kLine);
        if constexpr (kCoded) scales(c, w, row, n, at, room);
    }
    for (int64_t first = 0; first < w.reach; first += kKeys) {
        const int64_t keys = w.reach - first < kKeys ? w.reach - first : kKeys, after = w.reach - first - keys;
        pack_turned<kDots<Q>, kTiledScores ? kTileLanes : kPanel>(w.k + first * a.k.at[1], a.k.at[1], a.k.at[3], keys, a.d,
                                                                  room.k);
        if constexpr (kCoded) scales(c, w, first, keys, room);
        if constexpr (kDots<T>)
            pack_pairs(w.v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v, kTiledValues ? kTileLanes : c.wide,
                       kTiledValues ? kTileLanes * kKeys / 2 : kLanes);
        else
            pack_rows<false>(w.v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v, c.wide);
        Ahead<Q, T> ahead{w.k + (first + keys) * a.k.at[1],
                          w.v + (first + keys) * a.v.at[1],
                          nullptr,
                          after < kKeys ? after : kKeys,
                          0,
                          w.count};
        if (after == 0 && next && next->count > 0)
            ahead = {next->k,     next->v, next->query(a, next->range.begin), next->reach < kKeys ? next->reach : kKeys,
                     next->count, w.count};
        for (int64_t r0 = 0; r0 < w.count; r0 += kRows) {
            const int64_t rows = w.count - r0 < kRows ? w.count - r0 : kRows;
            int64_t seen[kRows], here = 0;
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t n = a.causal == Causal::none ? keys : a.seen(s, (w.range.begin + r0 + r) % s.queries) - first;
                seen[r] = n < 0 ? 0 : n < keys ? n : keys;
                here = seen[r] > here ? seen[r] : here;
            }
            if (here == 0) continue;
            const int64_t width = round_up(here, kTiledScores || kTiledValues ? 2 * kTileLanes : kLanes);
            const auto how = how_of<std::conditional_t<kCoded, Coded, Plain<kDots<Q>>>>(room, r0);
            if constexpr (kTiledScores)
                tiled<kCoded, false>(room.q + r0 * kLine, rows, room.k, kTileLanes * depth, room.scores, kLine, width / kLanes,
                                     depth);
            else
                for (int64_t j = 0; j < width; j += kPanel)
                    product<false, false>(room.q + r0 * kLine, rows, room.k + j * depth, kPanel, room.scores + j, kLine,
                                          (width - j < kPanel ? width - j : kPanel) / kLanes, depth, how.at(0, j));
            if constexpr (kCoded && kTiledScores) scaled(room.scores, rows, width, how);
            ahead.fetch(a, r0, rows);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t row = w.range.begin + r0 + r;
                float* const scores = room.scores + r * kLine;
                if (!plain) {
                    const int64_t head = w.range.kv_head * a.group() + row / s.queries;
                    masks.apply(w.range.sample, head, row % s.queries, first, width, here, factor, kLog2e, scores, room.line);
                }
                hide(scores, seen[r], width);
            }
            exponentials<kDots<T>>(room.scores, rows, width, plain ? factor : 1, room.top + r0, room.total + r0,
                                   room.o + r0 * c.wide, c.wide, room.block);
            if constexpr (kTiledValues)
                tiled<false, true>(room.scores, rows, room.v, kTileLanes * kKeys / 2, room.o + r0 * c.wide, c.wide,
                                   c.wide / kLanes, width / 2);
            else
                for (int64_t j = 0; j < here; j += kPanel) {
                    const int64_t n = here - j < kPanel ? here - j : kPanel;
                    product<false, true>(room.scores + j / kInLane<T>, rows, room.v + j / kInLane<T> * c.wide, c.wide,
                                         room.o + r0 * c.wide, c.wide, c.wide / kLanes, (n + kInLane<T> - 1) / kInLane<T>,
                                         Plain<kDots<T>>{});
                }
        }
    }
    if constexpr (kTiledScores || kTiledValues) tiles_end();
    for (int64_t at = 0; at < w.count; ++at) {
        const int64_t row = w.range.begin + at, head = w.range.kv_head * a.group() + row / s.queries,
                      query = s.q_first + row % s.queries;
        const float total = room.total[at];
        c.lse[(s.q_sample * a.heads + head) * a.q_tokens + query] =
            total == 0 ? -__builtin_inff() : static_cast<float>(0.6931471805599453 * room.top[at] + __builtin_log(total));
        T* const to = static_cast<T*>(c.o) + ((s.q_sample * a.q_tokens + query) * a.heads + head) * a.dv;
        const float inverse = total == 0 ? 0 : 1 / total;
        for (int64_t i = 0; i < a.dv; i += kLanes) {
            const F value = quiet(inverse * load(room.o + at * c.wide + i));
            if (a.dv - i >= kLanes)
                store(to + i, value);
            else
                store(to + i, value, static_cast<int>(a.dv - i));
        }
    }
}

Share shared(const Attention& a) { return Share(a, a.group() * a.q_tokens); }

// What a call has to have in scratch.
int64_t room_of(const Attention& a) {
    const Share share = shared(a);
    return share.slots * Room::floats(a, share.rows) * static_cast<int64_t>(sizeof(float));
}

// A call that has been read: its outputs are looked at, then all of it is done.
template <bool kCoded>
Refusal attend(Call& c, const Views& out, const View& q, const View& v, void* scratch) {
    if (Refusal why = readable(c.a)) return why;
    const int64_t o_shape[] = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]},
                  lse_shape[] = {q.shape[0], q.shape[2], q.shape[1]};
    if (out.count != 2 || !has(out[0], o_shape, v.dtype) || !has(out[1], lse_shape, DType::f32) || !out[0].contiguous() ||
        !out[1].contiguous())
        return "out: not o and lse, contiguous";
    c.o = out[0].data, c.lse = static_cast<float*>(out[1].data), c.wide = round_up(c.a.dv, kLanes);
    const Share share = shared(c.a);
    const int64_t items = c.a.samples * c.a.kv_heads * share.pieces, room = Room::floats(c.a, share.rows);
    return for_value(Floats{}, v.dtype, "v: dtype", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        using Q = std::conditional_t<kCoded, int8_t, T>;
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot) {
                Work<Q, T> work(c.a, share.at(c.a, slot));
                for (int64_t item = slot; item < items; item += share.slots) {
                    const bool last = item + share.slots >= items;
                    const Work<Q, T> next(c.a, share.at(c.a, last ? item : item + share.slots));
                    if (work.count > 0)
                        run<Q, T>(c, work, last ? nullptr : &next, share.rows, static_cast<float*>(scratch) + slot * room);
                    work = next;
                }
            }
        };
        parallel_for(share.slots, 1, body);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk
