// The best group of each row, and the mean of the members of each group. No atomics: a block owns a group, finds its
// members in order and adds them up in order, so that results repeat bit for bit.
#include <initializer_list>

#include "launchers.h"
#include "vtc_cuda.h"

namespace vtc {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    choose_groups(const float* __restrict__ logits, int64_t tile_stride, int64_t group_stride, int64_t num_tiles,
                  int64_t num_groups, int64_t num_rows, const int64_t* __restrict__ given,
                  int64_t* __restrict__ groups) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= num_tiles * num_rows) return;
  if (given) {
    if (given[at] < 0 || given[at] >= num_groups) VTC_TRAP();
    groups[at] = given[at];
    return;
  }
  const float* scores = logits + at / num_rows * tile_stride + at % num_rows;
  float best = scores[0];
  int64_t chosen = 0;
  for (int64_t group = 1; group < num_groups; ++group) {
    const float score = scores[group * group_stride];
    if (score > best || (score != score && best == best)) {
      best = score;
      chosen = group;
    }
  }
  groups[at] = chosen;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    group_mean(const T* __restrict__ values, int64_t tile_stride, int64_t row_stride, int64_t num_groups,
               int64_t num_rows, int64_t width, const int64_t* __restrict__ groups, float eps, T* __restrict__ means,
               int64_t* __restrict__ counts) {
  // members among the rows that are looked at, and how many of them each warp found
  VTC_SHARED(int, members);
  int* found = members + kThreads;
  const int64_t tile = blockIdx.x / num_groups, group = blockIdx.x % num_groups;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* rows = values + tile * tile_stride + column;
  int64_t count = 0;
  float total[N] = {};
  for (int64_t base = 0; base < num_rows; base += kThreads) {
    const int64_t row = base + threadIdx.x;
    const bool member = row < num_rows && groups[tile * num_rows + row] == group;
    const unsigned votes = __ballot_sync(kFullMask, member);
    if (lane == 0) found[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
    for (int each = 0; each < kThreads / kWarp; ++each) {
      before += each < warp ? found[each] : 0;
      all += found[each];
    }
    if (member) members[before + __popc(votes & ((1u << lane) - 1))] = static_cast<int>(row);
    __syncthreads();
    // threads beyond the width stay for the barriers
    if (column < width) {
#pragma unroll 2
      for (int idx = 0; idx < all; ++idx) {
        float own[N];
        load<N>(rows + members[idx] * row_stride, own);
#pragma unroll
        for (int at = 0; at < N; ++at) total[at] += own[at];
      }
    }
    // the first barrier of the next round lies between this reading and the next writing
    count += all;
  }
  if (column < width) {
#pragma unroll
    for (int at = 0; at < N; ++at) total[at] = count ? total[at] / (static_cast<float>(count) + eps) : 0.0f;
    store<N>(means + static_cast<int64_t>(blockIdx.x) * width + column, total);
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) counts[blockIdx.x] = count;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    group_mean_backward(const T* __restrict__ grad, int64_t num_groups, int64_t num_rows, int64_t width,
                        const int64_t* __restrict__ groups, const int64_t* __restrict__ counts, float eps,
                        T* __restrict__ grad_values) {
  const int64_t at = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (column >= width) return;
  const int64_t group = groups[at];
  if (group < 0 || group >= num_groups) VTC_TRAP();
  const int64_t slot = at / num_rows * num_groups + group;
  const float divisor = static_cast<float>(counts[slot]) + eps;
  float values[N];
  load<N>(grad + slot * width + column, values);
#pragma unroll
  for (int lane = 0; lane < N; ++lane) values[lane] /= divisor;
  store<N>(grad_values + at * width + column, values);
}

}  // namespace
}  // namespace vtc

extern "C" int vtc_choose_groups(const float* logits, int64_t tile_stride, int64_t group_stride, VtcGroups shape,
                                 const int64_t* given, int64_t* groups, void* stream) {
  if (shape.num_tiles * shape.num_rows == 0) return 0;
  const dim3 grid = vtc::grid_of(vtc::ceil_div(shape.num_tiles * shape.num_rows, vtc::kThreads));
  VTC_LAUNCH(vtc::choose_groups, grid, vtc::kThreads, 0, stream, logits, tile_stride, group_stride, shape.num_tiles,
             shape.num_groups, shape.num_rows, given, groups);
  return vtc::launch_status();
}

extern "C" int vtc_group_mean(int dtype, const void* values, int64_t tile_stride, int64_t row_stride, VtcGroups shape,
                              const int64_t* groups, float eps, void* means, int64_t* counts, void* stream) {
  if (shape.num_tiles * shape.num_groups == 0) return 0;
  return vtc::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const T* rows = static_cast<const T*>(values);
    T* to = static_cast<T*>(means);
    const int pack = vtc::pack_size<T>({values, means}, {tile_stride, row_stride, shape.width});
    // one block of columns even without columns: it counts
    const int64_t columns = shape.width > 0 ? vtc::ceil_div(shape.width, vtc::kThreads * pack) : 1;
    const dim3 grid = vtc::grid_of(shape.num_tiles * shape.num_groups, columns);
    const size_t shared = (vtc::kThreads + vtc::kThreads / vtc::kWarp) * sizeof(int);
    if (pack == 1) {
      VTC_LAUNCH((vtc::group_mean<T, 1>), grid, vtc::kThreads, shared, stream, rows, tile_stride, row_stride,
                 shape.num_groups, shape.num_rows, shape.width, groups, eps, to, counts);
    } else {
      VTC_LAUNCH((vtc::group_mean<T, kPack>), grid, vtc::kThreads, shared, stream, rows, tile_stride, row_stride,
                 shape.num_groups, shape.num_rows, shape.width, groups, eps, to, counts);
    }
    return vtc::launch_status();
  });
}

extern "C" int vtc_group_mean_backward(int dtype, const void* grad, VtcGroups shape, const int64_t* groups,
                                       const int64_t* counts, float eps, void* grad_values, void* stream) {
  if (shape.num_tiles * shape.num_rows * shape.width == 0) return 0;
  return vtc::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const T* from = static_cast<const T*>(grad);
    T* to = static_cast<T*>(grad_values);
    const int pack = vtc::pack_size<T>({grad, grad_values}, {shape.width});
    const dim3 grid =
        vtc::grid_of(shape.num_tiles * shape.num_rows, vtc::ceil_div(shape.width, vtc::kThreads * pack));
    if (pack == 1) {
      VTC_LAUNCH((vtc::group_mean_backward<T, 1>), grid, vtc::kThreads, 0, stream, from, shape.num_groups,
                 shape.num_rows, shape.width, groups, counts, eps, to);
    } else {
      VTC_LAUNCH((vtc::group_mean_backward<T, kPack>), grid, vtc::kThreads, 0, stream, from, shape.num_groups,
                 shape.num_rows, shape.width, groups, counts, eps, to);
    }
    return vtc::launch_status();
  });
}
