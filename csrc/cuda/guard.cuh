// What surrounds every call on a CUDA rung: the tensors' device is current, then again the one that was; a launch that
// failed is an error in words, one for which this GPU has no code a refusal.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>

namespace dk {
namespace {

class Guard {
  public:
    explicit Guard(int device) : now(device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != now) error = cudaSetDevice(now);
    }
    ~Guard() {
        if (before != now && in_use(before)) cudaSetDevice(before);
    }
    const char* failure() {
        if (error == cudaSuccess) error = cudaPeekAtLastError();
        if (error == cudaSuccess) return nullptr;
        cudaGetLastError();  // the next call starts clean
        if (error == cudaErrorNoKernelImageForDevice) return "not built for this GPU's architecture";
        static thread_local char text[256];
        std::snprintf(text, sizeof text, "!CUDA: %s", cudaGetErrorString(error));
        return text;
    }

  private:
    // Going back to a device that nobody has used would create a context there, hundreds of megabytes large.
    static bool in_use(int device) {
        using State = int (*)(int, unsigned*, int*);
        static const auto state =
            reinterpret_cast<State>(dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), "cuDevicePrimaryCtxGetState"));
        unsigned flags = 0;
        int active = 1;
        if (state) state(device, &flags, &active);
        return active != 0;
    }
    int before = -1, now;
    cudaError_t error;
};

}  // namespace
}  // namespace dk
