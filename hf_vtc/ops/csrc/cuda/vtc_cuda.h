// What every kernel file needs: launching, reductions, dispatch over element types. A test that runs kernels on the CPU
// defines VTC_HOSTSIM and brings its own launcher, barriers and shuffles.
#pragma once

#include "vtc_math.h"

#if defined(VTC_HOSTSIM)
#include "hostsim.h"
#else
#include <cuda_runtime.h>

// shared memory is dynamic only, so that its size stands at the launch
#define VTC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#define VTC_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define VTC_TRAP() __trap()
#endif

namespace vtc {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Sum over a block, the same in every thread; `partial` holds one float per warp.
VTC_DEVICE float block_sum(float value, float* partial) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += partial[warp];
  // the next sum writes to the same place
  __syncthreads();
  return total;
}

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// A grid of blocks; what no device can launch becomes an empty one, which every device refuses.
inline dim3 grid_of(int64_t x, int64_t y = 1) {
  const bool fits = x <= 0x7fffffff && y <= 65535;
  return dim3(fits ? static_cast<unsigned>(x) : 0, fits ? static_cast<unsigned>(y) : 0);
}

// elements of a 16-byte vector, if every address and stride allows it, else 1
template <class T>
int pack_size(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  constexpr int kPack = 16 / sizeof(T);
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return 1;
  }
  for (int64_t stride : strides) {
    if (stride % kPack != 0) return 1;
  }
  return kPack;
}

// call(T{}) for the element type of number `dtype`
template <class Call>
int by_dtype(int dtype, Call call) {
  if (dtype == 0) return call(float{});
  if (dtype == 1) return call(BFloat{});
  return call(Half{});
}

inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

}  // namespace vtc
