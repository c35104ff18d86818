// Threads for the CPU rungs: torch's own OpenMP pool, found in the running process rather than linked, so that there is
// never a second one. Serial where there is no pool, and in a forked child, whose pool did not survive the fork.
#pragma once

#include <cstdint>

extern "C" {
void dk_parallel_init();
// How many threads a parallel_for would use here and now, at most.
int64_t dk_parallel_threads();
// Calls body(context, begin, end) over disjoint ranges that cover [0, n), on at most one thread a `grain` of items.
void dk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
}

namespace dk {
namespace {
template <class F>
__attribute__((always_inline)) inline void parallel_for(int64_t n, int64_t grain, F& body) {
    dk_parallel_for(n, grain, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); }, &body);
}
}  // namespace
}  // namespace dk
