// dV = PT dO, dS = P (dO VT - rowsum(dO O) + d lse), dQ = scale dS K, dK = scale dST Q, with P = exp(S - lse) once more
//
// Idea: five products of attention.h on blocks of 48 queries by 128 keys, float32 throughout. A thread has a head of k, v to
// itself and sums in order, so that two runs are bit-equal for any number of threads, without a second pass over the scores.
// Takes: what attention_forward takes, the gradient of a bias too. Floor: 10 B H Sq Sk D floating point operations.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/attention_backward.cpp
#include "attention.h"

namespace dk {
namespace {

constexpr int kBlock = 48, kChunk = 128;

struct Call {
    Attention a;
    Lay grad, o, lse, grad_lse;  // lse and its gradient by sample, head and query: at[1] .. at[3]
    void *dq, *dk, *dv;          // nullptr: not wanted
    Lay d_bias;                  // float32 sums, contiguous in bias's shape
    int64_t wide, wide_v;        // D and Dv, in whole vectors

    int64_t rows() const { return a.group() * a.q_tokens; }
};

// One slot's memory.
struct Room {
    float *dk, *dv, *dq, *q, *grad, *base, *delta;                        // of a head
    float *k_turned, *v_turned, *k, *p, *ds, *q_rows, *grad_rows, *line;  // of a block

    template <class Take>
    void lay(const Call& c, Take take) {
        const int64_t rows = c.rows(), keys = c.a.k_tokens;
        dk = take(keys * c.wide), dv = take(keys * c.wide_v);
        dq = take(rows * c.wide), q = take(rows * c.wide), grad = take(rows * c.wide_v);
        base = take(round_up(rows, kLanes)), delta = take(round_up(rows, kLanes));
        k_turned = take(kChunk * c.a.d), v_turned = take(kChunk * c.a.dv), k = take(kChunk * c.wide);
        p = take(kBlock * kLine), ds = take(kBlock * kLine), q_rows = take(kBlock * kLine), grad_rows = take(kBlock * kLine);
        line = take(kLine);
    }
    static int64_t floats(const Call& c) {
        int64_t n = 0;
        Room().lay(c, [&](int64_t more) -> float* { return n += more, nullptr; });
        return round_up(n, 16);
    }
    static Room at(float* p, const Call& c) {
        Room room;
        room.lay(c, [&](int64_t n) { return (p += n) - n; });
        return room;
    }
};

DK_INLINE void clear(float* p, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store(p + i, F{});
}

// What a sample's rows need: queries and gradients, packed; the sums over each row.
template <class T>
void prepare(const Call& c, const Sequence& s, int64_t kv_head, const Room& room) {
    const Attention& a = c.a;
    for (int64_t g = 0; g < a.group(); ++g) {
        const int64_t head = kv_head * a.group() + g, row = g * s.queries;
        const auto from = [&](const Lay& l) {
            return static_cast<const T*>(l.data) + s.q_sample * l.at[0] + s.q_first * l.at[1] + head * l.at[2];
        };
        const auto number = [&](const Lay& l, int64_t i) {
            return static_cast<const float*>(l.data)[s.q_sample * l.at[1] + head * l.at[2] + (s.q_first + i) * l.at[3]];
        };
        pack_rows<false>(from(a.q), a.q.at[1], a.q.at[3], s.queries, a.d, room.q + row * c.wide, c.wide);
        pack_rows<false>(from(c.grad), c.grad.at[1], c.grad.at[3], s.queries, a.dv, room.grad + row * c.wide_v, c.wide_v);
        for (int64_t i = 0; i < s.queries; ++i) {
            const T* const o = from(c.o) + i * c.o.at[1];
            F products{};
            for (int64_t j = 0; j < a.dv; j += kLanes)
                products = fma(load(room.grad + (row + i) * c.wide_v + j),
                               some(o + j * c.o.at[3], c.o.at[3], static_cast<int>(a.dv - j)), products);
            const float lse = number(c.lse, i);
            room.base[row + i] = lse == -__builtin_inff() ? 0 : lse;
            room.delta[row + i] = sum(products) - (c.grad_lse.dtype == DType::f32 ? number(c.grad_lse, i) : 0);
        }
    }
}

DK_INLINE void copy_rows(const float* from, int64_t step, int64_t rows, float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < step; i += kLanes) store(to + r * kLine + i, load(from + r * step + i));
}

// Row `ds` of the gradient of scores, to what bias was there.
DK_INLINE void add_bias(const Lay& to, int64_t sample, int64_t head, int64_t query, int64_t first, int64_t keys,
                        const float* ds) {
    float* const at = static_cast<float*>(to.data) + sample * to.at[0] + head * to.at[1] + query * to.at[2] + first * to.at[3];
    F total{};
    for (int64_t j = 0; j < keys; j += kLanes) {
        const int n = static_cast<int>(keys - j < kLanes ? keys - j : kLanes);
        const F more = dk::first(load(ds + j), n);
        if (to.at[3])
            store(at + j, load(at + j, n) + more, n);
        else
            total += more;
    }
    if (!to.at[3]) *at += sum(total);
}

// A row of scores becomes P, and one of dO VT becomes dS.
__attribute__((noinline)) void gradients(float* p, float* ds, int64_t width, float scale, float base, float delta) {
    for (int64_t j = 0; j < width; j += kLanes) {
        const F x = load(p + j), t = kLog2e * fma(x, splat(scale), splat(-base));
        const I beyond = t >= 128.0f;  // lse is the caller's
        const F any = choose(beyond, splat(__builtin_inff()), exp2(choose(beyond, F{}, t))),
                e = choose(x == splat(-__builtin_inff()), F{}, any);  // last: a scale below 0 turns its sign
        store(p + j, e);
        store(ds + j, e * (load(ds + j) - delta));
    }
}

// One sample's part of the gradients of a head.
template <class T>
void add(const Call& c, int64_t sample, const Sequence& s, int64_t kv_head, const Room& room) {
    const Attention& a = c.a;
    const int64_t rows = a.group() * s.queries;
    const Masks masks{a.bias, a.mask};
    const auto* const k =
        static_cast<const T*>(a.k.data) + s.k_sample * a.k.at[0] + s.k_first * a.k.at[1] + kv_head * a.k.at[2];
    const auto* const v =
        static_cast<const T*>(a.v.data) + s.k_sample * a.v.at[0] + s.k_first * a.v.at[1] + kv_head * a.v.at[2];
    clear(room.dq, rows * c.wide);
    for (int64_t first = 0; first < s.keys; first += kChunk) {
        const int64_t keys = s.keys - first < kChunk ? s.keys - first : kChunk;
        pack_turned<false>(k + first * a.k.at[1], a.k.at[1], a.k.at[3], keys, a.d, room.k_turned);
        pack_turned<false>(v + first * a.v.at[1], a.v.at[1], a.v.at[3], keys, a.dv, room.v_turned);
        pack_rows<false>(k + first * a.k.at[1], a.k.at[1], a.k.at[3], keys, a.d, room.k, c.wide);
        for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
            const int64_t count = rows - r0 < kBlock ? rows - r0 : kBlock;
            int64_t seen[kBlock], here = 0;
            for (int64_t r = 0; r < count; ++r) {
                const int64_t n = a.seen(s, (r0 + r) % s.queries) - first;
                seen[r] = n < 0 ? 0 : n < keys ? n : keys;
                here = seen[r] > here ? seen[r] : here;
            }
            if (here == 0) continue;
            const int64_t width = round_up(here, kLanes);
            copy_rows(room.q + r0 * c.wide, c.wide, count, room.q_rows);
            copy_rows(room.grad + r0 * c.wide_v, c.wide_v, count, room.grad_rows);
            for (int64_t j = 0; j < width; j += kPanel) {
                const int64_t vectors = (width - j < kPanel ? width - j : kPanel) / kLanes;
                product<false, false>(room.q_rows, count, room.k_turned + j * a.d, kPanel, room.p + j, kLine, vectors, a.d);
                product<false, false>(room.grad_rows, count, room.v_turned + j * a.dv, kPanel, room.ds + j, kLine, vectors,
                                      a.dv);
            }
            for (int64_t r = 0; r < count; ++r) {
                float *const p = room.p + r * kLine, *const ds = room.ds + r * kLine;
                const int64_t row = r0 + r, head = kv_head * a.group() + row / s.queries;
                if (masks) masks.apply(sample, head, row % s.queries, first, width, here, a.scale, 1, p, room.line);
                hide(p, seen[r], width);
                gradients(p, ds, width, masks ? 1 : a.scale, room.base[row], room.delta[row]);
                if (c.d_bias.data) add_bias(c.d_bias, sample, head, row % s.queries, first, here, ds);
            }
            if (c.dv)
                product<true, true>(room.p, here, room.grad_rows, kLine, room.dv + (s.k_first + first) * c.wide_v, c.wide_v,
                                    c.wide_v / kLanes, count);
            if (c.dk)
                product<true, true>(room.ds, here, room.q_rows, kLine, room.dk + (s.k_first + first) * c.wide, c.wide,
                                    c.wide / kLanes, count);
            if (c.dq)
                product<false, true>(room.ds, count, room.k, c.wide, room.dq + r0 * c.wide, c.wide, c.wide / kLanes, here);
        }
    }
}

template <class T>
DK_INLINE void put(T* to, const float* from, int64_t columns, float scale) {
    for (int64_t i = 0; i < columns; i += kLanes) {
        const int n = static_cast<int>(columns - i < kLanes ? columns - i : kLanes);
        store(to + i, quiet(scale * load(from + i, n)), n);
    }
}

// All gradients of one head of one row of k, v, or of one sequence of it.
template <class T>
void run(const Call& c, int64_t row, int64_t kv_head, const Room& room) {
    const Attention& a = c.a;
    const bool packed = a.cu_q.data;
    const Sequence only = packed ? a.sequence(row) : Sequence{};
    const int64_t first = packed ? only.k_first : 0, keys = packed ? only.keys : a.k_tokens, k_row = packed ? 0 : row;
    clear(room.dk + first * c.wide, keys * c.wide);
    clear(room.dv + first * c.wide_v, keys * c.wide_v);
    for (int64_t b = packed ? row : 0; b < (packed ? row + 1 : a.samples); ++b) {
        const Sequence s = a.sequence(b);
        if (s.k_sample != k_row || s.queries == 0) continue;
        prepare<T>(c, s, kv_head, room);
        add<T>(c, b, s, kv_head, room);
        for (int64_t r = 0; c.dq && r < a.group() * s.queries; ++r)
            put(static_cast<T*>(c.dq) +
                    ((s.q_sample * a.q_tokens + s.q_first + r % s.queries) * a.heads + kv_head * a.group() + r / s.queries) *
                        a.d,
                room.dq + r * c.wide, a.d, a.scale);
    }
    for (int64_t t = first; t < first + keys; ++t) {
        const int64_t to = (k_row * a.k_tokens + t) * a.kv_heads + kv_head;
        if (c.dk) put(static_cast<T*>(c.dk) + to * a.d, room.dk + t * c.wide, a.d, a.scale);
        if (c.dv) put(static_cast<T*>(c.dv) + to * a.dv, room.dv + t * c.wide_v, a.dv, 1);
    }
}

Refusal describe(Call& c, View grad, Optional grad_lse, View q, View k, View v, View o, View lse, Optional bias, Optional mask,
                 Optional key_lengths, Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale) {
    if (Refusal why = parse(c.a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return why;
    const int64_t like_o[] = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]},
                  like_lse[] = {q.shape[0], q.shape[2], q.shape[1]};
    if (!has(grad, like_o, q.dtype) || !has(o, like_o, q.dtype)) return "grad, o: not like o";
    if (!has(lse, like_lse, DType::f32) || (grad_lse && !has(grad_lse, like_lse, DType::f32)))
        return "lse, grad_lse: not like lse";
    c.grad = lay_of(grad), c.o = lay_of(o), c.lse = lay_of(lse), c.grad_lse = lay_of(grad_lse);
    c.wide = round_up(c.a.d, kLanes), c.wide_v = round_up(c.a.dv, kLanes);
    return nullptr;
}

// Rows of k, v (or sequences) by heads; those that sum into the same places of bias's gradient go to one thread, in order.
struct Share {
    int64_t rows, heads, slots;
    bool by_row, by_head;

    Share(const Call& c, bool bias)
        : rows(c.a.cu_q.data ? c.a.samples : c.a.k_samples),
          heads(c.a.kv_heads),
          by_row(!bias || (c.a.bias.at[0] && !c.a.kv_index.data)),
          by_head(!bias || c.a.bias.at[1]) {
        const int64_t threads = dk_parallel_threads();
        slots = groups() < threads ? groups() : threads;
    }
    int64_t groups() const { return (by_row ? rows : 1) * (by_head ? heads : 1); }
    template <class Body>
    void each(int64_t group, const Body& body) const {
        const int64_t row = by_head ? group / heads : group, head = group % heads;
        for (int64_t r = by_row ? row : 0; r < (by_row ? row + 1 : rows); ++r)
            for (int64_t h = by_head ? head : 0; h < (by_head ? head + 1 : heads); ++h) body(r, h);
    }
};

// Of bias's gradient, where it can't be summed in place.
int64_t sums_of(const View& bias, int64_t wanted) { return (wanted & 8) && bias.dtype != DType::f32 ? bias.numel() : 0; }

int64_t bytes(Stream, Views, View grad, Optional grad_lse, View q, View k, View v, View o, View lse, Optional bias,
              Optional mask, Optional key_lengths, Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale,
              int64_t wanted) {
    Call c{};
    if (describe(c, grad, grad_lse, q, k, v, o, lse, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return 0;
    if ((wanted & 8) && !bias) return 0;
    return (Share(c, wanted & 8).slots * Room::floats(c) + sums_of(bias, wanted)) * 4;
}

Refusal attention_backward(Stream stream, Views out, View grad, Optional grad_lse, View q, View k, View v, View o, View lse,
                           Optional bias, Optional mask, Optional key_lengths, Optional cu_q, Optional cu_k, Optional kv_index,
                           Text causal, double scale, int64_t wanted) {
    Call c{};
    if (Refusal why =
            describe(c, grad, grad_lse, q, k, v, o, lse, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale))
        return why;
    if (Refusal why = readable(c.a)) return why;
    if (wanted < 0 || wanted > 15) return "wanted: not 0 to 15";
    if ((wanted & 8) && !bias) return "wanted: the gradient of a bias that is not there";
    const View* inputs[] = {&q, &k, &v, &bias};
    void* results[4] = {};
    int64_t n = 0;
    for (int i = 0; i < 4; ++i) {
        if (!(wanted >> i & 1)) continue;
        if (n >= out.count || !out[n].same_shape(*inputs[i]) || out[n].dtype != inputs[i]->dtype || !out[n].contiguous())
            return "out: not like the inputs whose gradients are wanted";
        results[i] = out[n++].data;
    }
    if (n != out.count) return "out: more than is wanted";
    c.dq = results[0], c.dk = results[1], c.dv = results[2];
    const Share share(c, wanted & 8);
    float* const scratch = static_cast<float*>(stream.scratch);
    const int64_t room = Room::floats(c), numbers = wanted & 8 ? bias.numel() : 0;
    if (wanted & 8) {
        c.d_bias = lay_of(out[n - 1]);
        if (bias.dtype != DType::f32) c.d_bias.data = scratch + share.slots * room;
        for (int64_t i = 0; i < numbers; ++i) static_cast<float*>(c.d_bias.data)[i] = 0;
    }
    const Refusal why = for_value(Floats{}, q.dtype, "q: dtype", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot)
                for (int64_t group = slot; group < share.groups(); group += share.slots)
                    share.each(group,
                               [&](int64_t row, int64_t head) { run<T>(c, row, head, Room::at(scratch + slot * room, c)); });
        };
        parallel_for(share.slots, 1, body);
        return nullptr;
    });
    if (why || sums_of(bias, wanted) == 0) return why;
    return for_value(Values<DType::f16, DType::bf16>{}, bias.dtype, "bias: dtype", [&](auto tag) -> Refusal {
        put(static_cast<typename TypeOf<decltype(tag)::value>::type*>(results[3]), static_cast<float*>(c.d_bias.data), numbers,
            1);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::attention_backward, dk::bytes;
DK_ENTRY_WITH_SCRATCH(attention_backward,
                      "out grad grad_lse q k v o lse bias mask key_lengths cu_q cu_k kv_index causal scale wanted", bytes)
