// CPU implementations of the ops that hf_vtc/models/ops_vtc.py defines. Implementations only: a second definition of an
// op in one process is an error, or a crash.
#include "checks.h"
#include "cpu_kernels.h"

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vtc {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

const CpuKernels& kernels() {
#ifdef VTC_X86
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return kernels_avx512;
  if (avx2) return kernels_avx2;
#endif
  return kernels_baseline;
}

// fewest work items that are worth a thread of their own, when each touches so many elements
int64_t grain(int64_t elements_per_item) {
  constexpr int64_t kElementsPerThread = 32768;
  return kElementsPerThread / (elements_per_item > 0 ? elements_per_item : 1) + 1;
}

// An output that the kernels will fill. Memory fresh from the system is mapped page by page at the first write, which
// for a large output takes longer than the op itself; pages of 2 MB are 512 times fewer, where the system has them.
Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  Tensor out = new_empty(like, sizes);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  uintptr_t start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  uintptr_t end = start + static_cast<uintptr_t>(out.numel()) * out.element_size();
  start = (start + kHugePage - 1) / kHugePage * kHugePage, end = end / kHugePage * kHugePage;
  // advice: whether it is taken changes no result
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return out;
}

// Whether outputs are more than a cache keeps for whoever reads them, and their rows are aligned to cache lines.
bool are_large(const std::vector<Tensor>& outs) {
  constexpr int64_t kBytes = int64_t(8) << 20, kCacheLine = 64;
  int64_t bytes = 0;
  for (const Tensor& out : outs) {
    int64_t row = out.size(-1) * out.element_size();
    if (row % kCacheLine != 0 || reinterpret_cast<uintptr_t>(out.const_data_ptr()) % kCacheLine != 0) return false;
    bytes += out.numel() * out.element_size();
  }
  return bytes >= kBytes;
}

Dtype dtype_of(const Tensor& tensor, const char* name) { return static_cast<Dtype>(element_type(tensor, name)); }

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Rows rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0)}; }

Grids grids_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), side_of(tensor.size(1)), tensor.size(2)};
}

Tensor to_float(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

// Checks the ends of `count` members' segments: the kernels follow them blindly.
void check_ends(const Tensor& offsets, int64_t count, const char* name) {
  const int64_t* ends = data_of<int64_t>(offsets);
  int64_t num_segments = offsets.size(0) - 1;
  STD_TORCH_CHECK(ends[0] == 0 && ends[num_segments] == count, "`", name, "` must begin with 0 and end with ", count,
                  ", the number of members.");
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    STD_TORCH_CHECK(ends[segment] <= ends[segment + 1], "`", name, "` must not fall, but entry ", segment + 1,
                    " does.");
  }
}

void check_range(const Tensor& index, int64_t limit, const char* name) {
  const int64_t* values = data_of<int64_t>(index);
  for (int64_t at = 0; at < index.numel(); ++at) {
    STD_TORCH_CHECK(values[at] >= 0 && values[at] < limit, "`", name, "` must lie in 0 to ", limit - 1, ", got ",
                    values[at], ".");
  }
}

std::vector<float> lengths_of(const int64_t* offsets, int64_t num_segments) {
  std::vector<float> lengths(num_segments);
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    lengths[segment] = static_cast<float>(offsets[segment + 1] - offsets[segment]);
  }
  return lengths;
}

Tensor segment_mean(Tensor x, Tensor index, Tensor offsets) {
  Dtype dtype = dtype_of(x, "x");
  check_rank(x, 2, "x");
  check_indices(index, "index"), check_offsets(offsets, "offsets");
  x = dense_rows(x), index = torch::stable::contiguous(index), offsets = torch::stable::contiguous(offsets);
  check_ends(offsets, index.size(0), "offsets");
  check_range(index, x.size(0), "index");

  int64_t num_segments = offsets.size(0) - 1, width = x.size(1);
  Tensor out = new_output(x, {num_segments, width});
  if (out.numel() == 0) return out;
  const int64_t *members = data_of<int64_t>(index), *ends = data_of<int64_t>(offsets);
  std::vector<float> lengths = lengths_of(ends, num_segments);
  Rows rows = rows_of(x);
  void* to = out.mutable_data_ptr();
  int64_t rows_per_segment = index.size(0) / num_segments + 1;
  parallel_for(0, num_segments, grain(width * rows_per_segment), [&](int64_t first, int64_t last) {
    kernels().segment_mean(dtype, rows, members, ends, lengths.data(), width, first, last, to);
  });
  return out;
}

Tensor segment_mean_backward(Tensor grad, Tensor segments, Tensor row_offsets, Tensor offsets) {
  Dtype dtype = dtype_of(grad, "grad");
  check_rank(grad, 2, "grad");
  check_indices(segments, "segments");
  check_offsets(row_offsets, "row_offsets"), check_offsets(offsets, "offsets");
  STD_TORCH_CHECK(offsets.size(0) - 1 == grad.size(0), "`offsets` must have one entry more than `grad` has rows.");
  grad = dense_rows(grad), segments = torch::stable::contiguous(segments);
  row_offsets = torch::stable::contiguous(row_offsets), offsets = torch::stable::contiguous(offsets);
  check_ends(row_offsets, segments.size(0), "row_offsets"), check_ends(offsets, segments.size(0), "offsets");
  check_range(segments, grad.size(0), "segments");

  int64_t num_rows = row_offsets.size(0) - 1, width = grad.size(1);
  Tensor out = new_output(grad, {num_rows, width});
  const int64_t *members = data_of<int64_t>(segments), *ends = data_of<int64_t>(row_offsets);
  std::vector<float> lengths = lengths_of(data_of<int64_t>(offsets), grad.size(0));
  for (int64_t at = 0; at < segments.size(0); ++at) {
    STD_TORCH_CHECK(lengths[members[at]] > 0, "`segments` names segment ", members[at],
                    ", which has no members according to `offsets`.");
  }
  if (out.numel() == 0) return out;
  Rows rows = rows_of(grad);
  void* to = out.mutable_data_ptr();
  parallel_for(0, num_rows, grain(2 * width), [&](int64_t first, int64_t last) {
    kernels().segment_mean_backward(dtype, rows, members, ends, lengths.data(), width, first, last, to);
  });
  return out;
}

// The tiles that are folded, as a contiguous tensor that is checked, or nothing for all of them.
std::optional<Tensor> checked_tiles(const std::optional<Tensor>& tiles, int64_t num_tiles) {
  if (!tiles.has_value()) return std::nullopt;
  check_indices(*tiles, "tiles");
  Tensor checked = torch::stable::contiguous(*tiles);
  check_range(checked, num_tiles, "tiles");
  const int64_t* values = data_of<int64_t>(checked);
  std::vector<int64_t> sorted(values, values + checked.size(0));
  std::sort(sorted.begin(), sorted.end());
  auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  STD_TORCH_CHECK(twice == sorted.end(), "`tiles` must name a tile once, but ", *twice, " comes twice.");
  return checked;
}

int64_t num_slots_of(const Tensor& features, const std::optional<Tensor>& tiles) {
  return tiles.has_value() ? tiles->size(0) : features.size(0);
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm(Tensor features, std::optional<Tensor> tiles, Tensor weight,
                                                       Tensor bias, int64_t factor, bool transposed, double eps) {
  Dtype dtype = dtype_of(features, "features");
  Folded folded(features, weight, factor);
  folded.check_affine(bias, "bias");
  tiles = checked_tiles(tiles, features.size(0));
  features = dense_rows(features), weight = to_float(weight), bias = to_float(bias);

  int64_t num_slots = num_slots_of(features, tiles), num_rows = product({num_slots, folded.rows_per_tile});
  Tensor out = new_output(features, {num_slots, folded.rows_per_tile, folded.width});
  Tensor mean = new_empty(features, {num_slots, folded.rows_per_tile}, ScalarType::Float);
  Tensor rstd = new_empty(features, {num_slots, folded.rows_per_tile}, ScalarType::Float);
  if (num_rows == 0) return {out, mean, rstd};
  Grids grids = grids_of(features);
  const int64_t* chosen = tiles.has_value() ? data_of<int64_t>(*tiles) : nullptr;
  const float *scale = data_of<float>(weight), *shift = data_of<float>(bias);
  void* to = out.mutable_data_ptr();
  float *means = static_cast<float*>(mean.mutable_data_ptr()), *rstds = static_cast<float*>(rstd.mutable_data_ptr());
  Folding folding = {factor, transposed};
  bool large = are_large({out});
  parallel_for(0, num_rows, grain(folded.width), [&](int64_t first, int64_t last) {
    kernels().unshuffle_layernorm(dtype, grids, folding, chosen, scale, shift, static_cast<float>(eps), first, last,
                                  to, large, means, rstds);
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm_backward(Tensor grad, Tensor features,
                                                                std::optional<Tensor> tiles, Tensor weight,
                                                                Tensor mean, Tensor rstd, int64_t factor,
                                                                bool transposed) {
  Dtype dtype = dtype_of(features, "features");
  Folded folded(features, weight, factor);
  tiles = checked_tiles(tiles, features.size(0));
  int64_t num_slots = num_slots_of(features, tiles), width = folded.width;
  folded.check_saved(features, grad, mean, rstd, num_slots);
  features = dense_rows(features), weight = to_float(weight);
  grad = torch::stable::contiguous(grad), mean = to_float(mean), rstd = to_float(rstd);
  int64_t num_rows = product({num_slots, folded.rows_per_tile});

  Tensor grad_x = tiles.has_value() ? new_zeros(features, features.sizes()) : new_output(features, features.sizes());
  Grids grids = grids_of(features);
  const int64_t* chosen = tiles.has_value() ? data_of<int64_t>(*tiles) : nullptr;
  const float *scale = data_of<float>(weight), *means = data_of<float>(mean), *rstds = data_of<float>(rstd);
  Rows upstream = {grad.const_data_ptr(), width};
  void* to = grad_x.mutable_data_ptr();
  Folding folding = {factor, transposed};
  // as many parts as there are, whatever the number of threads: the sums over them are the same on every machine
  int64_t parts = num_rows < 32 ? num_rows : 32;
  Tensor partial_weight = new_zeros(weight, {parts, width}), partial_bias = new_zeros(weight, {parts, width});
  float* weights = static_cast<float*>(partial_weight.mutable_data_ptr());
  float* biases = static_cast<float*>(partial_bias.mutable_data_ptr());
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(width);
    for (int64_t part = first; part < last; ++part) {
      kernels().unshuffle_layernorm_backward(dtype, upstream, grids, folding, chosen, scale, means, rstds,
                                             part * num_rows / parts, (part + 1) * num_rows / parts, scratch.data(),
                                             to, weights + part * width, biases + part * width);
    }
  });
  Tensor grad_weight = new_zeros(weight, {width}), grad_bias = new_zeros(weight, {width});
  float* weight_sum = static_cast<float*>(grad_weight.mutable_data_ptr());
  float* bias_sum = static_cast<float*>(grad_bias.mutable_data_ptr());
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t column = 0; column < width; ++column) {
      weight_sum[column] += weights[part * width + column];
      bias_sum[column] += biases[part * width + column];
    }
  }
  return {grad_x, grad_weight, grad_bias};
}

constexpr int64_t kMaxHalvings = 16;

Levels levels_of(const std::vector<int64_t>& halvings, const std::vector<void*>& data, int64_t deepest) {
  return {halvings.data(), data.data(), static_cast<int64_t>(halvings.size()), deepest};
}

// One tensor per level: an allocator finds room for several in what it has kept, for a large one it asks the system.
std::vector<Tensor> pool_pyramid(Tensor features, std::vector<int64_t> halvings) {
  Dtype dtype = dtype_of(features, "features");
  check_rank(features, 3, "features");
  features = dense_rows(features);
  int64_t num_tiles = features.size(0), num_tokens = features.size(1), width = features.size(2);
  int64_t deepest = deepest_level(halvings, num_tokens, kMaxHalvings);
  std::vector<Tensor> outs;
  std::vector<void*> data;
  for (int64_t level : halvings) {
    outs.push_back(new_output(features, {num_tiles, num_tokens >> level, width}));
    data.push_back(outs.back().mutable_data_ptr());
  }
  if (outs.empty() || features.numel() == 0) return outs;
  Grids grids = grids_of(features);
  Levels levels = levels_of(halvings, data, deepest);
  int64_t block = int64_t(1) << deepest;
  bool large = are_large(outs);
  parallel_for(0, num_tiles * num_tokens / block, grain(2 * block * width), [&](int64_t first, int64_t last) {
    kernels().pool_pyramid(dtype, grids, levels, large, first, last);
  });
  return outs;
}

Tensor pool_pyramid_backward(std::vector<Tensor> given, std::vector<int64_t> halvings) {
  PyramidGradients grads(given, halvings, kMaxHalvings);
  Dtype dtype = dtype_of(grads.levels[0], "grads");
  Tensor grad_x = new_output(grads.levels[0], {grads.num_tiles, grads.num_tokens, grads.width});
  if (grad_x.numel() == 0) return grad_x;
  std::vector<void*> data;
  // read only, through the struct that serves the forward pass too
  for (const Tensor& level : grads.levels) data.push_back(const_cast<void*>(level.const_data_ptr()));
  Levels levels = levels_of(halvings, data, grads.deepest);
  void* to = grad_x.mutable_data_ptr();
  int64_t block = int64_t(1) << grads.deepest, side = side_of(grads.num_tokens), width = grads.width;
  int64_t num_blocks = grads.num_tiles * grads.num_tokens / block;
  parallel_for(0, num_blocks, grain(2 * block * width), [&](int64_t first, int64_t last) {
    kernels().pool_pyramid_backward(dtype, levels, side, width, first, last, to);
  });
  return grad_x;
}

// The groups (T, N): those given, whose values are checked, or the best one of each row.
Tensor groups_of(const GroupShape& shape, const Tensor& logits, const std::optional<Tensor>& given) {
  int64_t num_tiles = shape.num_tiles, num_groups = shape.num_groups, num_rows = shape.num_rows;
  Tensor group_idx = new_empty(logits, {num_tiles, num_rows}, ScalarType::Long);
  int64_t* groups = static_cast<int64_t*>(group_idx.mutable_data_ptr());
  if (given.has_value()) {
    Tensor dense = torch::stable::contiguous(*given);
    check_range(dense, num_groups, "group_idx");
    std::copy_n(data_of<int64_t>(dense), shape.num_places, groups);
    return group_idx;
  }
  Tensor dense = dense_rows(logits);
  const float* scores = data_of<float>(dense);
  int64_t tile_stride = dense.stride(0), group_stride = dense.stride(1);
  // runs of rows, so that one tile keeps several threads busy
  constexpr int64_t kRun = 256;
  int64_t runs = (num_rows + kRun - 1) / kRun;
  parallel_for(0, num_tiles * runs, grain(kRun * num_groups), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      int64_t tile = item / runs, begin = item % runs * kRun, end = begin + kRun < num_rows ? begin + kRun : num_rows;
      kernels().argmax(scores + tile * tile_stride, group_stride, num_groups, begin, end, groups + tile * num_rows);
    }
  });
  return group_idx;
}

// The two unnamed arguments matter to the gradient alone: the divisor of a group without members, and the temperature.
std::tuple<Tensor, Tensor, Tensor> assign_segment_mean(Tensor logits, Tensor values, std::optional<Tensor> given,
                                                       double eps, std::optional<double>, double) {
  Dtype dtype = dtype_of(values, "values");
  GroupShape shape = GroupShape::of_forward(logits, values, given);
  int64_t num_groups = shape.num_groups, num_rows = shape.num_rows, width = shape.width;
  // before any work, so that what has no place is refused at once
  Tensor counts = new_empty(logits, {shape.num_tiles, num_groups}, ScalarType::Long);
  Tensor means = new_empty(values, {shape.num_tiles, num_groups, width});
  Tensor group_idx = groups_of(shape, logits, given);
  if (shape.num_slots == 0) return {means, group_idx, counts};

  // members of each group in order: a counting sort
  const int64_t* groups = data_of<int64_t>(group_idx);
  std::vector<int64_t> offsets(shape.num_slots + 1), members(shape.num_places);
  for (int64_t at = 0; at < shape.num_places; ++at) ++offsets[at / num_rows * num_groups + groups[at] + 1];
  int64_t* count_of = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::vector<float> divisors(shape.num_slots);
  for (int64_t slot = 0; slot < shape.num_slots; ++slot) {
    count_of[slot] = offsets[slot + 1];
    divisors[slot] = static_cast<float>(count_of[slot]) + static_cast<float>(eps);
    offsets[slot + 1] += offsets[slot];
  }
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t at = 0; at < shape.num_places; ++at) members[next[at / num_rows * num_groups + groups[at]]++] = at;

  if (means.numel() == 0) return {means, group_idx, counts};
  // rows of values by number, which takes tiles that follow each other; the stride of a single row means nothing
  bool follow = shape.num_tiles <= 1 || num_rows <= 1 || values.stride(0) == num_rows * values.stride(1);
  values = follow ? dense_rows(values) : torch::stable::contiguous(values);
  Rows rows = {values.const_data_ptr(), num_rows == 1 ? values.stride(0) : values.stride(1)};
  void* to = means.mutable_data_ptr();
  int64_t rows_per_slot = shape.num_places / shape.num_slots + 1;
  parallel_for(0, shape.num_slots, grain(product({width, rows_per_slot})), [&](int64_t first, int64_t last) {
    kernels().segment_mean(dtype, rows, members.data(), offsets.data(), divisors.data(), width, first, last, to);
  });
  return {means, group_idx, counts};
}

Tensor assign_segment_mean_backward(Tensor grad, Tensor group_idx, Tensor counts, double eps) {
  Dtype dtype = dtype_of(grad, "grad");
  GroupShape shape = GroupShape::of_backward(grad, group_idx, counts);
  grad = torch::stable::contiguous(grad), group_idx = torch::stable::contiguous(group_idx);
  counts = torch::stable::contiguous(counts);
  check_range(group_idx, shape.num_groups, "group_idx");
  int64_t width = shape.width;
  Tensor out = new_output(grad, {shape.num_tiles, shape.num_rows, width});
  if (out.numel() == 0) return out;
  std::vector<int64_t> slots(shape.num_places), offsets(shape.num_places + 1);
  for (int64_t at = 0; at < shape.num_places; ++at) {
    slots[at] = at / shape.num_rows * shape.num_groups + data_of<int64_t>(group_idx)[at];
    offsets[at + 1] = at + 1;
  }
  std::vector<float> divisors(shape.num_slots);
  for (int64_t slot = 0; slot < shape.num_slots; ++slot) {
    divisors[slot] = static_cast<float>(data_of<int64_t>(counts)[slot]) + static_cast<float>(eps);
  }
  Rows rows = {grad.const_data_ptr(), width};
  void* to = out.mutable_data_ptr();
  parallel_for(0, shape.num_places, grain(2 * width), [&](int64_t first, int64_t last) {
    kernels().segment_mean_backward(dtype, rows, slots.data(), offsets.data(), divisors.data(), width, first, last, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_vtc, CPU, library) {
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
