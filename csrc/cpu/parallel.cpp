#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#ifdef DK_THREADS_STD  // the TSan build: it does not see libgomp's barriers
#include <thread>
#include <vector>
#endif

namespace {

// libgomp's stable entry points (LLVM's and Intel's runtimes have them too), as torch's import left them in the process.
void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*max_threads)() = nullptr;
int (*thread_num)() = nullptr;
int (*team_size)() = nullptr;
int (*in_parallel)() = nullptr;
bool forked = false;

template <class F>
void find(F& f, const char* name) {
    f = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

struct Work {
    void (*body)(void*, int64_t, int64_t);
    void* context;
    int64_t n;
};

void share(const Work& w, int64_t i, int64_t threads) {
    const int64_t begin = w.n * i / threads, end = w.n * (i + 1) / threads;
    if (begin < end) w.body(w.context, begin, end);
}

void team(void* p) { share(*static_cast<Work*>(p), thread_num(), team_size()); }

}  // namespace

extern "C" void dk_parallel_init() {
    find(gomp_parallel, "GOMP_parallel");
    find(max_threads, "omp_get_max_threads");
    find(thread_num, "omp_get_thread_num");
    find(team_size, "omp_get_num_threads");
    find(in_parallel, "omp_in_parallel");
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

extern "C" int64_t dk_parallel_threads() {
    const bool pool = gomp_parallel && max_threads && thread_num && team_size && in_parallel && !forked;
    return pool && !in_parallel() ? max_threads() : 1;
}

extern "C" void dk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    Work w{body, context, n};
#ifdef DK_THREADS_STD
    grain = 1;  // a race shows in small tensors too
#endif
    int64_t threads = n > grain ? dk_parallel_threads() : 1;
    if (threads > (n + grain - 1) / grain) threads = (n + grain - 1) / grain;
    if (threads <= 1) return n > 0 ? body(context, 0, n) : void();
#ifdef DK_THREADS_STD
    std::vector<std::thread> crew;
    for (int64_t i = 1; i < threads; ++i) crew.emplace_back([&w, i, threads] { share(w, i, threads); });
    share(w, 0, threads);
    for (auto& t : crew) t.join();
#else
    gomp_parallel(team, &w, static_cast<unsigned>(threads), 0);
#endif
}
