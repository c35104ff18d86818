// codes = round(h * 127 / amax), scale = amax / 127, h = activation(x) * smooth or activation(a) * b * smooth, amax = max |h|
//
// Idea: h is made once, in float32, in a line that the thread keeps in its caches, its largest magnitude on the way; a second
// walk, over the line, rounds, perhaps after one that rotates. The two halves of a gated row are read as they lie.
// Takes: x float32, float16 or bfloat16; smooth of any of these; any strides.
// Floor: a read of x and a byte a code. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/act_quantize.cpp
#include "activation.h"
#include "quantize.h"

namespace dk {
namespace {

struct Call {
    View x;
    Rows rows;
    int activation;
    bool gated;
};

DK_INLINE bool describe(Call& c, const Text& name) {
    const char* const gated[] = {"", "geglu", "geglu_tanh", "swiglu"};
    for (int k = kNone; k <= kSilu; ++k)
        if (name == kActivations[k] || (k > kNone && name == gated[k])) {
            c.activation = k, c.gated = !(name == kActivations[k]);
            return true;
        }
    return false;
}
DK_INLINE int64_t columns_of(const View& x, bool gated) { return gated ? x.size(-1) / 2 : x.size(-1); }

template <class T, bool kUnit, int kActivation, bool kGated>
__attribute__((noinline)) void run(const Call& c, const Codes& q, float* line, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const Row<T, kUnit> a(c.x, c.rows, r);
        Row<T, kUnit> b = a;
        b.p += q.columns * b.stride;
        const auto value = [](Pair u, Pair v) __attribute__((always_inline)) {
            const Pair h{activated<kActivation>(u.lo), activated<kActivation>(u.hi)};
            return kGated ? Pair{h.lo * v.lo, h.hi * v.hi} : h;
        };
        Line<T> h(q, line);
        int64_t i = 0;
        for (; i + kPair <= q.columns; i += kPair) h.put(i, value(a.at(i), kGated ? b.at(i) : Pair{}), kPair);
        if (const int n = static_cast<int>(q.columns - i)) h.put(i, value(a.some(i, n), kGated ? b.some(i, n) : Pair{}), n);
        h.code(q, r);
    }
}

int64_t bytes(Stream, Views, View x, Text activation, Optional, int64_t) {
    Call c{};
    if (x.ndim < 1 || x.size(-1) < 1 || !describe(c, activation)) return 0;
    return bytes_of(x.numel() / x.size(-1), columns_of(x, c.gated));
}

Refusal act_quantize(Stream stream, Views out, View x, Text activation, Optional smooth, int64_t rotate) {
    Call c{};
    Codes q{};
    Operand factor;
    if (!rows_of(x, c.rows)) return "x: fewer than 1 or more than 8 dimensions";
    if (!describe(c, activation)) return "activation: not a known one";
    if (c.gated && x.size(-1) % 2) return "x: an odd number of columns";
    if (Refusal why = describe(q, factor, out, x, columns_of(x, c.gated), smooth, rotate)) return why;
    if (q.rows == 0) return nullptr;
    c.x = x;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(x.step(-1) == 1 || x.size(-1) == 1, [&](auto unit) {
            return for_bool(c.gated, [&](auto gated) {
                return for_value(Values<kNone, kGelu, kGeluTanh, kSilu>{}, c.activation, "", [&](auto kind) -> Refusal {
                    constexpr int kind_of = decltype(kind)::value;
                    constexpr bool both = decltype(gated)::value && kind_of != kNone;
                    prepare<T>(q, factor, stream.scratch);
                    q.each([&](float* line, int64_t begin, int64_t end) {
                        run<T, decltype(unit)::value, kind_of, both>(c, q, line, begin, end);
                    });
                    return nullptr;
                });
            });
        });
    });
}

}  // namespace
}  // namespace dk

using dk::act_quantize;
using dk::bytes;
DK_ENTRY_WITH_SCRATCH(act_quantize, "out x activation smooth rotate", bytes)
