// o = softmax(q kT scale + bias) v, lse = log of the sums of exponentials
//
// Idea: attention.h's blocks, kRows queries by 256 keys. Scores are one product, values another; between them each row's
// largest score, its exponentials in units of log2 and their sum. What a row has gathered so far is rescaled when its scores
// outgrow it. Half precision is widened while packing, so that all arithmetic is float32; but bfloat16 is multiplied as it is,
// in pairs or matrix tiles, where there are instructions for that.
// Takes: float32, float16 or bfloat16, any strides, head dimensions up to 256, every mask; heads of k, v may be shared.
// Floor: 4 B H Sq Sk D floating point operations.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/attention_forward.cpp
#include "attention.h"

namespace dk {
namespace {

struct Call {
    Attention a;
    void* o;       // [B, Sq, H, Dv]
    float* lse;    // [B, H, Sq]
    int64_t wide;  // Dv, in whole vectors
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
    float *k, *v, *scores, *q, *line, *o, *top, *total, *block;

    static int64_t slack(int64_t rows) { return round_up(rows, kLanes) + kRows + kLanes; }  // a block is of whole vectors
    static int64_t floats(const Attention& a, int64_t rows) {
        return kKeys * (round_up(a.d, kTileLanes) + round_up(a.dv, kLanes)) + kRows * kLine + kLine +
               4 * round_up(kRows, kLanes) + 2 * round_up(slack(rows), kLanes) + rows * (kLine + round_up(a.dv, kLanes));
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
template <class T>
struct Work {
    Range range;
    Sequence s;
    int64_t count = 0, reach = 0;  // rows; keys that some row sees
    const T *q, *k, *v;

    Work(const Attention& a, const Range& r) : range(r), s(a.sequence(r.sample)) {
        const int64_t all = a.group() * s.queries;
        if (range.end > all) range.end = all;
        count = range.end - range.begin;
        q = static_cast<const T*>(a.q.data) + s.q_sample * a.q.at[0] + s.q_first * a.q.at[1];
        k = static_cast<const T*>(a.k.data) + s.k_sample * a.k.at[0] + s.k_first * a.k.at[1] + r.kv_head * a.k.at[2];
        v = static_cast<const T*>(a.v.data) + s.k_sample * a.v.at[0] + s.k_first * a.v.at[1] + r.kv_head * a.v.at[2];
        if (a.causal == Causal::none)
            reach = s.keys;
        else
            for (int64_t row = range.begin; row < range.end; ++row) reach = max(reach, a.seen(s, row % s.queries));
    }
    static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
    const T* query(const Attention& a, int64_t row) const {
        return q + row % s.queries * a.q.at[1] + (range.kv_head * a.group() + row / s.queries) * a.q.at[2];
    }
};

// What is packed next is fetched while this is computed: a token is often a page from the last, where no prefetcher follows.
template <class T>
struct Ahead {
    const T *k, *v, *q;
    int64_t keys, queries, rows;  // q's only with the next item

    DK_INLINE void fetch(const Attention& a, int64_t row, int64_t n) const {  // the part of n of the rows
        for (int64_t t = row * keys / rows; t < (row + n) * keys / rows; ++t) {
            prefetch(k + t * a.k.at[1], a.d * sizeof(T));
            prefetch(v + t * a.v.at[1], a.dv * sizeof(T));
        }
        for (int64_t t = row * queries / rows; t < (row + n) * queries / rows; ++t)
            prefetch(q + t * a.q.at[1], a.d * sizeof(T));
    }
};

template <class T>
void run(const Call& c, const Work<T>& w, const Work<T>* next, int64_t most_rows, float* memory) {
    constexpr bool kDot = kPairs<T>;
    constexpr bool kTiled = kTiles && kDot;
    const Attention& a = c.a;
    const Sequence& s = w.s;
    const int64_t depth = round_up((a.d + kInLane<T> - 1) / kInLane<T>, kDepth<kDot>);
    const Room room(memory, c, most_rows);
    if constexpr (kDot) tiles_begin();
    for (int64_t i = 0; i < w.count * c.wide; i += kLanes) store(room.o + i, F{});
    for (int64_t i = 0; i < w.count + kRows + kLanes; ++i) room.top[i] = -__builtin_inff(), room.total[i] = 0;
    const Masks masks{a.bias, a.mask};
    const float factor = a.scale * kLog2e;
    const bool plain = !masks && factor > 0;          // the scores' maximum is that of the products
    for (int64_t at = 0, n; at < w.count; at += n) {  // runs of queries of one head
        const int64_t row = w.range.begin + at, rest = s.queries - row % s.queries;
        n = rest < w.count - at ? rest : w.count - at;
        pack_rows<kDot>(w.query(a, row), a.q.at[1], a.q.at[3], n, a.d, room.q + at * kLine, kLine);
    }
    for (int64_t first = 0; first < w.reach; first += kKeys) {
        const int64_t keys = w.reach - first < kKeys ? w.reach - first : kKeys, after = w.reach - first - keys;
        pack_turned<kDot, kTiled ? kTileLanes : kPanel>(w.k + first * a.k.at[1], a.k.at[1], a.k.at[3], keys, a.d, room.k);
        if constexpr (kDot)
            pack_pairs(w.v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v, kTiled ? kTileLanes : c.wide,
                       kTiled ? kTileLanes * kKeys / 2 : kLanes);
        else
            pack_rows<false>(w.v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v, c.wide);
        Ahead<T> ahead{w.k + (first + keys) * a.k.at[1],
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
            const int64_t width = round_up(here, kTiled ? 2 * kTileLanes : kLanes);
            if constexpr (kTiled)
                tiled<false>(room.q + r0 * kLine, rows, room.k, kTileLanes * depth, room.scores, kLine, width / kLanes, depth);
            else
                for (int64_t j = 0; j < width; j += kPanel)
                    product<false, false, kDot>(room.q + r0 * kLine, rows, room.k + j * depth, kPanel, room.scores + j, kLine,
                                                (width - j < kPanel ? width - j : kPanel) / kLanes, depth);
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
            exponentials<kDot>(room.scores, rows, width, plain ? factor : 1, room.top + r0, room.total + r0,
                               room.o + r0 * c.wide, c.wide, room.block);
            if constexpr (kTiled)
                tiled<true>(room.scores, rows, room.v, kTileLanes * kKeys / 2, room.o + r0 * c.wide, c.wide, c.wide / kLanes,
                            width / 2);
            else
                for (int64_t j = 0; j < here; j += kPanel) {
                    const int64_t n = here - j < kPanel ? here - j : kPanel;
                    product<false, true, kDot>(room.scores + j / kInLane<T>, rows, room.v + j / kInLane<T> * c.wide, c.wide,
                                               room.o + r0 * c.wide, c.wide, c.wide / kLanes,
                                               (n + kInLane<T> - 1) / kInLane<T>);
                }
        }
    }
    if constexpr (kDot) tiles_end();
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

int64_t bytes(Stream, Views, View q, View k, View v, Optional bias, Optional mask, Optional key_lengths, Optional cu_q,
              Optional cu_k, Optional kv_index, Text causal, double scale) {
    Attention a;
    if (parse(a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return 0;
    const Share share = shared(a);
    return share.slots * Room::floats(a, share.rows) * 4;
}

Refusal attention_forward(Stream stream, Views out, View q, View k, View v, Optional bias, Optional mask, Optional key_lengths,
                          Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale) {
    Call c{};
    if (Refusal why = parse(c.a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return why;
    if (Refusal why = readable(c.a)) return why;
    const int64_t o_shape[] = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]},
                  lse_shape[] = {q.shape[0], q.shape[2], q.shape[1]};
    if (out.count != 2 || !has(out[0], o_shape, q.dtype) || !has(out[1], lse_shape, DType::f32) || !out[0].contiguous() ||
        !out[1].contiguous())
        return "out: not o and lse, contiguous";
    c.o = out[0].data, c.lse = static_cast<float*>(out[1].data), c.wide = round_up(c.a.dv, kLanes);
    const Share share = shared(c.a);
    const int64_t items = c.a.samples * c.a.kv_heads * share.pieces, room = Room::floats(c.a, share.rows);
    return for_value(Floats{}, q.dtype, "q: dtype", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot) {
                Work<T> work(c.a, share.at(c.a, slot));
                for (int64_t item = slot; item < items; item += share.slots) {
                    const bool last = item + share.slots >= items;
                    const Work<T> next(c.a, share.at(c.a, last ? item : item + share.slots));
                    if (work.count > 0)
                        run<T>(c, work, last ? nullptr : &next, share.rows, static_cast<float*>(stream.scratch) + slot * room);
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

using dk::attention_forward, dk::bytes;
DK_ENTRY_WITH_SCRATCH(attention_forward, "out q k v bias mask key_lengths cu_q cu_k kv_index causal scale", bytes)
