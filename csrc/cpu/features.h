// Which CPU rungs this processor, and the system it runs under, can run.
#pragma once

#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dk {

inline std::vector<const char*> features() {
    std::vector<const char*> has;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni"), bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (avx2) has.push_back("avx2");
    if (avx512) has.push_back("avx512");
    if (vnni) has.push_back("avx512_vnni");
    if (bf16) has.push_back("avx512_bf16");
#if defined(DK_EMULATE_DOTS)
    if (avx512) has.push_back("amx");
#elif defined(SYS_arch_prctl)
    constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8; not every compiler has names for them
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool amx = bf16 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles;
    // Linux saves a process's tiles from when it asks for them: ARCH_REQ_XCOMP_PERM, XTILEDATA.
    if (amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) has.push_back("amx");
#endif
#endif
    return has;
}

}  // namespace dk
