// Launchers of the CUDA kernels: plain pointers and a stream, so that neither side includes the other's headers. All
// tensors are on the stream's device; `dtype` 0 is float32, 1 bfloat16, 2 float16; strides are in elements, and the
// last dimension is dense. Each returns a cudaError_t as int. Sizes may be 0.
#pragma once

#include <cstdint>

extern "C" {

// out[s] (num_segments, width): mean of x[index[m]], m in [offsets[s], offsets[s + 1]). Rows out of range and offsets
// that do not rise from 0 to num_members trap.
int vtc_segment_mean(int dtype, const void* x, int64_t row_stride, int64_t num_rows, const int64_t* index,
                     int64_t num_members, const int64_t* offsets, int64_t num_segments, int64_t width, void* out,
                     void* stream);

// out[r] (num_rows, width): sum of grad[s] / length of segment s, s = segments[m], m in the range of row r. Segments
// without members that are named trap too.
int vtc_segment_mean_backward(int dtype, const void* grad, int64_t row_stride, int64_t num_segments,
                              const int64_t* segments, int64_t num_members, const int64_t* row_offsets,
                              int64_t num_rows, const int64_t* offsets, int64_t width, void* out, void* stream);

struct VtcGrids {
  int64_t num_tiles;
  int64_t tile_stride;
  int64_t row_stride;
  int64_t side;
  int64_t width;
};

// out (num_slots, rows, folded), mean and rstd (num_slots, rows); `tiles` null: all in order. A tile out of range, or
// named twice, traps.
int vtc_unshuffle_layernorm(int dtype, const void* features, VtcGrids grids, const int64_t* tiles, int64_t num_slots,
                            int64_t factor, bool transposed, const float* weight, const float* bias, float eps,
                            void* out, float* mean, float* rstd, void* stream);

// grad_features is dense, and zero where no tile writes. `partial` (2, parts, folded) is work space.
int vtc_unshuffle_layernorm_backward(int dtype, const void* grad, const void* features, VtcGrids grids,
                                     const int64_t* tiles, int64_t num_slots, int64_t factor, bool transposed,
                                     const float* weight, const float* mean, const float* rstd, int64_t parts,
                                     float* partial, void* grad_features, float* grad_weight, float* grad_bias,
                                     void* stream);

// Level i halves a grid halvings[i] times and goes to outs[i], dense; both arrays are on the host.
int vtc_pool_pyramid(int dtype, const void* features, VtcGrids grids, const int64_t* halvings, void* const* outs,
                     int num_levels, void* stream);

// The inverse: grids gives the shape of the dense grad_features.
int vtc_pool_pyramid_backward(int dtype, const void* const* grads, VtcGrids grids, const int64_t* halvings,
                              int num_levels, void* grad_features, void* stream);

struct VtcGroups {
  int64_t num_tiles;
  int64_t num_groups;
  int64_t num_rows;
  int64_t width;
};

// groups (T, N) from logits (T, G, N), or copied from `given`, which is checked; NaN is the greatest score.
int vtc_choose_groups(const float* logits, int64_t tile_stride, int64_t group_stride, VtcGroups shape,
                      const int64_t* given, int64_t* groups, void* stream);

// means (T, G, C) of values (T, N, C) by groups (T, N), divided by count + eps; counts (T, G).
int vtc_group_mean(int dtype, const void* values, int64_t tile_stride, int64_t row_stride, VtcGroups shape,
                   const int64_t* groups, float eps, void* means, int64_t* counts, void* stream);

// grad_values (T, N, C) from grad (T, G, C).
int vtc_group_mean_backward(int dtype, const void* grad, VtcGroups shape, const int64_t* groups,
                            const int64_t* counts, float eps, void* grad_values, void* stream);
}
