// The device of bind_cuda.cpp when its kernels run in the simulator: the CPU, which has no stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define VTC_DISPATCH_KEY CPU

namespace vtc {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
inline void* stream_of(const torch::stable::Tensor&) { return nullptr; }

}  // namespace vtc
