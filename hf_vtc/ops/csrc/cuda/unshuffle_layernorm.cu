// Folding of grid neighbours and LayerNorm in one pass: one block per folded row, which stays in registers. The
// gradient of weight and bias is summed in two stages of fixed order.
#include <initializer_list>

#include "launchers.h"
#include "vtc_cuda.h"

namespace vtc {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 512;
constexpr int kPacksInRegisters = 8;

struct Folding {
  int64_t tile_stride;
  int64_t row_stride;
  int side;
  int width;
  int factor;
  bool transposed;

  VTC_DEVICE int small() const { return side / factor; }
  VTC_DEVICE int folded() const { return factor * factor * width; }
};

// Where folded row `item` begins in the data; `token` is its first one.
struct FoldedRow {
  int64_t tile_offset;
  int token;

  VTC_DEVICE FoldedRow(const Folding& folding, const int64_t* tiles, int64_t num_tiles, int64_t item) {
    const int small = folding.small(), rows = small * small;
    const int64_t slot = item / rows;
    const int place = static_cast<int>(item % rows);
    const int64_t tile = tiles ? tiles[slot] : slot;
    if (tile < 0 || tile >= num_tiles) VTC_TRAP();
    const int row = folding.transposed ? place % small : place / small;
    const int column = folding.transposed ? place / small : place % small;
    tile_offset = tile * folding.tile_stride;
    token = row * folding.factor * folding.side + column * folding.factor;
  }

  // offset of element `at` of the folded row
  VTC_DEVICE int64_t offset(const Folding& folding, int at) const {
    const int neighbour = at / folding.width;
    const int down = neighbour / folding.factor, right = neighbour % folding.factor;
    return tile_offset + (token + down * folding.side + right) * folding.row_stride + at % folding.width;
  }
};

// Traps if the tile of folded row `item` is named by another slot as well: two blocks would write to one place. The
// threads of a block share the search.
VTC_DEVICE void check_named_once(const Folding& folding, const int64_t* tiles, int64_t num_slots, int64_t item) {
  if (!tiles) return;
  const int64_t own = item / (folding.small() * folding.small());
  for (int64_t slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    if (slot != own && tiles[slot] == tiles[own]) VTC_TRAP();
  }
}

// kPacks packs of each thread are kept in registers; with 0 the row is read three times, which any width allows.
template <class T, int N, int kPacks>
__global__ void __launch_bounds__(kMostThreads, 1)
    normalize(const T* __restrict__ features, Folding folding, const int64_t* __restrict__ tiles, int64_t num_tiles,
              int64_t num_slots, const float* __restrict__ weight, const float* __restrict__ bias, float eps, T* __restrict__ out,
              float* __restrict__ means, float* __restrict__ rstds) {
  VTC_SHARED(float, partial);
  const int64_t item = blockIdx.x;
  check_named_once(folding, tiles, num_slots, item);
  const FoldedRow row(folding, tiles, num_tiles, item);
  const int folded = folding.folded(), step = blockDim.x * N;
  // as they came: float32 would take twice the registers of half precision
  Pack<T, N> kept[kPacks > 0 ? kPacks : 1];

  // body(values, column) over this thread's packs; `first` fills the registers
  const auto for_packs = [&](bool first, auto body) {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        const int at = static_cast<int>(threadIdx.x) * N + pack * step;
        if (at < folded) {
          if (first) kept[pack] = load_pack<N>(features + row.offset(folding, at));
          float values[N];
          widen_pack<N>(kept[pack], values);
          body(values, at);
        }
      }
    } else {
      for (int at = threadIdx.x * N; at < folded; at += step) {
        float values[N];
        load<N>(features + row.offset(folding, at), values);
        body(values, at);
      }
    }
  };

  float sum = 0;
  for_packs(true, [&](const float(&values)[N], int) {
#pragma unroll
    for (int lane = 0; lane < N; ++lane) sum += values[lane];
  });
  const float mean = block_sum(sum, partial) / folded;
  float squares = 0;
  for_packs(false, [&](const float(&values)[N], int) {
#pragma unroll
    for (int lane = 0; lane < N; ++lane) squares += (values[lane] - mean) * (values[lane] - mean);
  });
  const float rstd = 1.0f / sqrtf(block_sum(squares, partial) / folded + eps);
  for_packs(false, [&](const float(&values)[N], int at) {
    float scale[N], shift[N], normed[N];
    load<N>(weight + at, scale);
    load<N>(bias + at, shift);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) normed[lane] = (values[lane] - mean) * rstd * scale[lane] + shift[lane];
    store<N>(out + item * folded + at, normed);
  });
  if (threadIdx.x == 0) {
    means[item] = mean;
    rstds[item] = rstd;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    normalize_backward(const T* __restrict__ grad, const T* __restrict__ features, Folding folding, Folding dense,
                       const int64_t* __restrict__ tiles, int64_t num_tiles, int64_t num_slots,
                       const float* __restrict__ weight, const float* __restrict__ means, const float* __restrict__ rstds,
                       T* __restrict__ grad_features) {
  VTC_SHARED(float, partial);
  const int64_t item = blockIdx.x;
  check_named_once(folding, tiles, num_slots, item);
  const FoldedRow row(folding, tiles, num_tiles, item), to(dense, tiles, num_tiles, item);
  const int folded = folding.folded();
  const float mean = means[item], rstd = rstds[item];
  float sum = 0, product = 0;
  for (int at = threadIdx.x * N; at < folded; at += kThreads * N) {
    float values[N], upstream[N], scale[N];
    load<N>(features + row.offset(folding, at), values);
    load<N>(grad + item * folded + at, upstream);
    load<N>(weight + at, scale);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      sum += upstream[lane] * scale[lane];
      product += upstream[lane] * scale[lane] * (values[lane] - mean) * rstd;
    }
  }
  sum = block_sum(sum, partial) / folded;
  product = block_sum(product, partial) / folded;
  // what the block has just read comes from the cache
  for (int at = threadIdx.x * N; at < folded; at += kThreads * N) {
    float values[N], upstream[N], scale[N];
    load<N>(features + row.offset(folding, at), values);
    load<N>(grad + item * folded + at, upstream);
    load<N>(weight + at, scale);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      const float normed = (values[lane] - mean) * rstd;
      values[lane] = (upstream[lane] * scale[lane] - sum - normed * product) * rstd;
    }
    store<N>(grad_features + to.offset(dense, at), values);
  }
}

// Sums over the rows of one part, for N columns per thread: partial[0] of weight, partial[1] of bias.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    affine_partial(const T* __restrict__ grad, const T* __restrict__ features, Folding folding,
                   const int64_t* __restrict__ tiles, int64_t num_tiles, const float* __restrict__ means,
                   const float* __restrict__ rstds, int64_t num_rows, int64_t parts, float* __restrict__ partial) {
  const int folded = folding.folded();
  const int64_t part = blockIdx.y;
  const int at = (blockIdx.x * kThreads + threadIdx.x) * N;
  if (at >= folded) return;
  float of_weight[N] = {}, of_bias[N] = {};
  const int64_t last = (part + 1) * num_rows / parts;
  for (int64_t item = part * num_rows / parts; item < last; ++item) {
    const FoldedRow row(folding, tiles, num_tiles, item);
    const float mean = means[item], rstd = rstds[item];
    float values[N], upstream[N];
    load<N>(features + row.offset(folding, at), values);
    load<N>(grad + item * folded + at, upstream);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      of_weight[lane] += upstream[lane] * (values[lane] - mean) * rstd;
      of_bias[lane] += upstream[lane];
    }
  }
  store<N>(partial + part * folded + at, of_weight);
  store<N>(partial + (parts + part) * folded + at, of_bias);
}

__global__ void __launch_bounds__(kThreads)
    affine_total(const float* __restrict__ partial, int64_t parts, int64_t folded, float* __restrict__ grad_weight,
                 float* __restrict__ grad_bias) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= folded) return;
  float of_weight = 0, of_bias = 0;
  for (int64_t part = 0; part < parts; ++part) {
    of_weight += partial[part * folded + at];
    of_bias += partial[(parts + part) * folded + at];
  }
  grad_weight[at] = of_weight;
  grad_bias[at] = of_bias;
}

Folding folding_of(const VtcGrids& grids, int64_t factor, bool transposed) {
  return {grids.tile_stride, grids.row_stride, static_cast<int>(grids.side), static_cast<int>(grids.width),
          static_cast<int>(factor), transposed};
}

struct Shape {
  int64_t num_rows;
  int64_t folded;
};

Shape shape_of(const VtcGrids& grids, int64_t num_slots, int64_t factor) {
  const int64_t small = grids.side / factor;
  return {num_slots * small * small, factor * factor * grids.width};
}

template <class T, int N>
int launch_normalize(const void* features, const VtcGrids& grids, const int64_t* tiles, int64_t num_slots,
                     int64_t factor, bool transposed, const float* weight, const float* bias, float eps, void* out,
                     float* mean, float* rstd, void* stream) {
  const Shape shape = shape_of(grids, num_slots, factor);
  const Folding folding = folding_of(grids, factor, transposed);
  const int64_t packs = shape.folded / N;
  // enough threads to keep the row in registers, as long as there are so many
  const int threads = ceil_div(packs, kThreads) > kPacksInRegisters ? kMostThreads : kThreads;
  const int64_t per_thread = ceil_div(packs, threads);
  const size_t shared = threads / kWarp * sizeof(float);
  const dim3 grid = grid_of(shape.num_rows);
  const auto launch = [&](auto kernel) {
    VTC_LAUNCH(kernel, grid, threads, shared, stream, static_cast<const T*>(features), folding, tiles,
               grids.num_tiles, num_slots, weight, bias, eps, static_cast<T*>(out), mean, rstd);
  };
  if (per_thread <= 1) {
    launch(normalize<T, N, 1>);
  } else if (per_thread <= 2) {
    launch(normalize<T, N, 2>);
  } else if (per_thread <= 4) {
    launch(normalize<T, N, 4>);
  } else if (per_thread <= kPacksInRegisters) {
    launch(normalize<T, N, kPacksInRegisters>);
  } else {
    launch(normalize<T, N, 0>);
  }
  return launch_status();
}

template <class T, int N>
int launch_backward(const void* grad, const void* features, const VtcGrids& grids, const int64_t* tiles,
                    int64_t num_slots, int64_t factor, bool transposed, const float* weight, const float* mean,
                    const float* rstd, int64_t parts, float* partial, void* grad_features, float* grad_weight,
                    float* grad_bias, void* stream) {
  const Shape shape = shape_of(grids, num_slots, factor);
  const Folding folding = folding_of(grids, factor, transposed);
  Folding dense = folding;
  dense.row_stride = grids.width;
  dense.tile_stride = grids.side * grids.side * grids.width;
  const T *upstream = static_cast<const T*>(grad), *values = static_cast<const T*>(features);
  const dim3 rows = grid_of(shape.num_rows);
  VTC_LAUNCH((normalize_backward<T, N>), rows, kThreads, kThreads / kWarp * sizeof(float), stream, upstream, values,
             folding, dense, tiles, grids.num_tiles, num_slots, weight, mean, rstd, static_cast<T*>(grad_features));
  const dim3 columns = grid_of(ceil_div(shape.folded, kThreads * N), parts);
  VTC_LAUNCH((affine_partial<T, N>), columns, kThreads, 0, stream, upstream, values, folding, tiles, grids.num_tiles,
             mean, rstd, shape.num_rows, parts, partial);
  const dim3 totals = grid_of(ceil_div(shape.folded, kThreads));
  VTC_LAUNCH(affine_total, totals, kThreads, 0, stream, partial, parts, shape.folded, grad_weight, grad_bias);
  return launch_status();
}

}  // namespace
}  // namespace vtc

extern "C" int vtc_unshuffle_layernorm(int dtype, const void* features, VtcGrids grids, const int64_t* tiles,
                                       int64_t num_slots, int64_t factor, bool transposed, const float* weight,
                                       const float* bias, float eps, void* out, float* mean, float* rstd,
                                       void* stream) {
  if (num_slots == 0 || grids.side == 0 || grids.width == 0) return 0;
  return vtc::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const int pack = vtc::pack_size<T>({features, out, weight, bias},
                                       {grids.width, grids.row_stride, grids.tile_stride});
    if (pack == 1) {
      return vtc::launch_normalize<T, 1>(features, grids, tiles, num_slots, factor, transposed, weight, bias, eps, out,
                                         mean, rstd, stream);
    }
    return vtc::launch_normalize<T, kPack>(features, grids, tiles, num_slots, factor, transposed, weight, bias, eps,
                                           out, mean, rstd, stream);
  });
}

extern "C" int vtc_unshuffle_layernorm_backward(int dtype, const void* grad, const void* features, VtcGrids grids,
                                                const int64_t* tiles, int64_t num_slots, int64_t factor,
                                                bool transposed, const float* weight, const float* mean,
                                                const float* rstd, int64_t parts, float* partial, void* grad_features,
                                                float* grad_weight, float* grad_bias, void* stream) {
  if (num_slots == 0 || grids.side == 0 || grids.width == 0) return 0;
  return vtc::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const int pack = vtc::pack_size<T>({grad, features, weight, partial, grad_features},
                                       {grids.width, grids.row_stride, grids.tile_stride});
    if (pack == 1) {
      return vtc::launch_backward<T, 1>(grad, features, grids, tiles, num_slots, factor, transposed, weight, mean,
                                        rstd, parts, partial, grad_features, grad_weight, grad_bias, stream);
    }
    return vtc::launch_backward<T, kPack>(grad, features, grids, tiles, num_slots, factor, transposed, weight, mean,
                                          rstd, parts, partial, grad_features, grad_weight, grad_bias, stream);
  });
}
