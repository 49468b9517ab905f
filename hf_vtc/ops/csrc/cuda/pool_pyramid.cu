// Every granularity of a grid in one pass: a thread holds one pack of columns of one block of the deepest level, adds
// neighbours up level by level, and writes the levels that are wanted on the way.
#include <initializer_list>

#include "launchers.h"
#include "vtc_cuda.h"

namespace vtc {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHalvings = 4;

// By value to the kernel: where each level is, null where it is not wanted; pooled levels are written, and read for the
// gradient.
struct Pyramid {
  void* levels[kMaxHalvings + 1];
  int side;
  int width;
};

// columns are halved first, then rows, in turns
template <int kLevel>
constexpr int kRows = 1 << (kLevel / 2);
template <int kLevel>
constexpr int kColumns = 1 << (kLevel - kLevel / 2);

template <class T, int N>
struct Walk {
  const Pyramid& pyramid;
  int64_t tile;
  int column;

  // the pooled row of the level's block at (down, right), or null
  template <int kLevel>
  VTC_DEVICE T* pooled(int down, int right) const {
    T* rows = static_cast<T*>(pyramid.levels[kLevel]);
    if (!rows) return nullptr;
    const int across = pyramid.side / kColumns<kLevel>, per_tile = across * (pyramid.side / kRows<kLevel>);
    const int place = down / kRows<kLevel> * across + right / kColumns<kLevel>;
    return rows + (tile * per_tile + place) * pyramid.width + column;
  }

  // Sum of the block of kLevel at (down, right).
  template <int kLevel>
  VTC_DEVICE void pool(const T* features, int64_t row_stride, int down, int right, float (&total)[N]) const {
    if constexpr (kLevel == 0) {
      load<N>(features + (down * pyramid.side + right) * row_stride + column, total);
    } else {
      constexpr int kDown = kLevel % 2 ? 0 : kRows<kLevel - 1>, kRight = kLevel % 2 ? kColumns<kLevel - 1> : 0;
      float other[N];
      pool<kLevel - 1>(features, row_stride, down, right, total);
      pool<kLevel - 1>(features, row_stride, down + kDown, right + kRight, other);
#pragma unroll
      for (int lane = 0; lane < N; ++lane) total[lane] += other[lane];
      if (T* to = pooled<kLevel>(down, right)) {
        float mean[N];
#pragma unroll
        for (int lane = 0; lane < N; ++lane) mean[lane] = total[lane] * (1.0f / (1 << kLevel));
        store<N>(to, mean);
      }
    }
  }

  // What every token of the block gets from its level and those above.
  template <int kLevel>
  VTC_DEVICE void spread(T* grad_features, int down, int right, const float (&above)[N]) const {
    if constexpr (kLevel == 0) {
      store<N>(grad_features + static_cast<int64_t>(down * pyramid.side + right) * pyramid.width + column, above);
    } else {
      constexpr int kDown = kLevel % 2 ? 0 : kRows<kLevel - 1>, kRight = kLevel % 2 ? kColumns<kLevel - 1> : 0;
      float shared[N] = {};
      if (const T* from = pooled<kLevel>(down, right)) load<N>(from, shared);
#pragma unroll
      for (int lane = 0; lane < N; ++lane) shared[lane] = above[lane] + shared[lane] * (1.0f / (1 << kLevel));
      spread<kLevel - 1>(grad_features, down, right, shared);
      spread<kLevel - 1>(grad_features, down + kDown, right + kRight, shared);
    }
  }
};

// Pools `grids`, or fills them with the gradient of the levels.
template <class T, int N, int kDeepest, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1)
    walk_pyramid(T* __restrict__ grids, int64_t tile_stride, int64_t row_stride, int64_t num_blocks, Pyramid pyramid) {
  const int packs = pyramid.width / N;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= num_blocks * packs) return;
  const int64_t block = thread / packs;
  const int across = pyramid.side / kColumns<kDeepest>, per_tile = across * (pyramid.side / kRows<kDeepest>);
  const int place = static_cast<int>(block % per_tile);
  const int down = place / across * kRows<kDeepest>, right = place % across * kColumns<kDeepest>;
  const Walk<T, N> walk = {pyramid, block / per_tile, static_cast<int>(thread % packs) * N};
  T* grid = grids + walk.tile * tile_stride;
  float values[N] = {};
  if constexpr (kGradient) {
    walk.template spread<kDeepest>(grid, down, right, values);
  } else {
    walk.template pool<kDeepest>(grid, row_stride, down, right, values);
  }
}

template <class T, int N, bool kGradient, int kDeepest>
int launch_deepest(int deepest, T* data, const VtcGrids& grids, const Pyramid& pyramid, void* stream) {
  if constexpr (kDeepest > 1) {
    if (deepest < kDeepest) {
      return launch_deepest<T, N, kGradient, kDeepest - 1>(deepest, data, grids, pyramid, stream);
    }
  }
  const int64_t blocks = grids.num_tiles * (grids.side * grids.side >> kDeepest);
  const dim3 grid = grid_of(ceil_div(blocks * (grids.width / N), kThreads));
  VTC_LAUNCH((walk_pyramid<T, N, kDeepest, kGradient>), grid, kThreads, 0, stream, data, grids.tile_stride,
             grids.row_stride, blocks, pyramid);
  return launch_status();
}

template <bool kGradient>
int launch(int dtype, void* data, const VtcGrids& grids, const int64_t* halvings, void* const* levels, int num_levels,
           void* stream) {
  if (grids.num_tiles == 0 || grids.side == 0 || grids.width == 0 || num_levels == 0) return 0;
  Pyramid pyramid = {};
  int64_t deepest = 0;
  for (int level = 0; level < num_levels; ++level) {
    pyramid.levels[halvings[level]] = levels[level];
    deepest = halvings[level] > deepest ? halvings[level] : deepest;
  }
  pyramid.side = static_cast<int>(grids.side);
  pyramid.width = static_cast<int>(grids.width);
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    int pack = pack_size<T>({data}, {grids.width, grids.row_stride, grids.tile_stride});
    for (int level = 0; level < num_levels; ++level) pack = pack_size<T>({levels[level]}, {}) == 1 ? 1 : pack;
    T* typed = static_cast<T*>(data);
    if (pack == 1) {
      return launch_deepest<T, 1, kGradient, kMaxHalvings>(static_cast<int>(deepest), typed, grids, pyramid, stream);
    }
    return launch_deepest<T, kPack, kGradient, kMaxHalvings>(static_cast<int>(deepest), typed, grids, pyramid, stream);
  });
}

}  // namespace
}  // namespace vtc

// One kernel template reads and writes both, so constness ends here: pooling writes no grid, the gradient no level.
extern "C" int vtc_pool_pyramid(int dtype, const void* features, VtcGrids grids, const int64_t* halvings,
                                void* const* outs, int num_levels, void* stream) {
  return vtc::launch<false>(dtype, const_cast<void*>(features), grids, halvings, outs, num_levels, stream);
}

extern "C" int vtc_pool_pyramid_backward(int dtype, const void* const* grads, VtcGrids grids, const int64_t* halvings,
                                         int num_levels, void* grad_features, void* stream) {
  return vtc::launch<true>(dtype, grad_features, grids, halvings, const_cast<void* const*>(grads), num_levels, stream);
}
