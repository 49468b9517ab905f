// CUDA implementations of the ops that hf_vtc/models/ops_vtc.py defines. Implementations only, as in bind_cpu.cpp. What
// would need a look at the values (indices in range) is left to the kernels, which trap: nothing here waits for the GPU.
#include "../checks.h"
#include "launchers.h"

#if defined(VTC_HOSTSIM)
// a test brings the device, which is the CPU
#include "hostsim_device.h"
#else
#include <torch/csrc/stable/accelerator.h>

// libtorch_cuda exports it; the header shows it to builds against a CUDA toolkit only
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#define VTC_DISPATCH_KEY CUDA

namespace vtc {

using torch::stable::accelerator::DeviceGuard;

inline bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }

inline void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace vtc
#endif

namespace vtc {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

void check_launch(int status) { STD_TORCH_CHECK(status == 0, "A CUDA kernel of hf_vtc failed: error ", status, "."); }

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.get_device_index() == like.get_device_index(), "`", name,
                  "` must be on the same CUDA device as the rest.");
}

// Kernels count the elements of a grid and of a row in 32 bits.
void check_counts(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts) {
    STD_TORCH_CHECK(count <= int64_t(1) << 30, "Grids and rows of more than 2^30 elements are too large, got ", count,
                    ".");
  }
}

// Kernels read the first row in place of one that is out of range, before they trap.
void check_rows(int64_t num_rows, const Tensor& members, const char* name) {
  STD_TORCH_CHECK(num_rows > 0 || members.size(0) == 0, "`", name, "` must be empty where there are no rows.");
}

// The element type of the tensor whose device the others must be on.
int32_t leading_type(const Tensor& tensor, const char* name) {
  check_device(tensor, tensor, name);
  return element_type(tensor, name);
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
  int32_t dtype = leading_type(x, "x");
  DeviceGuard guard(x.get_device_index());
  check_rank(x, 2, "x");
  check_indices(index, "index"), check_offsets(offsets, "offsets");
  check_rows(x.size(0), index, "index");
  check_device(index, x, "index"), check_device(offsets, x, "offsets");
  x = dense_rows(x), index = contiguous(index), offsets = contiguous(offsets);
  int64_t num_segments = offsets.size(0) - 1, width = x.size(1);
  Tensor out = new_empty(x, {num_segments, width});
  check_launch(vtc_segment_mean(dtype, x.const_data_ptr(), x.stride(0), x.size(0), data_of<int64_t>(index),
                                index.size(0), data_of<int64_t>(offsets), num_segments, width, out_of<void>(out),
                                stream_of(x)));
  return out;
}

Tensor segment_mean_backward(Tensor grad, Tensor segments, Tensor row_offsets, Tensor offsets) {
  int32_t dtype = leading_type(grad, "grad");
  DeviceGuard guard(grad.get_device_index());
  check_rank(grad, 2, "grad");
  check_indices(segments, "segments");
  check_offsets(row_offsets, "row_offsets"), check_offsets(offsets, "offsets");
  check_rows(grad.size(0), segments, "segments");
  check_device(segments, grad, "segments"), check_device(row_offsets, grad, "row_offsets");
  check_device(offsets, grad, "offsets");
  STD_TORCH_CHECK(offsets.size(0) - 1 == grad.size(0), "`offsets` must have one entry more than `grad` has rows.");
  grad = dense_rows(grad), segments = contiguous(segments);
  row_offsets = contiguous(row_offsets), offsets = contiguous(offsets);
  int64_t num_rows = row_offsets.size(0) - 1, width = grad.size(1);
  Tensor out = new_empty(grad, {num_rows, width});
  check_launch(vtc_segment_mean_backward(dtype, grad.const_data_ptr(), grad.stride(0), grad.size(0),
                                         data_of<int64_t>(segments), segments.size(0),
                                         data_of<int64_t>(row_offsets), num_rows, data_of<int64_t>(offsets), width,
                                         out_of<void>(out), stream_of(grad)));
  return out;
}

// The tiles that are folded, contiguous, or nothing for all of them; their values are the kernels' business.
std::optional<Tensor> checked_tiles(const std::optional<Tensor>& tiles, const Tensor& features) {
  if (!tiles.has_value()) return std::nullopt;
  check_indices(*tiles, "tiles");
  check_device(*tiles, features, "tiles");
  return contiguous(*tiles);
}

const int64_t* data_of_tiles(const std::optional<Tensor>& tiles) {
  return tiles.has_value() ? data_of<int64_t>(*tiles) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm(Tensor features, std::optional<Tensor> tiles, Tensor weight,
                                                       Tensor bias, int64_t factor, bool transposed, double eps) {
  int32_t dtype = leading_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  Folded folded(features, weight, factor);
  folded.check_affine(bias, "bias");
  check_device(weight, features, "weight"), check_device(bias, features, "bias");
  tiles = checked_tiles(tiles, features);
  check_counts({features.size(1), folded.width});
  int64_t num_slots = tiles.has_value() ? tiles->size(0) : features.size(0);
  features = dense_rows(features), weight = to_float(weight), bias = to_float(bias);
  Tensor out = new_empty(features, {num_slots, folded.rows_per_tile, folded.width});
  Tensor mean = new_empty(features, {num_slots, folded.rows_per_tile}, ScalarType::Float);
  Tensor rstd = new_empty(features, {num_slots, folded.rows_per_tile}, ScalarType::Float);
  // without channels nothing is launched that would fill them
  if (folded.width == 0) return {out, new_zeros(mean, mean.sizes()), new_zeros(rstd, rstd.sizes())};
  check_launch(vtc_unshuffle_layernorm(dtype, features.const_data_ptr(), grids_of(features), data_of_tiles(tiles),
                                       num_slots, factor, transposed, data_of<float>(weight),
                                       data_of<float>(bias), static_cast<float>(eps), out_of<void>(out),
                                       out_of<float>(mean), out_of<float>(rstd), stream_of(features)));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm_backward(Tensor grad, Tensor features,
                                                                std::optional<Tensor> tiles, Tensor weight,
                                                                Tensor mean, Tensor rstd, int64_t factor,
                                                                bool transposed) {
  int32_t dtype = leading_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  Folded folded(features, weight, factor);
  check_device(grad, features, "grad"), check_device(weight, features, "weight");
  check_device(mean, features, "mean"), check_device(rstd, features, "rstd");
  tiles = checked_tiles(tiles, features);
  check_counts({features.size(1), folded.width});
  int64_t num_slots = tiles.has_value() ? tiles->size(0) : features.size(0), width = folded.width;
  folded.check_saved(features, grad, mean, rstd, num_slots);
  int64_t num_rows = product({num_slots, folded.rows_per_tile});
  features = dense_rows(features), weight = to_float(weight), mean = to_float(mean), rstd = to_float(rstd);
  grad = contiguous(grad);
  // tiles that are not folded get no gradient
  Tensor grad_x = tiles.has_value() ? new_zeros(features, features.sizes()) : new_empty(features, features.sizes());
  if (num_rows == 0 || width == 0) return {grad_x, new_zeros(weight, {width}), new_zeros(weight, {width})};
  int64_t parts = num_rows < 64 ? num_rows : 64;
  Tensor partial = new_empty(weight, {2, parts, width});
  Tensor grad_weight = new_empty(weight, {width}), grad_bias = new_empty(weight, {width});
  check_launch(vtc_unshuffle_layernorm_backward(
      dtype, grad.const_data_ptr(), features.const_data_ptr(), grids_of(features), data_of_tiles(tiles), num_slots,
      factor, transposed, data_of<float>(weight), data_of<float>(mean), data_of<float>(rstd), parts,
      out_of<float>(partial), out_of<void>(grad_x), out_of<float>(grad_weight), out_of<float>(grad_bias),
      stream_of(features)));
  return {grad_x, grad_weight, grad_bias};
}

constexpr int64_t kMaxHalvings = 4;

std::vector<Tensor> pool_pyramid(Tensor features, std::vector<int64_t> halvings) {
  int32_t dtype = leading_type(features, "features");
  DeviceGuard guard(features.get_device_index());
  check_rank(features, 3, "features");
  features = dense_rows(features);
  deepest_level(halvings, features.size(1), kMaxHalvings);
  check_counts({features.size(1), features.size(2)});
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
  int32_t dtype = leading_type(given[0], "grads");
  DeviceGuard guard(given[0].get_device_index());
  for (const Tensor& grad : given) check_device(grad, given[0], "grads");
  PyramidGradients grads(given, halvings, kMaxHalvings);
  check_counts({grads.num_tokens, grads.width});
  std::vector<const void*> data;
  for (const Tensor& level : grads.levels) data.push_back(level.const_data_ptr());
  Tensor grad_x = new_empty(grads.levels[0], {grads.num_tiles, grads.num_tokens, grads.width});
  check_launch(vtc_pool_pyramid_backward(dtype, data.data(), grids_of(grad_x), halvings.data(),
                                         static_cast<int>(halvings.size()), out_of<void>(grad_x), stream_of(grad_x)));
  return grad_x;
}

// The two unnamed arguments matter to the gradient alone: the divisor of a group without members, and the temperature.
std::tuple<Tensor, Tensor, Tensor> assign_segment_mean(Tensor logits, Tensor values, std::optional<Tensor> given,
                                                       double eps, std::optional<double>, double) {
  int32_t dtype = leading_type(values, "values");
  DeviceGuard guard(values.get_device_index());
  GroupShape sizes = GroupShape::of_forward(logits, values, given);
  check_device(logits, values, "logits");
  check_counts({sizes.num_rows});
  VtcGroups shape = {sizes.num_tiles, sizes.num_groups, sizes.num_rows, sizes.width};
  if (given.has_value()) {
    check_device(*given, values, "group_idx");
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
  int32_t dtype = leading_type(grad, "grad");
  DeviceGuard guard(grad.get_device_index());
  GroupShape sizes = GroupShape::of_backward(grad, group_idx, counts);
  check_device(group_idx, grad, "group_idx"), check_device(counts, grad, "counts");
  check_counts({sizes.num_rows});
  grad = contiguous(grad), group_idx = contiguous(group_idx), counts = contiguous(counts);
  VtcGroups shape = {sizes.num_tiles, sizes.num_groups, sizes.num_rows, sizes.width};
  Tensor out = new_empty(grad, {shape.num_tiles, shape.num_rows, shape.width});
  check_launch(vtc_group_mean_backward(dtype, grad.const_data_ptr(), shape, data_of<int64_t>(group_idx),
                                       data_of<int64_t>(counts), static_cast<float>(eps), out_of<void>(out),
                                       stream_of(grad)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_vtc, VTC_DISPATCH_KEY, library) {
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
