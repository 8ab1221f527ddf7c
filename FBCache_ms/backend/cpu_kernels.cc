// Operators of Flux that MindSpore's CPU backend has as chains of small kernels only, each in one pass, in float32.
//
// The interface is that of MindSpore's ahead-of-time Custom operators: the inputs, then the output; beside each kernel
// the shape and type of its output. Shapes are the caller's to check.

#include <dlfcn.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Fewer elements than this are done before a second thread has woken up.
constexpr int64_t kWorthAThread = 1 << 16;

// e^x to 1e-7, for the compiler to vectorise: 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor polynomial.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float sum = 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return sum * power;
}

inline float mean(const float *x, int64_t width) {
  float sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += x[i];
  return sum / width;
}

inline float mean_square(const float *x, int64_t width, float shift) {
  float sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += (x[i] - shift) * (x[i] - shift);
  return sum / width;
}

// Calls work(begin, end) for pieces of [0, size): one, or one a thread where there are many elements.
template <typename Work>
void in_pieces(int64_t size, int64_t elements, Work work) {
  if (elements <= kWorthAThread) {
    work(0, size);
    return;
  }
#pragma omp parallel
  {
    const int64_t piece = omp_get_thread_num(), pieces = omp_get_num_threads();
    work(size * piece / pieces, size * (piece + 1) / pieces);
  }
}

// c = a b + beta c of oneDNN in this thread alone, all of them by rows; without a thread pool it starts no thread.
using Products = int (*)(char transpose_a, char transpose_b, int64_t rows, int64_t columns, int64_t depth, float alpha,
                         const float *a, int64_t a_row, const float *b, int64_t b_row, float beta, float *c,
                         int64_t c_row, void *thread_pool);

// MindSpore brings oneDNN along, and cpu_kernels.py has loaded it.
Products products() {
  void *library = dlopen("libdnnl.so.2", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Products>(dlsym(library, "dnnl_threadpool_interop_sgemm")) : nullptr;
}

int64_t product(const int64_t *shape, int first, int last) {
  int64_t result = 1;
  for (int axis = first; axis < last; ++axis) result *= shape[axis];
  return result;
}

int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// A tile of a product, as large as the registers hold.
using Lanes = float __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16, kRows = 6;
#ifdef __AVX512F__
constexpr int64_t kWide = 2;
#else
constexpr int64_t kWide = 1;
#endif
constexpr int64_t kColumns = kWide * kLanes;

// c = a b for kRows rows of a, (kRows, depth), and kColumns columns of b, (depth, kColumns), each with its row length.
inline void multiply_tile(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float *c,
                          int64_t c_row) {
  Lanes sums[kRows][kWide] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t wide = 0; wide < kWide; ++wide) {
      const Lanes right = *reinterpret_cast<const Lanes *>(b + k * b_row + wide * kLanes);
#pragma GCC unroll 8
      for (int64_t row = 0; row < kRows; ++row) sums[row][wide] += a[row * a_row + k] * right;
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t wide = 0; wide < kWide; ++wide) {
      *reinterpret_cast<Lanes *>(c + row * c_row + wide * kLanes) = sums[row][wide];
    }
  }
}

// A stream's queries, keys and values (B, length, heads * width), and the weights (width) of its RMSNorms.
struct Stream {
  const float *query, *key, *value, *query_weight, *key_weight;
  int64_t length;
};

// RMSNorm of a head times a scale, turned by the rotary table; y's elements lie ``step`` apart.
inline void norm_rotate(const float *x, const float *weight, const float *cosine, const float *sine, float epsilon,
                        float scale, int64_t width, float *y, int64_t step) {
  const float factor = scale / std::sqrt(mean_square(x, width, 0) + epsilon);
  for (int64_t i = 0; i < width; i += 2) {
    const float even = x[i] * factor * weight[i], odd = x[i + 1] * factor * weight[i + 1];
    y[i * step] = even * cosine[i] - odd * sine[i];
    y[(i + 1) * step] = odd * cosine[i + 1] + even * sine[i + 1];
  }
}

// In place e^(x - max), and 1 over the sum of that.
inline float softmax_numerators(float *x, int64_t size) {
  float most = x[0], sum = 0;
  for (int64_t i = 1; i < size; ++i) most = std::max(most, x[i]);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    x[i] = exponential(x[i] - most);
    sum += x[i];
  }
  return 1 / sum;
}

// Attention of one head, of the streams' tokens one after the other; every pointer is at the head's first element, rows
// of the streams and of the output y are ``row`` apart.
void attend(const Stream *streams, int count, const float *cosine, const float *sine, float epsilon, int64_t width,
            int64_t row, float *y) {
  int64_t length = 0;
  for (int i = 0; i < count; ++i) length += streams[i].length;
  const int64_t rows = rounded_up(length, kRows), columns = rounded_up(length, kColumns);
  const int64_t wide = rounded_up(width, kColumns);
  std::vector<float> queries(rows * width), keys(width * columns), values(length * wide), scores(kRows * columns),
      outputs(kRows * wide);
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  int64_t token = 0;
  for (int i = 0; i < count; ++i) {
    const Stream &stream = streams[i];
    for (int64_t t = 0; t < stream.length; ++t, ++token) {
      const float *c = cosine + token * width, *s = sine + token * width;
      norm_rotate(stream.query + t * row, stream.query_weight, c, s, epsilon, scale, width, &queries[token * width], 1);
      norm_rotate(stream.key + t * row, stream.key_weight, c, s, epsilon, 1, width, &keys[token], columns);
      std::copy_n(stream.value + t * row, width, &values[token * wide]);
    }
  }
  for (int64_t first = 0; first < length; first += kRows) {
    for (int64_t column = 0; column < columns; column += kColumns) {
      multiply_tile(&queries[first * width], width, &keys[column], columns, width, &scores[column], columns);
    }
    float factors[kRows];
    for (int64_t i = 0; i < kRows; ++i) factors[i] = softmax_numerators(&scores[i * columns], length);
    for (int64_t column = 0; column < wide; column += kColumns) {
      multiply_tile(scores.data(), columns, &values[column], wide, length, &outputs[column], wide);
    }
    for (int64_t i = 0; i < std::min(kRows, length - first); ++i) {
      for (int64_t j = 0; j < width; ++j) y[(first + i) * row + j] = outputs[i * wide + j] * factors[i];
    }
  }
}

// Attention of all samples' heads. The shape is the queries' of the last stream, y is (B, all tokens, heads * width).
void attend_all(const Stream *streams, int count, const int64_t *shape, const float *cosine, const float *sine,
                float epsilon, int64_t width, float *y) {
  int64_t length = 0;
  for (int i = 0; i < count; ++i) length += streams[i].length;
  const int64_t row = shape[2], heads = row / width, pairs = shape[0] * heads;
  // A pair of tokens takes about as long as kLanes elements do elsewhere for every kLanes of the width.
  in_pieces(pairs, pairs * length * length * width / (2 * kLanes), [=](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t sample = pair / heads, offset = pair % heads * width;
      std::vector<Stream> here(streams, streams + count);
      for (Stream &stream : here) {
        const int64_t start = sample * stream.length * row + offset;
        stream.query += start;
        stream.key += start;
        stream.value += start;
      }
      attend(here.data(), count, cosine, sine, epsilon, width, row, y + sample * length * row + offset);
    }
  });
}

}  // namespace

#define INFER_SHAPE(name) extern "C" std::vector<int64_t> name##InferShape(int *ranks, int64_t **shapes, void *extra)
#define INFER_TYPE(name) \
  extern "C" int name##InferType(std::vector<int> types, void *extra) { return types[0]; }
#define KERNEL(name)                                                                                          \
  extern "C" int name(int count, void **tensors, int *ranks, int64_t **shapes, const char **types, void *stream, \
                      void *extra)
#define TENSOR(index) static_cast<const float *>(tensors[index])
#define OUTPUT static_cast<float *>(tensors[count - 1])

// x w^T + b: x (..., K), w (N, K), b (N). MindSpore has two changes of shape, a product and a sum in its place.
INFER_TYPE(linear)
INFER_SHAPE(linear) {
  std::vector<int64_t> shape(shapes[0], shapes[0] + ranks[0]);
  shape.back() = shapes[1][0];
  return shape;
}
KERNEL(linear) {
  static const Products multiply = products();
  if (!multiply) return 1;
  const float *x = TENSOR(0), *weight = TENSOR(1), *bias = TENSOR(2);
  float *y = OUTPUT;
  const int64_t rows = product(shapes[0], 0, ranks[0] - 1), depth = shapes[1][1], columns = shapes[1][0];
  // A product takes about as long as an element does elsewhere for every 256 of its multiplications.
  in_pieces(rows, rows * depth * columns / 256, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::copy_n(bias, columns, y + row * columns);
    multiply('N', 'T', end - begin, columns, depth, 1, x + begin * depth, depth, weight, depth, 1, y + begin * columns,
             columns, nullptr);
  });
  return 0;
}

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU with tanh. x of any shape.
INFER_TYPE(gelu_tanh)
INFER_SHAPE(gelu_tanh) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(gelu_tanh) {
  const float *x = TENSOR(0);
  float *y = OUTPUT;
  const int64_t size = product(shapes[0], 0, ranks[0]);
  in_pieces(size, size, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      y[i] = x[i] / (1 + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    }
  });
  return 0;
}

// norm(x) (1 + scale) + shift over the last axis: x (B, L, D), scale and shift (B, D), epsilon a scalar.
INFER_TYPE(layer_norm_modulate)
INFER_SHAPE(layer_norm_modulate) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(layer_norm_modulate) {
  const float *x = TENSOR(0), *scale = TENSOR(1), *shift = TENSOR(2);
  const float epsilon = *TENSOR(3);
  float *y = OUTPUT;
  const int64_t length = shapes[0][1], width = shapes[0][2], rows = shapes[0][0] * length;
  in_pieces(rows, rows * width, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *from = x + row * width, *by = scale + row / length * width, *add = shift + row / length * width;
      float *to = y + row * width;
      const float centre = mean(from, width);
      const float factor = 1 / std::sqrt(mean_square(from, width, centre) + epsilon);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = (from[i] - centre) * factor * (1 + by[i]) + add[i];
    }
  });
  return 0;
}

// norm(x) over the last axis of x (..., D), epsilon a scalar.
INFER_TYPE(layer_norm)
INFER_SHAPE(layer_norm) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(layer_norm) {
  const float *x = TENSOR(0);
  const float epsilon = *TENSOR(1);
  float *y = OUTPUT;
  const int64_t width = shapes[0][ranks[0] - 1], rows = product(shapes[0], 0, ranks[0] - 1);
  in_pieces(rows, rows * width, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *from = x + row * width;
      float *to = y + row * width;
      const float centre = mean(from, width);
      const float factor = 1 / std::sqrt(mean_square(from, width, centre) + epsilon);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = (from[i] - centre) * factor;
    }
  });
  return 0;
}

// norm(x) weight + bias over the channels of a group together: x (B, C, ...), weight and bias (C), the number of groups
// and epsilon scalars.
INFER_TYPE(group_norm)
INFER_SHAPE(group_norm) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(group_norm) {
  const float *x = TENSOR(0), *weight = TENSOR(1), *bias = TENSOR(2);
  const float epsilon = *TENSOR(4);
  float *y = OUTPUT;
  const int64_t groups = static_cast<int64_t>(*TENSOR(3)), channels = shapes[0][1] / groups;
  const int64_t pixels = product(shapes[0], 2, ranks[0]), size = channels * pixels, all = shapes[0][0] * groups;
  in_pieces(all, all * size, [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const float *from = x + group * size;
      const float centre = mean(from, size);
      const float factor = 1 / std::sqrt(mean_square(from, size, centre) + epsilon);
      for (int64_t channel = 0; channel < channels; ++channel) {
        const int64_t index = group % groups * channels + channel, start = channel * pixels;
        const float by = factor * weight[index], add = bias[index];
        float *to = y + group * size + start;
#pragma omp simd
        for (int64_t i = 0; i < pixels; ++i) to[i] = (from[start + i] - centre) * by + add;
      }
    }
  });
  return 0;
}

// x + gate y: x and y (B, L, D), gate (B, D).
INFER_TYPE(gated_add)
INFER_SHAPE(gated_add) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(gated_add) {
  const float *x = TENSOR(0), *gate = TENSOR(1), *y = TENSOR(2);
  float *z = OUTPUT;
  const int64_t length = shapes[0][1], width = shapes[0][2], rows = shapes[0][0] * length;
  in_pieces(rows, rows * width, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *by = gate + row / length * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) z[row * width + i] = x[row * width + i] + by[i] * y[row * width + i];
    }
  });
  return 0;
}

// A single block's attention: queries, keys and values (B, L, heads * d), the RMSNorms' weights of queries and keys (d),
// cosine and sine (L, d), epsilon a scalar.
INFER_TYPE(attention)
INFER_SHAPE(attention) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(attention) {
  const Stream whole{TENSOR(0), TENSOR(1), TENSOR(2), TENSOR(3), TENSOR(4), shapes[0][1]};
  attend_all(&whole, 1, shapes[0], TENSOR(5), TENSOR(6), *TENSOR(7), shapes[3][0], OUTPUT);
  return 0;
}

// A double block's: the text's queries, keys, values and weights, then the image's, as above; the text's rows first.
INFER_TYPE(joint_attention)
INFER_SHAPE(joint_attention) { return {shapes[0][0], shapes[0][1] + shapes[5][1], shapes[0][2]}; }
KERNEL(joint_attention) {
  const Stream streams[] = {{TENSOR(0), TENSOR(1), TENSOR(2), TENSOR(3), TENSOR(4), shapes[0][1]},
                            {TENSOR(5), TENSOR(6), TENSOR(7), TENSOR(8), TENSOR(9), shapes[5][1]}};
  attend_all(streams, 2, shapes[5], TENSOR(10), TENSOR(11), *TENSOR(12), shapes[3][0], OUTPUT);
  return 0;
}
