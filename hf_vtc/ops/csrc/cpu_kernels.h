// What the CPU kernels offer to their glue: plain pointers, no torch header. Every function works on a range
// [first, last) of its work items, so that the caller decides how threads share them.
#pragma once

#include <cstdint>

namespace vtc {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of `width` elements; strides are in elements, and neighbours of a row lie side by side.
struct Rows {
  const void* data;
  int64_t stride;
};

// (T, side * side, width) grids of which the rows of each lie `row_stride` apart.
struct Grids {
  const void* data;
  int64_t tile_stride;
  int64_t row_stride;
  int64_t side;
  int64_t width;
};

// How a grid is folded: `factor` x `factor` neighbours into one row; `transposed` numbers folded rows by columns.
struct Folding {
  int64_t factor;
  bool transposed;
};

// Levels of a pyramid: level i halves the grid `halvings[i]` times and lies in `data[i]`, tile after tile.
struct Levels {
  const int64_t* halvings;
  void* const* data;
  int64_t count;
  int64_t deepest;
};

struct CpuKernels {
  // out[s] = sum of x[index[m]] over m in [offsets[s], offsets[s + 1]), divided by divisors[s]; 0 where there is none
  void (*segment_mean)(Dtype, Rows x, const int64_t* index, const int64_t* offsets, const float* divisors,
                       int64_t width, int64_t first, int64_t last, void* out);
  // out[r] = sum of grad[s] / divisors[s] over s = segments[m], m in [offsets[r], offsets[r + 1])
  void (*segment_mean_backward)(Dtype, Rows grad, const int64_t* segments, const int64_t* offsets,
                                const float* divisors, int64_t width, int64_t first, int64_t last, void* out);
  // items are folded rows; `tiles` may be null: all in order; `large`: no cache would hold `out`, rows are aligned
  void (*unshuffle_layernorm)(Dtype, Grids x, Folding folding, const int64_t* tiles, const float* weight,
                              const float* bias, float eps, int64_t first, int64_t last, void* out, bool large,
                              float* mean, float* rstd);
  // adds to grad_weight and grad_bias, which belong to this range alone
  void (*unshuffle_layernorm_backward)(Dtype, Rows grad, Grids x, Folding folding, const int64_t* tiles,
                                       const float* weight, const float* mean, const float* rstd, int64_t first,
                                       int64_t last, float* scratch, void* grad_x, float* grad_weight,
                                       float* grad_bias);
  // items are the blocks of the deepest level; `large`: no cache would hold the levels, whose rows are aligned
  void (*pool_pyramid)(Dtype, Grids x, Levels levels, bool large, int64_t first, int64_t last);
  void (*pool_pyramid_backward)(Dtype, Levels levels, int64_t side, int64_t width, int64_t first, int64_t last,
                                void* grad_x);
  // items are rows n of one tile: group[n] = the first index of the greatest of logits[:, n], NaN the greatest of all
  void (*argmax)(const float* logits, int64_t group_stride, int64_t num_groups, int64_t first, int64_t last,
                 int64_t* group);
};

extern const CpuKernels kernels_baseline;
#ifdef VTC_X86
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

}  // namespace vtc
