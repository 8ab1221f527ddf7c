// kernels.cc for a program that has no MindSpore: what each of its kernels names, infers and does. Included behind it.

template <typename Work>
const char *refusal(const Work &work) {
  static std::string said;
  try {
    work();
    return nullptr;
  } catch (const std::invalid_argument &error) {
    said = error.what();
    return said.c_str();
  }
}

// A shape as its rank and its sizes, and a -1 behind the last one.
void write(const std::vector<int64_t> &shape, int64_t **to) {
  *(*to)++ = shape.size();
  *to = std::copy(shape.begin(), shape.end(), *to);
  **to = -1;
}

void write(const std::vector<std::vector<int64_t>> &shapes, int64_t **to) {
  for (const auto &shape : shapes) write(shape, to);
}

// Null, or why the kernel refuses what it is given.
#define CALLED(name)                                                                                           \
  extern "C" const char *name##_named() { return name##_sizes; }                                               \
  extern "C" const char *name##_shapes(int *ranks, int64_t **shapes, int64_t *to) {                            \
    return refusal([&] { write(name##InferShape(ranks, shapes, nullptr), &to); });                             \
  }                                                                                                            \
  extern "C" const char *name##_called(int count, void **tensors, int *ranks, int64_t **shapes) {              \
    return refusal([&] { name(count, tensors, ranks, shapes, nullptr, nullptr, nullptr); });                   \
  }
