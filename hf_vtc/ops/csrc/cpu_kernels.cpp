// CPU kernels, compiled once per instruction set: VTC_TABLE names the table that this object file defines.
//
// Everything lies in an unnamed namespace and nothing of the standard library is instantiated: an inline function that
// two object files share would be taken from either one, so that a plain machine could meet AVX code.
#include "cpu_kernels.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace vtc {
namespace {

#define VTC_INLINE inline __attribute__((always_inline))

// as wide as a register, no wider: compilers take conversions of longer vectors apart element by element
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kChunk = 1024;  // columns of a pyramid that are worked on at a time: all levels stay in the L1 cache
constexpr int kMaxHalvings = 16;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
VTC_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

VTC_INLINE float sum_of(Floats values) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) values[lane] += values[lane + half];
  }
  return values[0];
}

// Element types: kLanes elements to floats, and back as they are stored, rounded to nearest even.
struct F32 {
  typedef float stored;
  static VTC_INLINE Floats load(const stored* from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
  }
  static VTC_INLINE Floats pack(Floats values) { return values; }
};

struct BF16 {
  typedef uint16_t stored;
  static VTC_INLINE Floats load(const stored* from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return bits_of<Floats>(__builtin_convertvector(halves, Words) << 16);
  }
  static VTC_INLINE Halves pack(Floats values) {
    Words bits = bits_of<Words>(values);
    Words rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    // rounding could carry a NaN over to infinity
    return __builtin_convertvector(values != values ? (bits >> 16) | 0x40 : rounded, Halves);
  }
};

struct F16 {
  typedef uint16_t stored;
#if defined(__AVX2__) && defined(__F16C__)
  static constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  static VTC_INLINE Floats load(const stored* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static VTC_INLINE Halves pack(Floats values) { return bits_of<Halves>(_mm512_cvtps_ph(values, kNearestEven)); }
#else
  static VTC_INLINE Floats load(const stored* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static VTC_INLINE Halves pack(Floats values) { return bits_of<Halves>(_mm256_cvtps_ph(values, kNearestEven)); }
#endif
#else
  static VTC_INLINE float widened(uint16_t half) {
    uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    // moved to the exponent's place, then scaled from a bias of 15 to one of 127: subnormal numbers come out right
    float value = bits_of<float>(magnitude << 13) * 0x1p112f;
    if (magnitude >= 0x7c00u) value = bits_of<float>((magnitude << 13) | 0x7f800000u);
    return bits_of<float>(bits_of<uint32_t>(value) | sign);
  }
  static VTC_INLINE uint16_t narrowed(float value) {
    uint32_t bits = bits_of<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;
    if (magnitude < 0x38800000u) {
      // adding 0.5 leaves the subnormal number in the low bits, rounded by the addition
      float shifted = bits_of<float>(magnitude) + 0.5f;
      return sign | (bits_of<uint32_t>(shifted) - 0x3f000000u);
    }
    return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
  }
  static VTC_INLINE Floats load(const stored* from) {
    Floats values = {};
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = widened(from[lane]);
    return values;
  }
  static VTC_INLINE Halves pack(Floats values) {
    Halves halves = {};
    for (int lane = 0; lane < kLanes; ++lane) halves[lane] = narrowed(values[lane]);
    return halves;
  }
#endif
};

// All lanes, or the first few of them at the end of a row.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
VTC_INLINE Floats load(const typename T::stored* from, Whole) {
  return T::load(from);
}
template <class T>
VTC_INLINE Floats load(const typename T::stored* from, Part part) {
  typename T::stored padded[kLanes] = {};
  memcpy(padded, from, part.count * sizeof(typename T::stored));
  return T::load(padded);
}
template <class T>
VTC_INLINE void store(typename T::stored* to, Floats values, Whole) {
  auto packed = T::pack(values);
  memcpy(to, &packed, sizeof packed);
}
template <class T>
VTC_INLINE void store(typename T::stored* to, Floats values, Part part) {
  auto packed = T::pack(values);
  memcpy(to, &packed, part.count * sizeof(typename T::stored));
}

// Past the caches, which spares reading what is overwritten; `to` is aligned to what is written. `finish_streams` must
// come before another thread reads it.
template <class T>
VTC_INLINE void stream(typename T::stored* to, Floats values, Whole) {
  auto packed = T::pack(values);
#if defined(__AVX512F__)
  if constexpr (sizeof packed == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits_of<__m512i>(packed));
#endif
#if defined(__AVX2__) && defined(__F16C__)
  if constexpr (sizeof packed == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_of<__m256i>(packed));
  if constexpr (sizeof packed == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_of<__m128i>(packed));
#else
  memcpy(to, &packed, sizeof packed);
#endif
}
template <class T>
VTC_INLINE void stream(typename T::stored* to, Floats values, Part part) {
  store<T>(to, values, part);
}

template <class T, class Lanes>
VTC_INLINE void put(typename T::stored* to, Floats values, bool past_caches, Lanes lanes) {
  past_caches ? stream<T>(to, values, lanes) : store<T>(to, values, lanes);
}

VTC_INLINE void finish_streams() {
#if defined(__AVX2__) && defined(__F16C__)
  _mm_sfence();
#endif
}

// Differences from the mean, 0 in lanes beyond the end of a row.
VTC_INLINE Floats from_mean(Floats values, float mean, Whole) { return values - mean; }
VTC_INLINE Floats from_mean(Floats values, float mean, Part part) {
  Floats differences = values - mean;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane >= part.count) differences[lane] = 0;
  }
  return differences;
}

// body(column, Whole or Part) over a row
template <class Body>
VTC_INLINE void for_columns(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) body(column, Whole{});
  if (column < width) body(column, Part{width - column});
}

constexpr int kSums = 4;

// Sums that do not wait for each other: one addition takes as long as several that overlap.
struct Sums {
  Floats parts[kSums] = {};

  VTC_INLINE float total() const { return sum_of((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// body(column, which of kSums sums, Whole or Part) over a row
template <class Body>
VTC_INLINE void for_columns_summing(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes) {
    body(column, 0, Whole{});
    body(column + kLanes, 1, Whole{});
    body(column + 2 * kLanes, 2, Whole{});
    body(column + 3 * kLanes, 3, Whole{});
  }
  for (; column + kLanes <= width; column += kLanes) body(column, 0, Whole{});
  if (column < width) body(column, 0, Part{width - column});
}

template <class T>
const typename T::stored* row_of(Rows rows, int64_t row) {
  return static_cast<const typename T::stored*>(rows.data) + row * rows.stride;
}

// ---- segment_mean ----

constexpr int64_t kManyMembers = 6;

// The mean of so many rows that reading them side by side would be too many streams: one after the other, a run of
// columns at a time. Returns how many columns it did: all that fill a register.
template <class T>
VTC_INLINE int64_t combine_many(Rows rows, const int64_t* members, int64_t count, float divisor, int64_t width,
                                typename T::stored* out) {
  typedef typename T::stored stored;
  // columns whose sums stay in the L1 cache; float32, which no conversion slows down, gains by longer reads
  constexpr int64_t kRun = sizeof(stored) == 4 ? 2048 : 512;
  float sums[kRun];
  int64_t whole = width / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kRun) {
    int64_t length = whole - start < kRun ? whole - start : kRun;
    const stored* first = row_of<T>(rows, members[0]) + start;
    for (int64_t column = 0; column < length; column += kLanes) {
      store<F32>(sums + column, T::load(first + column), Whole{});
    }
    int64_t member = 1;
    // in pairs, which halves the traffic of the sums
    for (; member + 2 < count; member += 2) {
      const stored* one = row_of<T>(rows, members[member]) + start;
      const stored* two = row_of<T>(rows, members[member + 1]) + start;
      for (int64_t column = 0; column < length; column += kLanes) {
        store<F32>(sums + column, F32::load(sums + column) + T::load(one + column) + T::load(two + column), Whole{});
      }
    }
    for (; member + 1 < count; ++member) {
      const stored* one = row_of<T>(rows, members[member]) + start;
      for (int64_t column = 0; column < length; column += kLanes) {
        store<F32>(sums + column, F32::load(sums + column) + T::load(one + column), Whole{});
      }
    }
    const stored* last = row_of<T>(rows, members[member]) + start;
    for (int64_t column = 0; column < length; column += kLanes) {
      store<T>(out + start + column, (F32::load(sums + column) + T::load(last + column)) / divisor, Whole{});
    }
  }
  return whole;
}

// One output row from `count` input rows, each divided by its own divisor or their sum by one.
template <class T, bool kOwnDivisors>
VTC_INLINE void combine(Rows rows, const int64_t* members, int64_t count, const float* divisors, float divisor,
                        int64_t width, typename T::stored* out) {
  typedef typename T::stored stored;
  if (count == 0) {
    memset(out, 0, width * sizeof(stored));
    return;
  }
  if (count == 1 && (kOwnDivisors ? divisors[members[0]] : divisor) == 1.0f) {
    memcpy(out, row_of<T>(rows, members[0]), width * sizeof(stored));
    return;
  }
  int64_t column = 0;
  if (!kOwnDivisors && count > kManyMembers) {
    column = combine_many<T>(rows, members, count, divisor, width, out);
  }
  constexpr int kBlock = 8;
  for (; column + kBlock * kLanes <= width; column += kBlock * kLanes) {
    Floats totals[kBlock] = {};
    for (int64_t member = 0; member < count; ++member) {
      const stored* from = row_of<T>(rows, members[member]) + column;
      for (int block = 0; block < kBlock; ++block) {
        Floats values = T::load(from + block * kLanes);
        totals[block] += kOwnDivisors ? values / divisors[members[member]] : values;
      }
    }
    for (int block = 0; block < kBlock; ++block) {
      Floats total = kOwnDivisors ? totals[block] : totals[block] / divisor;
      store<T>(out + column + block * kLanes, total, Whole{});
    }
  }
  for_columns(width - column, [&](int64_t rest, auto lanes) __attribute__((always_inline)) {
    Floats total = {};
    for (int64_t member = 0; member < count; ++member) {
      Floats values = load<T>(row_of<T>(rows, members[member]) + column + rest, lanes);
      total += kOwnDivisors ? values / divisors[members[member]] : values;
    }
    store<T>(out + column + rest, kOwnDivisors ? total : total / divisor, lanes);
  });
}

template <class T>
void segment_mean(Rows x, const int64_t* index, const int64_t* offsets, const float* divisors, int64_t width,
                  int64_t first, int64_t last, void* out) {
  typename T::stored* rows = static_cast<typename T::stored*>(out);
  for (int64_t segment = first; segment < last; ++segment) {
    int64_t begin = offsets[segment], count = offsets[segment + 1] - begin;
    combine<T, false>(x, index + begin, count, nullptr, divisors[segment], width, rows + segment * width);
  }
}

template <class T>
void segment_mean_backward(Rows grad, const int64_t* segments, const int64_t* offsets, const float* divisors,
                           int64_t width, int64_t first, int64_t last, void* out) {
  typename T::stored* rows = static_cast<typename T::stored*>(out);
  for (int64_t row = first; row < last; ++row) {
    int64_t begin = offsets[row], count = offsets[row + 1] - begin;
    combine<T, true>(grad, segments + begin, count, divisors, 1.0f, width, rows + row * width);
  }
}

// ---- unshuffle_layernorm ----

// Where the neighbours of one folded row lie: body(offset in the grid's data, offset in the folded row, length).
template <class Body>
VTC_INLINE void for_pieces(const Grids& x, Folding folding, const int64_t* tiles, int64_t item, Body body) {
  int64_t factor = folding.factor, small = x.side / factor;
  int64_t slot = item / (small * small), place = item % (small * small);
  int64_t row = folding.transposed ? place % small : place / small;
  int64_t column = folding.transposed ? place / small : place % small;
  int64_t tile = tiles ? tiles[slot] : slot;
  // neighbours of one grid row follow each other unless rows lie apart
  int64_t pieces = x.row_stride == x.width ? 1 : factor, length = factor * x.width / pieces;
  for (int64_t down = 0; down < factor; ++down) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      int64_t token = (row * factor + down) * x.side + column * factor + piece;
      body(tile * x.tile_stride + token * x.row_stride, (down * pieces + piece) * length, length);
    }
  }
}

template <class T>
void unshuffle_layernorm(Grids x, Folding folding, const int64_t* tiles, const float* weight, const float* bias,
                         float eps, int64_t first, int64_t last, void* out, bool large, float* means, float* rstds) {
  typedef typename T::stored stored;
  const stored* data = static_cast<const stored*>(x.data);
  int64_t width = folding.factor * folding.factor * x.width;
  for (int64_t item = first; item < last; ++item) {
    // three times over the row where it lies: after the first it is in a cache
    Sums sums;
    for_pieces(x, folding, tiles, item, [&](int64_t from, int64_t, int64_t length) __attribute__((always_inline)) {
      for_columns_summing(length, [&](int64_t column, int part, auto lanes) __attribute__((always_inline)) {
        sums.parts[part] += load<T>(data + from + column, lanes);
      });
    });
    float mean = sums.total() / width;
    Sums squares;
    for_pieces(x, folding, tiles, item, [&](int64_t from, int64_t, int64_t length) __attribute__((always_inline)) {
      for_columns_summing(length, [&](int64_t column, int part, auto lanes) __attribute__((always_inline)) {
        Floats centred = from_mean(load<T>(data + from + column, lanes), mean, lanes);
        squares.parts[part] += centred * centred;
      });
    });
    float rstd = 1.0f / sqrtf(squares.total() / width + eps);
    stored* normed = static_cast<stored*>(out) + item * width;
    for_pieces(x, folding, tiles, item, [&](int64_t from, int64_t to, int64_t length) __attribute__((always_inline)) {
      for_columns(length, [&](int64_t column, auto lanes) __attribute__((always_inline)) {
        Floats centred = (load<T>(data + from + column, lanes) - mean) * rstd;
        Floats scaled = centred * load<F32>(weight + to + column, lanes) + load<F32>(bias + to + column, lanes);
        put<T>(normed + to + column, scaled, large, lanes);
      });
    });
    means[item] = mean;
    rstds[item] = rstd;
  }
  finish_streams();
}

template <class T>
void unshuffle_layernorm_backward(Rows grad, Grids x, Folding folding, const int64_t* tiles, const float* weight,
                                  const float* means, const float* rstds, int64_t first, int64_t last, float* scratch,
                                  void* grad_x, float* grad_weight, float* grad_bias) {
  typedef typename T::stored stored;
  const stored* data = static_cast<const stored*>(x.data);
  int64_t width = folding.factor * folding.factor * x.width;
  // the gradient is contiguous, whatever the input was
  Grids dense = {grad_x, x.side * x.side * x.width, x.width, x.side, x.width};
  stored* to_x = static_cast<stored*>(grad_x);
  for (int64_t item = first; item < last; ++item) {
    const stored* upstream = row_of<T>(grad, item);
    float mean = means[item], rstd = rstds[item];
    Sums sums, products;
    for_pieces(x, folding, tiles, item, [&](int64_t from, int64_t to, int64_t length) __attribute__((always_inline)) {
      for_columns_summing(length, [&](int64_t column, int part, auto lanes) __attribute__((always_inline)) {
        int64_t at = to + column;
        Floats normed = (load<T>(data + from + column, lanes) - mean) * rstd;
        Floats own = load<T>(upstream + at, lanes);
        Floats scaled = own * load<F32>(weight + at, lanes);
        sums.parts[part] += scaled;
        // lanes beyond the end hold no gradient, so that the mean in `normed` there does no harm
        products.parts[part] += scaled * normed;
        store<F32>(grad_weight + at, load<F32>(grad_weight + at, lanes) + own * normed, lanes);
        store<F32>(grad_bias + at, load<F32>(grad_bias + at, lanes) + own, lanes);
        store<F32>(scratch + at, normed, lanes);
      });
    });
    float mean_sum = sums.total() / width, mean_product = products.total() / width;
    for_pieces(dense, folding, tiles, item, [&](int64_t to, int64_t from, int64_t length) __attribute__((always_inline)) {
      for_columns(length, [&](int64_t column, auto lanes) __attribute__((always_inline)) {
        int64_t at = from + column;
        Floats scaled = load<T>(upstream + at, lanes) * load<F32>(weight + at, lanes);
        Floats normed = load<F32>(scratch + at, lanes);
        store<T>(to_x + to + column, (scaled - mean_sum - normed * mean_product) * rstd, lanes);
      });
    });
  }
}

// ---- pool_pyramid ----

// Columns are halved first, then rows, in turns: a block of level k is 2^(k / 2) rows by 2^(k - k / 2) columns.
VTC_INLINE int64_t block_rows(int64_t level) { return int64_t(1) << (level / 2); }
VTC_INLINE int64_t block_columns(int64_t level) { return int64_t(1) << (level - level / 2); }

// One chunk of columns of one tile, and where each level keeps its pooled rows.
template <class T>
struct PyramidChunk {
  typename T::stored* levels[kMaxHalvings + 1];  // the tile's rows of each level, null where it is not wanted
  int64_t side;
  int64_t width;
  int64_t column;
  int64_t length;
  bool large;  // no cache would hold the levels, whose rows are aligned
  float buffers[kMaxHalvings + 1][kChunk];

  typename T::stored* row(int64_t level, int64_t down, int64_t right) {
    int64_t place = down / block_rows(level) * (side / block_columns(level)) + right / block_columns(level);
    return levels[level] + place * width + column;
  }

  void set_tile(const Levels& wanted, int64_t tile, int64_t first_column) {
    for (auto& level : levels) level = nullptr;
    for (int64_t idx = 0; idx < wanted.count; ++idx) {
      int64_t rows = (side * side) >> wanted.halvings[idx];
      levels[wanted.halvings[idx]] = static_cast<typename T::stored*>(wanted.data[idx]) + tile * rows * width;
    }
    column = first_column;
    length = width - column < kChunk ? width - column : kChunk;
  }
};

// Sum of the block of `level` at (down, right) into `total`; every wanted level in it is written on the way.
template <class T>
void pool_block(PyramidChunk<T>& chunk, const typename T::stored* tile, int64_t row_stride, int64_t level,
                int64_t down, int64_t right, float* total) {
  int64_t other_down = level % 2 ? down : down + block_rows(level - 1);
  int64_t other_right = level % 2 ? right + block_columns(level - 1) : right;
  typename T::stored* out = chunk.levels[level] ? chunk.row(level, down, right) : nullptr;
  float scale = 1.0f / (int64_t(1) << level);
  if (level == 1) {
    const typename T::stored* left = tile + (down * chunk.side + right) * row_stride + chunk.column;
    const typename T::stored* next = tile + (down * chunk.side + other_right) * row_stride + chunk.column;
    for_columns(chunk.length, [&](int64_t at, auto lanes) __attribute__((always_inline)) {
      Floats sums = load<T>(left + at, lanes) + load<T>(next + at, lanes);
      store<F32>(total + at, sums, lanes);
      if (out) put<T>(out + at, sums * scale, chunk.large, lanes);
    });
    return;
  }
  float* other = chunk.buffers[level];
  pool_block(chunk, tile, row_stride, level - 1, down, right, total);
  pool_block(chunk, tile, row_stride, level - 1, other_down, other_right, other);
  for_columns(chunk.length, [&](int64_t at, auto lanes) __attribute__((always_inline)) {
    Floats sums = load<F32>(total + at, lanes) + load<F32>(other + at, lanes);
    store<F32>(total + at, sums, lanes);
    if (out) put<T>(out + at, sums * scale, chunk.large, lanes);
  });
}

template <class T>
void pool_pyramid(Grids x, Levels levels, bool large, int64_t first, int64_t last) {
  PyramidChunk<T> chunk;
  chunk.side = x.side;
  chunk.width = x.width;
  chunk.large = large;
  int64_t across = x.side / block_columns(levels.deepest), blocks = across * (x.side / block_rows(levels.deepest));
  for (int64_t item = first; item < last; ++item) {
    int64_t tile = item / blocks, down = item % blocks / across, right = item % across;
    const typename T::stored* data = static_cast<const typename T::stored*>(x.data) + tile * x.tile_stride;
    for (int64_t column = 0; column < x.width; column += kChunk) {
      chunk.set_tile(levels, tile, column);
      pool_block(chunk, data, x.row_stride, levels.deepest, down * block_rows(levels.deepest),
                 right * block_columns(levels.deepest), chunk.buffers[0]);
    }
  }
  finish_streams();
}

// What every token of the block gets: `above`, which the levels above gave, and this level's share.
template <class T>
void spread_block(PyramidChunk<T>& chunk, typename T::stored* tile, int64_t level, int64_t down, int64_t right,
                  const float* above) {
  if (level == 0) {
    typename T::stored* to = tile + (down * chunk.side + right) * chunk.width + chunk.column;
    for_columns(chunk.length, [&](int64_t at, auto lanes) __attribute__((always_inline)) {
      store<T>(to + at, load<F32>(above + at, lanes), lanes);
    });
    return;
  }
  const float* shared = above;
  if (chunk.levels[level]) {
    const typename T::stored* own = chunk.row(level, down, right);
    float scale = 1.0f / (int64_t(1) << level);
    float* sums = chunk.buffers[level - 1];
    for_columns(chunk.length, [&](int64_t at, auto lanes) __attribute__((always_inline)) {
      store<F32>(sums + at, load<F32>(above + at, lanes) + load<T>(own + at, lanes) * scale, lanes);
    });
    shared = sums;
  }
  spread_block(chunk, tile, level - 1, down, right, shared);
  int64_t other_down = level % 2 ? down : down + block_rows(level - 1);
  int64_t other_right = level % 2 ? right + block_columns(level - 1) : right;
  spread_block(chunk, tile, level - 1, other_down, other_right, shared);
}

template <class T>
void pool_pyramid_backward(Levels levels, int64_t side, int64_t width, int64_t first, int64_t last, void* grad_x) {
  PyramidChunk<T> chunk;
  chunk.side = side;
  chunk.width = width;
  float nothing[kChunk] = {};
  int64_t across = side / block_columns(levels.deepest), blocks = across * (side / block_rows(levels.deepest));
  for (int64_t item = first; item < last; ++item) {
    int64_t tile = item / blocks, down = item % blocks / across, right = item % across;
    typename T::stored* data = static_cast<typename T::stored*>(grad_x) + tile * side * side * width;
    for (int64_t column = 0; column < width; column += kChunk) {
      chunk.set_tile(levels, tile, column);
      spread_block(chunk, data, levels.deepest, down * block_rows(levels.deepest),
                   right * block_columns(levels.deepest), nothing);
    }
  }
}

// ---- argmax ----

void argmax(const float* logits, int64_t group_stride, int64_t num_groups, int64_t first, int64_t last,
            int64_t* group) {
  constexpr int64_t kRows = 64;
  for (int64_t start = first; start < last; start += kRows) {
    int64_t count = last - start < kRows ? last - start : kRows;
    float best[kRows];
    int32_t chosen[kRows];
    for (int64_t at = 0; at < count; ++at) best[at] = logits[start + at], chosen[at] = 0;
    for (int64_t idx = 1; idx < num_groups; ++idx) {
      const float* row = logits + idx * group_stride + start;
      for (int64_t at = 0; at < count; ++at) {
        bool better = row[at] > best[at] || (row[at] != row[at] && best[at] == best[at]);
        best[at] = better ? row[at] : best[at];
        chosen[at] = better ? static_cast<int32_t>(idx) : chosen[at];
      }
    }
    for (int64_t at = 0; at < count; ++at) group[start + at] = chosen[at];
  }
}

// the function for an element type
#define VTC_BY_DTYPE(name)                                        \
  template <class... Args>                                        \
  void name##_any(Dtype dtype, Args... args) {                    \
    if (dtype == kFloat32) name<F32>(args...);                    \
    if (dtype == kBFloat16) name<BF16>(args...);                  \
    if (dtype == kFloat16) name<F16>(args...);                    \
  }

VTC_BY_DTYPE(segment_mean)
VTC_BY_DTYPE(segment_mean_backward)
VTC_BY_DTYPE(unshuffle_layernorm)
VTC_BY_DTYPE(unshuffle_layernorm_backward)
VTC_BY_DTYPE(pool_pyramid)
VTC_BY_DTYPE(pool_pyramid_backward)

}  // namespace

extern const CpuKernels VTC_TABLE = {
    segment_mean_any, segment_mean_backward_any,  unshuffle_layernorm_any, unshuffle_layernorm_backward_any,
    pool_pyramid_any, pool_pyramid_backward_any, argmax,
};

}  // namespace vtc
