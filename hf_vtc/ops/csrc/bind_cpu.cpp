// CPU implementations of the ops that hf_vtc/models/ops_vtc.py defines. Implementations only: a second definition of an
// op in one process is an error, or a crash.
#include "checks.h"
#include "cpu_kernels.h"

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

// Checks offsets and indices, since the kernels follow them blindly, and returns the end of the last segment.
void check_ragged_values(const Tensor& index, const Tensor& offsets, int64_t num_rows, const char* name) {
  const int64_t *ends = data_of<int64_t>(offsets), *values = data_of<int64_t>(index);
  int64_t num_segments = offsets.size(0) - 1, count = index.size(0);
  STD_TORCH_CHECK(ends[0] == 0 && ends[num_segments] == count, "`offsets` must begin with 0 and end with ", count,
                  ", the length of `", name, "`.");
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    STD_TORCH_CHECK(ends[segment] <= ends[segment + 1], "`offsets` must not fall, but entry ", segment + 1, " does.");
  }
  for (int64_t at = 0; at < count; ++at) {
    STD_TORCH_CHECK(values[at] >= 0 && values[at] < num_rows, "`", name, "` must lie in 0 to ", num_rows - 1, ", got ",
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
  check_ragged(index, offsets);
  x = dense_rows(x), index = torch::stable::contiguous(index), offsets = torch::stable::contiguous(offsets);
  check_ragged_values(index, offsets, x.size(0), "index");

  int64_t num_segments = offsets.size(0) - 1, width = x.size(1);
  Tensor out = new_output(x, {num_segments, width});
  const int64_t *members = data_of<int64_t>(index), *ends = data_of<int64_t>(offsets);
  std::vector<float> lengths = lengths_of(ends, num_segments);
  Rows rows = rows_of(x);
  void* to = out.mutable_data_ptr();
  int64_t rows_per_segment = num_segments > 0 ? index.size(0) / num_segments + 1 : 1;
  parallel_for(0, num_segments, grain(width * rows_per_segment), [&](int64_t first, int64_t last) {
    kernels().segment_mean(dtype, rows, members, ends, lengths.data(), width, first, last, to);
  });
  return out;
}

Tensor segment_mean_backward(Tensor grad, Tensor segments, Tensor row_offsets, Tensor offsets) {
  Dtype dtype = dtype_of(grad, "grad");
  check_rank(grad, 2, "grad");
  check_ragged(segments, row_offsets);
  grad = dense_rows(grad), segments = torch::stable::contiguous(segments);
  row_offsets = torch::stable::contiguous(row_offsets), offsets = torch::stable::contiguous(offsets);
  STD_TORCH_CHECK(offsets.size(0) == grad.size(0) + 1, "`offsets` must have one entry more than `grad` has rows.");
  check_ragged_values(segments, row_offsets, grad.size(0), "segments");

  int64_t num_rows = row_offsets.size(0) - 1, width = grad.size(1);
  Tensor out = new_output(grad, {num_rows, width});
  const int64_t *members = data_of<int64_t>(segments), *ends = data_of<int64_t>(row_offsets);
  std::vector<float> lengths = lengths_of(data_of<int64_t>(offsets), grad.size(0));
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
  check_rank(*tiles, 1, "tiles");
  check_type(*tiles, ScalarType::Long, "tiles", "int64");
  Tensor checked = torch::stable::contiguous(*tiles);
  std::vector<bool> seen(num_tiles);
  for (int64_t slot = 0; slot < checked.size(0); ++slot) {
    int64_t tile = data_of<int64_t>(checked)[slot];
    STD_TORCH_CHECK(tile >= 0 && tile < num_tiles, "`tiles` must lie in 0 to ", num_tiles - 1, ", got ", tile, ".");
    STD_TORCH_CHECK(!seen[tile], "`tiles` must name a tile once, but ", tile, " comes twice.");
    seen[tile] = true;
  }
  return checked;
}

struct FoldedShape {
  int64_t num_tiles;
  int64_t rows_per_tile;
  int64_t width;
};

FoldedShape folded_shape(const Tensor& features, const std::optional<Tensor>& tiles, const Tensor& weight,
                         int64_t factor) {
  check_rank(features, 3, "features");
  int64_t side = side_of(features.size(1));
  STD_TORCH_CHECK(factor >= 1 && side % factor == 0, "The side of a grid, ", side, ", must be a multiple of `factor`, ",
                  factor, ".");
  int64_t width = factor * factor * features.size(2);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == width, "`weight` must have ", width, " entries.");
  return {tiles.has_value() ? tiles->size(0) : features.size(0), (side / factor) * (side / factor), width};
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_layernorm(Tensor features, std::optional<Tensor> tiles, Tensor weight,
                                                       Tensor bias, int64_t factor, bool transposed, double eps) {
  Dtype dtype = dtype_of(features, "features");
  tiles = checked_tiles(tiles, features.size(0));
  FoldedShape shape = folded_shape(features, tiles, weight, factor);
  features = dense_rows(features), weight = to_float(weight), bias = to_float(bias);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == shape.width, "`bias` must have ", shape.width, " entries.");

  Tensor out = new_output(features, {shape.num_tiles, shape.rows_per_tile, shape.width});
  Tensor mean = new_empty(features, {shape.num_tiles, shape.rows_per_tile}, ScalarType::Float);
  Tensor rstd = new_empty(features, {shape.num_tiles, shape.rows_per_tile}, ScalarType::Float);
  Grids grids = grids_of(features);
  const int64_t* chosen = tiles.has_value() ? data_of<int64_t>(*tiles) : nullptr;
  const float *scale = data_of<float>(weight), *shift = data_of<float>(bias);
  void* to = out.mutable_data_ptr();
  float *means = static_cast<float*>(mean.mutable_data_ptr()), *rstds = static_cast<float*>(rstd.mutable_data_ptr());
  Folding folding = {factor, transposed};
  bool large = are_large({out});
  parallel_for(0, shape.num_tiles * shape.rows_per_tile, grain(shape.width), [&](int64_t first, int64_t last) {
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
  STD_TORCH_CHECK(grad.scalar_type() == features.scalar_type(), "`grad` and `features` must have the same dtype.");
  tiles = checked_tiles(tiles, features.size(0));
  FoldedShape shape = folded_shape(features, tiles, weight, factor);
  features = dense_rows(features), weight = to_float(weight);
  grad = torch::stable::contiguous(grad), mean = to_float(mean), rstd = to_float(rstd);
  int64_t num_rows = shape.num_tiles * shape.rows_per_tile, width = shape.width;
  STD_TORCH_CHECK(grad.numel() == num_rows * width, "`grad` must have ", num_rows * width, " elements.");
  STD_TORCH_CHECK(mean.numel() == num_rows && rstd.numel() == num_rows, "`mean` and `rstd` must have ", num_rows,
                  " entries.");

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
  if (outs.empty()) return outs;
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

// The groups (T, N): those given, which are checked, or the best one of each row.
Tensor groups_of(const Tensor& logits, const std::optional<Tensor>& given) {
  int64_t num_tiles = logits.size(0), num_groups = logits.size(1), num_rows = logits.size(2);
  Tensor group_idx = new_empty(logits, {num_tiles, num_rows}, ScalarType::Long);
  int64_t* groups = static_cast<int64_t*>(group_idx.mutable_data_ptr());
  if (given.has_value()) {
    check_type(*given, ScalarType::Long, "group_idx", "int64");
    STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == num_tiles && given->size(1) == num_rows,
                    "`group_idx` must have shape (", num_tiles, ", ", num_rows, ").");
    Tensor dense = torch::stable::contiguous(*given);
    const int64_t* values = data_of<int64_t>(dense);
    for (int64_t at = 0; at < num_tiles * num_rows; ++at) {
      STD_TORCH_CHECK(values[at] >= 0 && values[at] < num_groups, "`group_idx` must lie in 0 to ", num_groups - 1,
                      ", got ", values[at], ".");
      groups[at] = values[at];
    }
    return group_idx;
  }
  STD_TORCH_CHECK(num_groups > 0 || num_tiles * num_rows == 0, "`logits` must have at least one group.");
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
  check_rank(logits, 3, "logits");
  check_rank(values, 3, "values");
  check_type(logits, ScalarType::Float, "logits", "float32");
  STD_TORCH_CHECK(logits.size(0) == values.size(0) && logits.size(2) == values.size(1),
                  "`logits` (T, G, N) and `values` (T, N, C) must agree in T and N.");
  int64_t num_tiles = logits.size(0), num_groups = logits.size(1), num_rows = logits.size(2), width = values.size(2);
  Tensor group_idx = groups_of(logits, given);
  const int64_t* groups = data_of<int64_t>(group_idx);

  // members of each group in order: a counting sort
  std::vector<int64_t> offsets(num_tiles * num_groups + 1), members(num_tiles * num_rows);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t at = 0; at < num_rows; ++at) ++offsets[tile * num_groups + groups[tile * num_rows + at] + 1];
  }
  Tensor counts = new_empty(logits, {num_tiles, num_groups}, ScalarType::Long);
  int64_t* count_of = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::vector<float> divisors(num_tiles * num_groups);
  for (int64_t slot = 0; slot < num_tiles * num_groups; ++slot) {
    count_of[slot] = offsets[slot + 1];
    divisors[slot] = static_cast<float>(count_of[slot]) + static_cast<float>(eps);
    offsets[slot + 1] += offsets[slot];
  }
  // rows of values by number, which takes tiles that follow each other
  bool follow = num_tiles <= 1 || values.stride(0) == num_rows * values.stride(1);
  values = follow ? dense_rows(values) : torch::stable::contiguous(values);
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t at = 0; at < num_rows; ++at) {
      members[next[tile * num_groups + groups[tile * num_rows + at]]++] = tile * num_rows + at;
    }
  }

  Tensor means = new_empty(values, {num_tiles, num_groups, width});
  Rows rows = {values.const_data_ptr(), values.stride(1)};
  void* to = means.mutable_data_ptr();
  int64_t slots = num_tiles * num_groups, rows_per_slot = slots > 0 ? num_tiles * num_rows / slots + 1 : 1;
  parallel_for(0, slots, grain(width * rows_per_slot), [&](int64_t first, int64_t last) {
    kernels().segment_mean(dtype, rows, members.data(), offsets.data(), divisors.data(), width, first, last, to);
  });
  return {means, group_idx, counts};
}

Tensor assign_segment_mean_backward(Tensor grad, Tensor group_idx, Tensor counts, double eps) {
  Dtype dtype = dtype_of(grad, "grad");
  check_rank(grad, 3, "grad");
  check_rank(group_idx, 2, "group_idx");
  check_type(group_idx, ScalarType::Long, "group_idx", "int64");
  check_type(counts, ScalarType::Long, "counts", "int64");
  grad = torch::stable::contiguous(grad), group_idx = torch::stable::contiguous(group_idx);
  counts = torch::stable::contiguous(counts);
  int64_t num_tiles = grad.size(0), num_groups = grad.size(1), width = grad.size(2), num_rows = group_idx.size(1);
  STD_TORCH_CHECK(group_idx.size(0) == num_tiles && counts.numel() == num_tiles * num_groups,
                  "`grad` (T, G, C), `group_idx` (T, N) and `counts` (T, G) must agree in T and G.");
  std::vector<int64_t> slots(num_tiles * num_rows), offsets(num_tiles * num_rows + 1);
  for (int64_t at = 0; at < num_tiles * num_rows; ++at) {
    int64_t group = data_of<int64_t>(group_idx)[at];
    STD_TORCH_CHECK(group >= 0 && group < num_groups, "`group_idx` must lie in 0 to ", num_groups - 1, ".");
    slots[at] = at / num_rows * num_groups + group;
    offsets[at + 1] = at + 1;
  }
  std::vector<float> divisors(num_tiles * num_groups);
  for (int64_t slot = 0; slot < num_tiles * num_groups; ++slot) {
    divisors[slot] = static_cast<float>(data_of<int64_t>(counts)[slot]) + static_cast<float>(eps);
  }
  Tensor out = new_output(grad, {num_tiles, num_rows, width});
  Rows rows = {grad.const_data_ptr(), width};
  void* to = out.mutable_data_ptr();
  parallel_for(0, num_tiles * num_rows, grain(2 * width), [&](int64_t first, int64_t last) {
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
