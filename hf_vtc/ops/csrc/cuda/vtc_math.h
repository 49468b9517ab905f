// Element types and vector loads of the CUDA kernels, in plain C++ where no nvcc is at work: neither torch nor the
// toolkit's half precision headers are needed, and the tests run the same code on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VTC_DEVICE __device__ __forceinline__
#else
#define VTC_DEVICE inline
#endif

namespace vtc {

struct Half {
  uint16_t bits;
};

struct BFloat {
  uint16_t bits;
};

template <class To, class From>
VTC_DEVICE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

VTC_DEVICE float widen(float value) { return value; }

VTC_DEVICE float widen(BFloat value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }

VTC_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
  float wide = bits_of<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) wide = bits_of<float>((magnitude << 13) | 0x7f800000u);
  return bits_of<float>(bits_of<uint32_t>(wide) | sign);
#endif
}

// rounded to nearest even
template <class T>
VTC_DEVICE T narrow(float value);

template <>
VTC_DEVICE float narrow<float>(float value) {
  return value;
}

template <>
VTC_DEVICE BFloat narrow<BFloat>(float value) {
#if defined(__CUDA_ARCH__)
  BFloat result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  uint32_t bits = bits_of<uint32_t>(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
VTC_DEVICE Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  uint32_t bits = bits_of<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // adding 0.5 leaves the subnormal number in the low bits, rounded by the addition
    rounded = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
#endif
}

// N neighbours that are read and written at once; the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

template <int N, class T>
VTC_DEVICE void widen_pack(const Pack<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int idx = 0; idx < N; ++idx) to[idx] = widen(from.lane[idx]);
}

template <int N, class T>
VTC_DEVICE Pack<T, N> load_pack(const T* from) {
#if !defined(__CUDACC__)
  // compilers' sanitizers do not look at copies of whole structs
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, N>) != 0) __builtin_trap();
#endif
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, class T>
VTC_DEVICE void load(const T* from, float (&to)[N]) {
  widen_pack<N>(load_pack<N>(from), to);
}

template <int N, class T>
VTC_DEVICE void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int idx = 0; idx < N; ++idx) pack.lane[idx] = narrow<T>(from[idx]);
#if !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(pack) != 0) __builtin_trap();
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

}  // namespace vtc
