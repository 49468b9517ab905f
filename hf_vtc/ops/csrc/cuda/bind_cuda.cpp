// CUDA implementations of the ops that hf_vtc/models/ops_vtc.py defines. Implementations only, as in bind_cpu.cpp. What
// would need a look at the values (indices in range) is left to the kernels, which trap: nothing here waits for the GPU.
#include "../checks.h"
#include "launchers.h"

#include <torch/csrc/stable/accelerator.h>

// libtorch_cuda exports it; the header shows it to builds against a CUDA toolkit only
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vtc {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::accelerator::DeviceGuard;

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int status) { STD_TORCH_CHECK(status == 0, "A CUDA kernel of hf_vtc failed: error ", status, "."); }

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), "`", name,
                  "` must be on the same CUDA device as the rest.");
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* out_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor to_float(const Tensor& tensor) { return contiguous(torch::stable::to(tensor, ScalarType::Float)); }

VtcGrids grids_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.stride(0), tensor.stride(1), side_of(tensor.size(1)), tensor.size(2)};
}

Tensor segment_mean(Tensor x, Tensor index, Tensor offsets) {
  int32_t dtype = element_type(x, "x");
  DeviceGuard guard(x.get_device_index());
  check_rank(x, 2, "x");
  check_ragged(index, offsets);
  check_device(index, x, "index"), check_device(offsets, x, "offsets");
  x = dense_rows(x), index = contiguous(index), offsets = contiguous(offsets);
  int64_t num_segments = offsets.size(0) - 1, width = x.size(1);
  Tensor out = new_empty(x, {num_segments, width});
  check_launch(vtc_segment_mean(dtype, x.const_data_ptr(), x.stride(0), x.size(0), data_of<int64_t>(index),
                                data_of<int64_t>(offsets), num_segments, width, out_of<void>(out), stream_of(x)));
  return out;
}

Tensor segment_mean_backward(Tensor grad, Tensor segments, Tensor row_offsets, Tensor offsets) {
  int32_t dtype = element_type(grad, "grad");
  DeviceGuard guard(grad.get_device_index());
  check_rank(grad, 2, "grad");
  check_ragged(segments, row_offsets);
  check_ragged(segments, offsets);
  check_device(segments, grad, "segments"), check_device(row_offsets, grad, "row_offsets");
  check_device(offsets, grad, "offsets");
  STD_TORCH_CHECK(offsets.size(0) == grad.size(0) + 1, "`offsets` must have one entry more than `grad` has rows.");
  grad = dense_rows(grad), segments = contiguous(segments);
  row_offsets = contiguous(row_offsets), offsets = contiguous(offsets);
  int64_t num_rows = row_offsets.size(0) - 1, width = grad.size(1);
  Tensor out = new_empty(grad, {num_rows, width});
  check_launch(vtc_segment_mean_backward(dtype, grad.const_data_ptr(), grad.stride(0), grad.size(0),
                                         data_of<int64_t>(segments), data_of<int64_t>(row_offsets),
                                         data_of<int64_t>(offsets), num_rows, width, out_of<void>(out),
                                         stream_of(grad)));
  return out;
}

struct Fold {
  std::optional<Tensor> tiles;
  int64_t num_slots;
  int64_t rows_per_tile;
  int64_t folded;

  Fold(const Tensor& features, const std::optional<Tensor>& given, const Tensor& weight, int64_t factor) {
    check_rank(features, 3, "features");
    int64_t side = side_of(features.size(1));
    STD_TORCH_CHECK(factor >= 1 && side % factor == 0, "The side of a grid, ", side, ", must be a multiple of ",
                    "`factor`, ", factor, ".");
    folded = factor * factor * features.size(2);
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == folded, "`weight` must have ", folded, " entries.");
    rows_per_tile = (side / factor) * (side / factor);
    num_slots = features.size(0);
    if (given.has_value()) {
      check_rank(*given, 1, "tiles");
      check_type(*given, ScalarType::Long, "tiles", "int64");
      check_device(*given, features, "tiles");
      tiles = contiguous(*given);
      num_slots = tiles->size(0);
    }
  }

  const int64_t* data() const { return tiles.has_value() ? data_of<int64_t>(*tiles) : nullptr; }
};

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm(Tensor features, std::optional<Tensor> tiles, Tensor weight,
                                                       Tensor bias, int64_t factor, bool transposed, double eps) {
  int32_t dtype = element_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  Fold fold(features, tiles, weight, factor);
  check_device(weight, features, "weight"), check_device(bias, features, "bias");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == fold.folded, "`bias` must have ", fold.folded, " entries.");
  features = dense_rows(features), weight = to_float(weight), bias = to_float(bias);
  Tensor out = new_empty(features, {fold.num_slots, fold.rows_per_tile, fold.folded});
  Tensor mean = new_empty(features, {fold.num_slots, fold.rows_per_tile}, ScalarType::Float);
  Tensor rstd = new_empty(features, {fold.num_slots, fold.rows_per_tile}, ScalarType::Float);
  check_launch(vtc_unshuffle_layernorm(dtype, features.const_data_ptr(), grids_of(features), fold.data(),
                                       fold.num_slots, factor, transposed, data_of<float>(weight),
                                       data_of<float>(bias), static_cast<float>(eps), out_of<void>(out),
                                       out_of<float>(mean), out_of<float>(rstd), stream_of(features)));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm_backward(Tensor grad, Tensor features,
                                                                std::optional<Tensor> tiles, Tensor weight,
                                                                Tensor mean, Tensor rstd, int64_t factor,
                                                                bool transposed) {
  int32_t dtype = element_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  STD_TORCH_CHECK(grad.scalar_type() == features.scalar_type(), "`grad` and `features` must have the same dtype.");
  Fold fold(features, tiles, weight, factor);
  int64_t num_rows = fold.num_slots * fold.rows_per_tile;
  STD_TORCH_CHECK(grad.numel() == num_rows * fold.folded, "`grad` must have ", num_rows * fold.folded, " elements.");
  STD_TORCH_CHECK(mean.numel() == num_rows && rstd.numel() == num_rows, "`mean` and `rstd` must have ", num_rows,
                  " entries.");
  check_device(grad, features, "grad"), check_device(weight, features, "weight");
  check_device(mean, features, "mean"), check_device(rstd, features, "rstd");
  features = dense_rows(features), weight = to_float(weight), mean = to_float(mean), rstd = to_float(rstd);
  grad = contiguous(grad);
  // tiles that are not folded get no gradient
  Tensor grad_x =
      fold.tiles.has_value() ? new_zeros(features, features.sizes()) : new_empty(features, features.sizes());
  if (num_rows * fold.folded == 0) {
    return {grad_x, new_zeros(weight, {fold.folded}), new_zeros(weight, {fold.folded})};
  }
  int64_t parts = num_rows < 64 ? num_rows : 64;
  Tensor partial = new_empty(weight, {2, parts, fold.folded});
  Tensor grad_weight = new_empty(weight, {fold.folded}), grad_bias = new_empty(weight, {fold.folded});
  check_launch(vtc_unshuffle_layernorm_backward(
      dtype, grad.const_data_ptr(), features.const_data_ptr(), grids_of(features), fold.data(), fold.num_slots, factor,
      transposed, data_of<float>(weight), data_of<float>(mean), data_of<float>(rstd), parts, out_of<float>(partial),
      out_of<void>(grad_x), out_of<float>(grad_weight), out_of<float>(grad_bias), stream_of(features)));
  return {grad_x, grad_weight, grad_bias};
}

constexpr int64_t kMaxHalvings = 4;

std::vector<Tensor> pool_pyramid(Tensor features, std::vector<int64_t> halvings) {
  int32_t dtype = element_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  check_rank(features, 3, "features");
  features = dense_rows(features);
  deepest_level(halvings, features.size(1), kMaxHalvings);
  std::vector<Tensor> outs;
  std::vector<void*> data;
  for (int64_t level : halvings) {
    outs.push_back(new_empty(features, {features.size(0), features.size(1) >> level, features.size(2)}));
    data.push_back(outs.back().mutable_data_ptr());
  }
  check_launch(vtc_pool_pyramid(dtype, features.const_data_ptr(), grids_of(features), halvings.data(), data.data(),
                                static_cast<int>(halvings.size()), stream_of(features)));
  return outs;
}

Tensor pool_pyramid_backward(std::vector<Tensor> given, std::vector<int64_t> halvings) {
  STD_TORCH_CHECK(!given.empty(), "`grads` must have one tensor per level.");
  DeviceGuard guard(given[0].get_device_index());
  PyramidGradients grads(given, halvings, kMaxHalvings);
  int32_t dtype = element_type(grads.levels[0], "grads");
  std::vector<const void*> data;
  for (const Tensor& level : grads.levels) {
    check_device(level, given[0], "grads");
    data.push_back(level.const_data_ptr());
  }
  Tensor grad_x = new_empty(grads.levels[0], {grads.num_tiles, grads.num_tokens, grads.width});
  check_launch(vtc_pool_pyramid_backward(dtype, data.data(), grids_of(grad_x), halvings.data(),
                                         static_cast<int>(halvings.size()), out_of<void>(grad_x), stream_of(grad_x)));
  return grad_x;
}

// The two unnamed arguments matter to the gradient alone: the divisor of a group without members, and the temperature.
std::tuple<Tensor, Tensor, Tensor> assign_segment_mean(Tensor logits, Tensor values, std::optional<Tensor> given,
                                                       double eps, std::optional<double>, double) {
  int32_t dtype = element_type(values, "values");
  DeviceGuard guard(values.get_device_index());
  check_rank(logits, 3, "logits");
  check_rank(values, 3, "values");
  check_type(logits, ScalarType::Float, "logits", "float32");
  check_device(logits, values, "logits");
  VtcGroups shape = {logits.size(0), logits.size(1), logits.size(2), values.size(2)};
  STD_TORCH_CHECK(values.size(0) == shape.num_tiles && values.size(1) == shape.num_rows,
                  "`logits` (T, G, N) and `values` (T, N, C) must agree in T and N.");
  STD_TORCH_CHECK(shape.num_groups > 0 || shape.num_tiles * shape.num_rows == 0,
                  "`logits` must have at least one group.");
  if (given.has_value()) {
    check_type(*given, ScalarType::Long, "group_idx", "int64");
    check_device(*given, values, "group_idx");
    STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == shape.num_tiles && given->size(1) == shape.num_rows,
                    "`group_idx` must have shape (", shape.num_tiles, ", ", shape.num_rows, ").");
    given = contiguous(*given);
  }
  logits = dense_rows(logits), values = dense_rows(values);
  Tensor means = new_empty(values, {shape.num_tiles, shape.num_groups, shape.width});
  Tensor groups = new_empty(logits, {shape.num_tiles, shape.num_rows}, ScalarType::Long);
  Tensor counts = new_empty(logits, {shape.num_tiles, shape.num_groups}, ScalarType::Long);
  void* stream = stream_of(values);
  check_launch(vtc_choose_groups(data_of<float>(logits), logits.stride(0), logits.stride(1), shape,
                                 given.has_value() ? data_of<int64_t>(*given) : nullptr, out_of<int64_t>(groups),
                                 stream));
  check_launch(vtc_group_mean(dtype, values.const_data_ptr(), values.stride(0), values.stride(1), shape,
                              data_of<int64_t>(groups), static_cast<float>(eps), out_of<void>(means),
                              out_of<int64_t>(counts), stream));
  return {means, groups, counts};
}

Tensor assign_segment_mean_backward(Tensor grad, Tensor group_idx, Tensor counts, double eps) {
  int32_t dtype = element_type(grad, "grad");
  DeviceGuard guard(grad.get_device_index());
  check_rank(grad, 3, "grad");
  check_rank(group_idx, 2, "group_idx");
  check_type(group_idx, ScalarType::Long, "group_idx", "int64");
  check_type(counts, ScalarType::Long, "counts", "int64");
  check_device(group_idx, grad, "group_idx"), check_device(counts, grad, "counts");
  grad = contiguous(grad), group_idx = contiguous(group_idx), counts = contiguous(counts);
  VtcGroups shape = {grad.size(0), grad.size(1), group_idx.size(1), grad.size(2)};
  STD_TORCH_CHECK(group_idx.size(0) == shape.num_tiles && counts.numel() == shape.num_tiles * shape.num_groups,
                  "`grad` (T, G, C), `group_idx` (T, N) and `counts` (T, G) must agree in T and G.");
  Tensor out = new_empty(grad, {shape.num_tiles, shape.num_rows, shape.width});
  check_launch(vtc_group_mean_backward(dtype, grad.const_data_ptr(), shape, data_of<int64_t>(group_idx),
                                       data_of<int64_t>(counts), static_cast<float>(eps), out_of<void>(out),
                                       stream_of(grad)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_vtc, CUDA, library) {
  library.impl("segment_mean", TORCH_BOX(&segment_mean));
  library.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward));
  library.impl("unshuffle_layernorm", TORCH_BOX(&unshuffle_layernorm));
  library.impl("unshuffle_layernorm_backward", TORCH_BOX(&unshuffle_layernorm_backward));
  library.impl("pool_pyramid", TORCH_BOX(&pool_pyramid));
  library.impl("pool_pyramid_backward", TORCH_BOX(&pool_pyramid_backward));
  library.impl("assign_segment_mean", TORCH_BOX(&assign_segment_mean));
  library.impl("assign_segment_mean_backward", TORCH_BOX(&assign_segment_mean_backward));
}

}  // namespace vtc
