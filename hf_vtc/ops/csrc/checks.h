// What both bindings check and look up, in terms of the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace vtc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t element_type(const Tensor& tensor, const char* name) {
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
  STD_TORCH_CHECK(tensor.scalar_type() == type, "`", name, "` must be ", words, ".");
}

// `index` and `offsets` of a ragged gather: (M,) and (S + 1,) int64, contiguous
inline void check_ragged(const Tensor& index, const Tensor& offsets) {
  check_rank(index, 1, "index");
  check_rank(offsets, 1, "offsets");
  check_type(index, ScalarType::Long, "index", "int64");
  check_type(offsets, ScalarType::Long, "offsets", "int64");
  STD_TORCH_CHECK(offsets.size(0) > 0, "`offsets` must hold the end of the last segment too: S + 1 numbers.");
}

// same tensor, or a copy whose rows are dense in the last dimension
inline Tensor dense_rows(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  bool dense = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t side_of(int64_t num_tokens) {
  int64_t side = 0;
  while (side * side < num_tokens) ++side;
  STD_TORCH_CHECK(side * side == num_tokens, "A grid needs a square number of tokens, got ", num_tokens, ".");
  return side;
}

// Checks which levels of a pyramid are wanted, and returns the deepest.
inline int64_t deepest_level(const std::vector<int64_t>& halvings, int64_t num_tokens, int64_t limit) {
  int64_t side = side_of(num_tokens), deepest = 0;
  uint64_t seen = 0;
  for (int64_t level : halvings) {
    STD_TORCH_CHECK(level >= 1 && level <= limit, "`halvings` must lie in 1 to ", limit, ", got ", level, ".");
    STD_TORCH_CHECK(!(seen >> level & 1), "`halvings` names ", level, " twice.");
    bool even = side % (int64_t(1) << (level / 2)) == 0 && side % (int64_t(1) << (level - level / 2)) == 0;
    STD_TORCH_CHECK(even, "A ", side, " x ", side, " grid cannot be halved ", level, " times.");
    seen |= uint64_t(1) << level;
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
      STD_TORCH_CHECK(grad.scalar_type() == grads[0].scalar_type(), "`grads` must all have one dtype.");
      levels.push_back(torch::stable::contiguous(grad));
    }
    num_tiles = grads[0].size(0), width = grads[0].size(2);
    num_tokens = grads[0].size(1) << halvings[0];
    deepest = deepest_level(halvings, num_tokens, limit);
    for (size_t idx = 0; idx < halvings.size(); ++idx) {
      bool agrees = grads[idx].size(0) == num_tiles && grads[idx].size(1) == num_tokens >> halvings[idx] &&
                    grads[idx].size(2) == width;
      STD_TORCH_CHECK(agrees, "`grads` must be levels of one grid, but number ", idx, " is not.");
    }
  }
};

}  // namespace vtc
