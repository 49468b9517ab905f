// What both bindings check and look up, in terms of the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

namespace vtc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A product of sizes. Tensors without elements may have sizes whose product no integer holds.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(total, size, &total), "Sizes of the arguments are too large.");
  }
  return total;
}

// Checks that a tensor's elements are there: whoever freed the memory of its storage left its shape as it was.
inline void check_storage(const Tensor& tensor, const char* name) {
  // a tensor without data does not keep torch from choosing this kernel
  STD_TORCH_CHECK(tensor.is_cpu() || tensor.is_cuda(), "`", name, "` must be on the CPU or on a CUDA device.");
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset(), bytes = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK(last < bytes / static_cast<int64_t>(tensor.element_size()), "The memory of `", name,
                  "` was freed, or is smaller than its shape says.");
}

inline int32_t element_type(const Tensor& tensor, const char* name) {
  check_storage(tensor, name);
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "`", name, "` must be float32, bfloat16 or float16.");
  }
  return -1;
}

inline void check_rank(const Tensor& tensor, int64_t rank, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == rank, "`", name, "` must have ", rank, " dimensions, got ", tensor.dim(), ".");
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name, const char* words) {
  check_storage(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, "`", name, "` must be ", words, ".");
}

// (M,) int64
inline void check_indices(const Tensor& tensor, const char* name) {
  check_rank(tensor, 1, name);
  check_type(tensor, ScalarType::Long, name, "int64");
}

// (S + 1,) int64
inline void check_offsets(const Tensor& tensor, const char* name) {
  check_indices(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) > 0, "`", name, "` must hold the end of the last segment too: S + 1 numbers.");
}

// same tensor, or a copy whose rows are dense in the last dimension
inline Tensor dense_rows(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  bool dense = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t side_of(int64_t num_tokens) {
  int64_t side = std::llround(std::sqrt(static_cast<double>(num_tokens)));
  STD_TORCH_CHECK(product({side, side}) == num_tokens, "A grid needs a square number of tokens, got ", num_tokens,
                  ".");
  return side;
}

// How grids (T, N, C) are folded: so many rows of such a width from each.
struct Folded {
  int64_t rows_per_tile;
  int64_t width;

  Folded(const Tensor& features, const Tensor& weight, int64_t factor) {
    check_rank(features, 3, "features");
    int64_t side = side_of(features.size(1));
    STD_TORCH_CHECK(factor >= 1 && side % factor == 0, "The side of a grid, ", side,
                    ", must be a multiple of `factor`, ", factor, ".");
    rows_per_tile = (side / factor) * (side / factor);
    width = product({factor, factor, features.size(2)});
    check_affine(weight, "weight");
  }

  void check_affine(const Tensor& tensor, const char* name) const {
    check_storage(tensor, name);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == width, "`", name, "` must have ", width, " entries.");
  }

  // what the forward pass gave for `num_slots` tiles, and the gradient of its output
  void check_saved(const Tensor& features, const Tensor& grad, const Tensor& mean, const Tensor& rstd,
                   int64_t num_slots) const {
    int64_t num_rows = product({num_slots, rows_per_tile});
    check_storage(grad, "grad"), check_storage(mean, "mean"), check_storage(rstd, "rstd");
    STD_TORCH_CHECK(grad.scalar_type() == features.scalar_type(), "`grad` and `features` must have the same dtype.");
    STD_TORCH_CHECK(grad.numel() == product({num_rows, width}), "`grad` must have ", num_rows, " rows of ", width,
                    " elements.");
    STD_TORCH_CHECK(mean.numel() == num_rows && rstd.numel() == num_rows, "`mean` and `rstd` must have ", num_rows,
                    " entries.");
  }
};

inline void check_halvings(const std::vector<int64_t>& halvings, int64_t limit) {
  uint64_t seen = 0;
  for (int64_t level : halvings) {
    STD_TORCH_CHECK(level >= 1 && level <= limit, "`halvings` must lie in 1 to ", limit, ", got ", level, ".");
    STD_TORCH_CHECK(!(seen >> level & 1), "`halvings` names ", level, " twice.");
    seen |= uint64_t(1) << level;
  }
}

// Checks which levels of a pyramid are wanted, and returns the deepest.
inline int64_t deepest_level(const std::vector<int64_t>& halvings, int64_t num_tokens, int64_t limit) {
  check_halvings(halvings, limit);
  int64_t side = side_of(num_tokens), deepest = 0;
  for (int64_t level : halvings) {
    bool even = side % (int64_t(1) << (level / 2)) == 0 && side % (int64_t(1) << (level - level / 2)) == 0;
    STD_TORCH_CHECK(even, "A ", side, " x ", side, " grid cannot be halved ", level, " times.");
    deepest = level > deepest ? level : deepest;
  }
  return deepest;
}

// Gradients of all levels, contiguous, and the shape (T, N, C) of what was pooled.
struct PyramidGradients {
  std::vector<Tensor> levels;
  int64_t num_tiles;
  int64_t num_tokens;
  int64_t width;
  int64_t deepest;

  PyramidGradients(const std::vector<Tensor>& grads, const std::vector<int64_t>& halvings, int64_t limit) {
    STD_TORCH_CHECK(!grads.empty() && grads.size() == halvings.size(), "`grads` must have one tensor per level.");
    for (const Tensor& grad : grads) {
      check_rank(grad, 3, "grads");
      check_storage(grad, "grads");
      STD_TORCH_CHECK(grad.scalar_type() == grads[0].scalar_type(), "`grads` must all have one dtype.");
    }
    // before a shift by them
    check_halvings(halvings, limit);
    num_tiles = grads[0].size(0), width = grads[0].size(2);
    num_tokens = product({grads[0].size(1), int64_t(1) << halvings[0]});
    deepest = deepest_level(halvings, num_tokens, limit);
    for (size_t idx = 0; idx < halvings.size(); ++idx) {
      bool agrees = grads[idx].size(0) == num_tiles && grads[idx].size(1) == num_tokens >> halvings[idx] &&
                    grads[idx].size(2) == width;
      STD_TORCH_CHECK(agrees, "`grads` must be levels of one grid, but number ", idx, " is not.");
    }
    for (const Tensor& grad : grads) levels.push_back(torch::stable::contiguous(grad));
  }
};

// Groups (T, G) of rows (T, N) of values (T, N, C).
struct GroupShape {
  int64_t num_tiles;
  int64_t num_groups;
  int64_t num_rows;
  int64_t width;
  int64_t num_slots;  // groups of all tiles
  int64_t num_places;  // rows of all tiles

  GroupShape(int64_t tiles, int64_t groups, int64_t rows, int64_t width)
      : num_tiles(tiles), num_groups(groups), num_rows(rows), width(width), num_slots(product({tiles, groups})),
        num_places(product({tiles, rows})) {}

  static GroupShape of_forward(const Tensor& logits, const Tensor& values, const std::optional<Tensor>& group_idx) {
    check_rank(logits, 3, "logits");
    check_rank(values, 3, "values");
    check_type(logits, ScalarType::Float, "logits", "float32");
    STD_TORCH_CHECK(logits.size(0) == values.size(0) && logits.size(2) == values.size(1),
                    "`logits` (T, G, N) and `values` (T, N, C) must agree in T and N.");
    GroupShape shape(logits.size(0), logits.size(1), logits.size(2), values.size(2));
    STD_TORCH_CHECK(shape.num_groups > 0 || shape.num_places == 0, "`logits` must have at least one group.");
    if (group_idx.has_value()) {
      check_type(*group_idx, ScalarType::Long, "group_idx", "int64");
      STD_TORCH_CHECK(
          group_idx->dim() == 2 && group_idx->size(0) == shape.num_tiles && group_idx->size(1) == shape.num_rows,
          "`group_idx` must have shape (", shape.num_tiles, ", ", shape.num_rows, ").");
    }
    return shape;
  }

  static GroupShape of_backward(const Tensor& grad, const Tensor& group_idx, const Tensor& counts) {
    check_rank(grad, 3, "grad");
    check_rank(group_idx, 2, "group_idx");
    check_type(group_idx, ScalarType::Long, "group_idx", "int64");
    check_type(counts, ScalarType::Long, "counts", "int64");
    GroupShape shape(grad.size(0), grad.size(1), group_idx.size(1), grad.size(2));
    STD_TORCH_CHECK(group_idx.size(0) == shape.num_tiles && counts.numel() == shape.num_slots,
                    "`grad` (T, G, C), `group_idx` (T, N) and `counts` (T, G) must agree in T and G.");
    return shape;
  }
};

}  // namespace vtc
