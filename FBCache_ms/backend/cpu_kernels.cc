// Operators of Flux that MindSpore's CPU backend has as chains of small kernels only, each in one pass, in float32.
//
// The interface is that of MindSpore's ahead-of-time Custom operators: the inputs, then the output; beside each kernel
// the shape and type of its output. Shapes are the caller's to check.

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

int64_t product(const int64_t *shape, int first, int last) {
  int64_t result = 1;
  for (int axis = first; axis < last; ++axis) result *= shape[axis];
  return result;
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

// RMSNorm of each head times a scale, turned by the rotary table, heads first: x (B, L, H, d), weight (d), cosine and
// sine (L, d), epsilon and scale scalars; y (B, H, L, d).
INFER_TYPE(rms_norm_rotate)
INFER_SHAPE(rms_norm_rotate) { return {shapes[0][0], shapes[0][2], shapes[0][1], shapes[0][3]}; }
KERNEL(rms_norm_rotate) {
  const float *x = TENSOR(0), *weight = TENSOR(1), *cosine = TENSOR(2), *sine = TENSOR(3);
  const float epsilon = *TENSOR(4), scale = *TENSOR(5);
  float *y = OUTPUT;
  const int64_t length = shapes[0][1], heads = shapes[0][2], width = shapes[0][3], rows = shapes[0][0] * length;
  in_pieces(rows, rows * heads * width, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / length, token = row % length;
      const float *c = cosine + token * width, *s = sine + token * width;
      for (int64_t head = 0; head < heads; ++head) {
        const float *from = x + (row * heads + head) * width;
        float *to = y + ((sample * heads + head) * length + token) * width;
        const float factor = scale / std::sqrt(mean_square(from, width, 0) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < width; i += 2) {
          const float even = from[i] * factor * weight[i], odd = from[i + 1] * factor * weight[i + 1];
          to[i] = even * c[i] - odd * s[i];
          to[i + 1] = odd * c[i + 1] + even * s[i + 1];
        }
      }
    }
  });
  return 0;
}
