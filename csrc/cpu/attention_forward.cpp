// o = softmax(q kT scale + bias) v, lse = log of the sums of exponentials
//
// Idea: attention.h's blocks, 24 queries by 256 keys. Scores are one product, values another; between them each row's largest
// score, its exponentials in units of log2 and their sum. What a row has gathered so far is rescaled once a chunk. Half
// precision is widened while packing, so that all arithmetic is float32.
// Takes: float32, float16 or bfloat16, any strides, head dimensions up to 256, every mask; heads of k, v may be shared.
// Floor: 4 B H Sq Sk D floating point operations. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/attention_forward.cpp
#include "attention.h"

namespace dk {
namespace {

struct Call {
    Attention a;
    void* o;       // [B, Sq, H, Dv]
    float* lse;    // [B, H, Sq]
    int64_t wide;  // Dv, in whole vectors
};

// One slot's memory.
struct Room {
    float *k, *v, *scores, *q, *line, *o, *top, *total;

    static int64_t floats(const Attention& a, int64_t rows) {
        return kKeys * (a.d + round_up(a.dv, kLanes)) + kRows * kLine + kLine + round_up(rows, kLanes) * 2 +
               rows * (kLine + round_up(a.dv, kLanes));
    }
    Room(float* p, const Call& c, int64_t rows) {
        const auto take = [&](int64_t n) {
            float* const here = p;
            p += n;
            return here;
        };
        k = take(kKeys * c.a.d), v = take(kKeys * c.wide), scores = take(kRows * kLine), q = take(rows * kLine);
        line = take(kLine), o = take(rows * c.wide), top = take(round_up(rows, kLanes)), total = take(round_up(rows, kLanes));
    }
};

// A row's scores become their exponentials, `width` of them, of which the first `seen` count; what `o` holds is rescaled.
// exp2((s - top) factor), not s factor - top factor: at the top that is 1 however large the scores are.
DK_INLINE void exponentials(float* s, int64_t width, int64_t seen, float factor, float& top, float& total, float* o,
                            int64_t wide) {
    const float inf = __builtin_inff();
    int64_t j = seen;
    for (; j < width && j % kLanes; ++j) s[j] = -inf;
    for (; j < width; j += kLanes) store(s + j, splat(-inf));
    F most = splat(-inf);
    for (j = 0; j < width; j += kLanes) {
        const F x = load(s + j);
        most = choose(x > most, x, most);
    }
    const float highest = largest(most), next = highest > top ? highest : top, base = next == -inf ? 0 : next;
    const float kept = next == top ? 1 : exp2(splat((top - base) * factor))[0];
    F sums{};
    const F scale = splat(factor), less = splat(base);
    for (j = 0; j < width; j += kLanes) {
        const F p = exp2((load(s + j) - less) * scale);
        store(s + j, p);
        sums += p;
    }
    top = next, total = total * kept + sum(sums);
    if (kept != 1)
        for (int64_t i = 0; i < wide; i += kLanes) store(o + i, kept * load(o + i));
}

template <class T>
void run(const Call& c, const Range& range, int64_t most_rows, float* memory) {
    const Attention& a = c.a;
    const Sequence s = a.sequence(range.sample);
    const int64_t all = a.group() * s.queries, end = range.end < all ? range.end : all, count = end - range.begin;
    if (count <= 0) return;
    const Room room(memory, c, most_rows);
    for (int64_t i = 0; i < count * c.wide; i += kLanes) store(room.o + i, F{});
    for (int64_t i = 0; i < count; ++i) room.top[i] = -__builtin_inff(), room.total[i] = 0;
    const Masks masks{a.bias, a.mask};
    const float factor = a.scale * kLog2e;
    const bool plain = !masks && factor > 0;  // the scores' maximum is that of the products
    const double unit = plain ? a.scale : 0.6931471805599453;
    const auto* const q = static_cast<const T*>(a.q.data) + s.q_sample * a.q.at[0] + s.q_first * a.q.at[1];
    const auto* const k =
        static_cast<const T*>(a.k.data) + s.k_sample * a.k.at[0] + s.k_first * a.k.at[1] + range.kv_head * a.k.at[2];
    const auto* const v =
        static_cast<const T*>(a.v.data) + s.k_sample * a.v.at[0] + s.k_first * a.v.at[1] + range.kv_head * a.v.at[2];
    for (int64_t at = 0; at < count;) {  // a run of queries of one head
        const int64_t row = range.begin + at, query = row % s.queries, head = range.kv_head * a.group() + row / s.queries;
        const int64_t n = s.queries - query < count - at ? s.queries - query : count - at;
        pack_rows(q + query * a.q.at[1] + head * a.q.at[2], a.q.at[1], a.q.at[3], n, a.d, room.q + at * kLine, kLine);
        at += n;
    }
    int64_t reach = 0;
    for (int64_t r = range.begin; r < end; ++r) {
        const int64_t n = a.seen(s, r % s.queries);
        reach = n > reach ? n : reach;
    }
    for (int64_t first = 0; first < reach; first += kKeys) {
        const int64_t keys = reach - first < kKeys ? reach - first : kKeys;
        pack_turned(k + first * a.k.at[1], a.k.at[1], a.k.at[3], keys, a.d, room.k);
        pack_rows(v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v, c.wide);
        for (int64_t r0 = range.begin; r0 < end; r0 += kRows) {
            const int64_t rows = end - r0 < kRows ? end - r0 : kRows;
            int64_t seen[kRows], here = 0;
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t n = a.seen(s, (r0 + r) % s.queries) - first;
                seen[r] = n < 0 ? 0 : n < keys ? n : keys;
                here = seen[r] > here ? seen[r] : here;
            }
            if (here == 0) continue;
            const int64_t width = round_up(here, kLanes);
            for (int64_t j = 0; j < width; j += kPanel)
                product<false, false>(room.q + (r0 - range.begin) * kLine, rows, room.k + j * a.d, kPanel, room.scores + j,
                                      kLine, (width - j < kPanel ? width - j : kPanel) / kLanes, a.d);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t row = r0 + r, at = row - range.begin;
                float* const scores = room.scores + r * kLine;
                if (plain) {
                    exponentials(scores, width, seen[r], factor, room.top[at], room.total[at], room.o + at * c.wide, c.wide);
                } else {
                    const int64_t head = range.kv_head * a.group() + row / s.queries;
                    masks.apply(range.sample, head, row % s.queries, first, width, here, factor, scores, room.line);
                    exponentials(scores, width, seen[r], 1, room.top[at], room.total[at], room.o + at * c.wide, c.wide);
                }
            }
            product<false, true>(room.scores, rows, room.v, c.wide, room.o + (r0 - range.begin) * c.wide, c.wide,
                                 c.wide / kLanes, here);
        }
    }
    for (int64_t at = 0; at < count; ++at) {
        const int64_t row = range.begin + at, head = range.kv_head * a.group() + row / s.queries,
                      query = s.q_first + row % s.queries;
        const float total = room.total[at], top = room.top[at];
        c.lse[(s.q_sample * a.heads + head) * a.q_tokens + query] =
            total == 0 ? -__builtin_inff() : static_cast<float>(unit * top + __builtin_log(total));
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
    if (out.count != 2 || !is_result(out[0], o_shape, q.dtype) || !is_result(out[1], lse_shape, DType::f32))
        return "out: not o and lse";
    c.o = out[0].data, c.lse = static_cast<float*>(out[1].data), c.wide = round_up(c.a.dv, kLanes);
    const Share share = shared(c.a);
    const int64_t items = c.a.samples * c.a.kv_heads * share.pieces, room = Room::floats(c.a, share.rows);
    return for_dtype(Floats{}, q.dtype, "q: dtype", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot)
                for (int64_t item = slot; item < items; item += share.slots)
                    run<T>(c, share.at(c.a, item), share.rows, static_cast<float*>(stream.scratch) + slot * room);
        };
        parallel_for(share.slots, 1, body);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::attention_forward, dk::bytes;
DK_ENTRY_WITH_SCRATCH(attention_forward, "out q k v bias mask key_lengths cu_q cu_k kv_index causal scale", bytes)
