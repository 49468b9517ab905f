// Ragged mean of gathered rows, and its gradient: one block per output row and 256 packs of columns, every member in
// order, so that results repeat bit for bit.
#include <initializer_list>

#include "launchers.h"
#include "vtc_cuda.h"

namespace vtc {
namespace {

constexpr int kThreads = 256;

// Members of an output row are averaged; in the gradient each is divided by the length of its own segment.
template <class T, int N, bool kGradient>
__global__ void __launch_bounds__(kThreads)
    combine_rows(const T* __restrict__ rows, int64_t row_stride, int64_t num_rows, const int64_t* __restrict__ members,
                 int64_t num_members, const int64_t* __restrict__ offsets, int64_t num_targets,
                 const int64_t* __restrict__ segment_offsets, int64_t width, T* __restrict__ out) {
  const int64_t target = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (column >= width) return;
  const int64_t begin = offsets[target], end = offsets[target + 1];
  if (begin < 0 || end < begin || end > num_members || (target == 0 && begin != 0) ||
      (target == num_targets - 1 && end != num_members)) {
    VTC_TRAP();
  }
  float total[N] = {};
  bool in_range = true;
#pragma unroll 4
  for (int64_t at = begin; at < end; ++at) {
    int64_t row = members[at];
    const bool valid = row >= 0 && row < num_rows;
    in_range &= valid;
    // reads stay inside, and the trap below ends the kernel after them: a branch here would make loads wait
    row = valid ? row : 0;
    float values[N];
    load<N>(rows + row * row_stride + column, values);
    float divisor = 1.0f;
    if (kGradient) {
      divisor = static_cast<float>(segment_offsets[row + 1] - segment_offsets[row]);
      in_range &= divisor > 0;
    }
#pragma unroll
    for (int lane = 0; lane < N; ++lane) total[lane] += kGradient ? values[lane] / divisor : values[lane];
  }
  if (!in_range) VTC_TRAP();
  if (!kGradient && end > begin) {
    const float count = static_cast<float>(end - begin);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) total[lane] /= count;
  }
  store<N>(out + target * width + column, total);
}

template <bool kGradient>
int launch(int dtype, const void* rows, int64_t row_stride, int64_t num_rows, const int64_t* members,
           int64_t num_members, const int64_t* offsets, int64_t num_targets, const int64_t* segment_offsets,
           int64_t width, void* out, void* stream) {
  if (num_targets == 0 || width == 0) return 0;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(rows);
    T* to = static_cast<T*>(out);
    constexpr int kPack = 16 / sizeof(T);
    const int pack = pack_size<T>({rows, out}, {row_stride, width});
    const dim3 grid = grid_of(num_targets, ceil_div(width, kThreads * pack));
    if (pack == 1) {
      VTC_LAUNCH((combine_rows<T, 1, kGradient>), grid, kThreads, 0, stream, from, row_stride, num_rows, members,
                 num_members, offsets, num_targets, segment_offsets, width, to);
    } else {
      VTC_LAUNCH((combine_rows<T, kPack, kGradient>), grid, kThreads, 0, stream, from, row_stride, num_rows, members,
                 num_members, offsets, num_targets, segment_offsets, width, to);
    }
    return launch_status();
  });
}

}  // namespace
}  // namespace vtc

extern "C" int vtc_segment_mean(int dtype, const void* x, int64_t row_stride, int64_t num_rows, const int64_t* index,
                                int64_t num_members, const int64_t* offsets, int64_t num_segments, int64_t width,
                                void* out, void* stream) {
  return vtc::launch<false>(dtype, x, row_stride, num_rows, index, num_members, offsets, num_segments, nullptr, width,
                            out, stream);
}

extern "C" int vtc_segment_mean_backward(int dtype, const void* grad, int64_t row_stride, int64_t num_segments,
                                         const int64_t* segments, int64_t num_members, const int64_t* row_offsets,
                                         int64_t num_rows, const int64_t* offsets, int64_t width, void* out,
                                         void* stream) {
  return vtc::launch<true>(dtype, grad, row_stride, num_segments, segments, num_members, row_offsets, num_rows,
                           offsets, width, out, stream);
}
