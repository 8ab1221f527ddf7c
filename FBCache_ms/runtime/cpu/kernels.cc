// Operators of Flux that MindSpore's CPU backend has as chains of small kernels only, each in one pass, in float32.
//
// The interface is that of MindSpore's ahead-of-time Custom operators: the inputs, then the outputs; beside each kernel
// the shapes and types of these. A graph with inputs that do not fit is refused where it is compiled, and where it runs.

#include <dlfcn.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

// Fewer elements than this are done before another thread has taken them.
constexpr int64_t kWorthAThread = 1 << 14;

// The last bits of a whole number, of any bits where it is none: to convert what is no number is undefined.
inline uint32_t last_bits(double whole) {
  whole += 0x1.8p52;
  uint64_t bits;
  std::memcpy(&bits, &whole, sizeof(bits));
  return bits;
}

inline uint32_t last_bits(float whole) {
  whole += 0x1.8p23f;
  uint32_t bits;
  std::memcpy(&bits, &whole, sizeof(bits));
  return bits;
}

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
  const uint32_t bits = (last_bits(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return sum * power;
}

// Sine and cosine of x in [0, 1e6] to 1e-7: of what x is over a multiple of pi / 2, by their Taylor polynomials.
inline void sine_and_cosine(float x, float *sine, float *cosine) {
  const double turns = std::nearbyint(x * 0.63661977236758134);
  const float r = x - turns * 1.5707963267948966, square = r * r;
  const float odd = r + r * square * (-1.0f / 6 + square * (1.0f / 120 + square * (-1.0f / 5040 + square / 362880)));
  const float even =
      1 + square * (-0.5f + square * (1.0f / 24 + square * (-1.0f / 720 + square * (1.0f / 40320 - square / 3628800))));
  const uint32_t quarter = last_bits(turns);
  const float s = quarter & 1 ? even : odd, c = quarter & 1 ? odd : even;
  *sine = quarter & 2 ? -s : s;
  *cosine = (quarter + 1) & 2 ? -c : c;
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

// Threads, one for each further processor, that take pieces of work as far as they get to run. OpenMP's would all have to
// run before the work is done, and wait for the scheduler where MindSpore's threads hold the processors.
class Helpers {
 public:
  Helpers() {
    try {
      for (int64_t i = 1; i < threads(); ++i) std::thread(&Helpers::help, this).detach();
    } catch (const std::system_error &) {  // As many as the process may have.
    }
  }

  // Never deleted: a thread that ends with the process may still look at it.
  static Helpers &all() {
    static Helpers &helpers = *new Helpers;
    return helpers;
  }

  // One for each processor that the process may run on.
  static int64_t threads() {
    static const int64_t count = [] {
      cpu_set_t processors;
      return sched_getaffinity(getpid(), sizeof(processors), &processors) == 0 ? CPU_COUNT(&processors) : 1;
    }();
    return count;
  }

  // Calls work(piece) for each in [0, pieces), which is less than 2^20.
  void run(int64_t pieces, const std::function<void(int64_t)> &work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {  // They help another kernel.
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
      return;
    }
    work_ = &work;
    done_ = 0;
    tickets_ = static_cast<uint64_t>(pieces) << kBits;
    if (sleeping_ > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    while (take()) continue;
    for (int waited = 0; done_ < pieces; ++waited) pause(waited);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // A helper looks for work so many times, for about a tenth of a millisecond, before it sleeps.
  static constexpr int kBits = 20, kPatience = 2000;

  // Does a piece that is left; false where none is. Tickets are the number of pieces and of those that are taken.
  bool take() {
    uint64_t tickets = tickets_;
    while (true) {
      const int64_t pieces = tickets >> kBits, piece = tickets & ((1 << kBits) - 1);
      if (piece >= pieces) return false;
      if (tickets_.compare_exchange_weak(tickets, tickets + 1)) {
        // What is taken is not done, so this is still the work that the ticket was for.
        try {
          (*work_)(piece);
        } catch (...) {
          std::lock_guard<std::mutex> lock(sleep_);
          failure_ = std::current_exception();
        }
        ++done_;
        return true;
      }
    }
  }

  void help() {
    for (int waited = 0;; pause(++waited)) {
      if (take()) waited = 0;
      if (waited < kPatience) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      ++sleeping_;
      wake_.wait(lock, [this] { return (tickets_ >> kBits) > (tickets_ & ((1 << kBits) - 1)); });
      --sleeping_;
      waited = 0;
    }
  }

  static void pause(int waited) {
    if (waited % 16 == 15) {
      sched_yield();
    } else {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  std::atomic<uint64_t> tickets_{0};
  std::atomic<int64_t> done_{0};
  const std::function<void(int64_t)> *work_ = nullptr;
  std::exception_ptr failure_;
};

// Calls work(begin, end) for pieces of [0, size), of whole units: one, or up to one a thread where there are many
// elements.
template <typename Work>
void in_pieces(int64_t size, int64_t elements, const Work &work, int64_t unit = 1) {
  const int64_t units = (size + unit - 1) / unit;
  const int64_t pieces = std::min({units, Helpers::threads(), elements / kWorthAThread});
  if (pieces < 2) {
    work(0, size);
    return;
  }
  Helpers::all().run(pieces, [&](int64_t piece) {
    work(units * piece / pieces * unit, std::min(units * (piece + 1) / pieces * unit, size));
  });
}

// c = a b + beta c of oneDNN in this thread alone, all of them by rows; without a thread pool it starts no thread.
using Products = int (*)(char transpose_a, char transpose_b, int64_t rows, int64_t columns, int64_t depth, float alpha,
                         const float *a, int64_t a_row, const float *b, int64_t b_row, float beta, float *c,
                         int64_t c_row, void *thread_pool);

// MindSpore brings oneDNN along, and cpu_kernels.py has loaded it; null where it has not.
Products products() {
  for (const char *name : {"libdnnl.so.2", "libdnnl.so.3"}) {
    void *library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library) return reinterpret_cast<Products>(dlsym(library, "dnnl_threadpool_interop_sgemm"));
  }
  return nullptr;
}

const Products multiply = products();

int64_t product(const int64_t *shape, int first, int last) {
  int64_t result = 1;
  for (int axis = first; axis < last; ++axis) result *= shape[axis];
  return result;
}

// The sizes of a kernel's inputs as it names them: "B S D, T+S d, 6D D, ... K, 1". A letter is one size wherever it
// stands, dots are the same axes, and 1 by itself is one element of any number of axes.
class Sizes {
 public:
  Sizes(const int *ranks, const int64_t *const *shapes) : ranks_(ranks), shapes_(shapes) {
    std::fill(std::begin(letters_), std::end(letters_), -1);
  }

  // Throws unless the inputs have the sizes that are named.
  void check(const char *kernel, const char *named) {
    for (int index = 0; *named; ++index) {
      const std::string input(named, std::strcspn(named, ","));
      const int64_t *shape = shapes_[index];
      // Not known yet: it is checked where it runs.
      if (std::any_of(shape, shape + ranks_[index], [](int64_t size) { return size < 0; })) return;
      if (!fit(input.c_str(), shape, ranks_[index])) throw std::invalid_argument(error(kernel, index, input));
      named += input.size();
      named += std::strspn(named, ", ");
    }
  }

 private:
  bool fit(const char *named, const int64_t *shape, int rank) {
    if (std::strcmp(named, "1") == 0) return product(shape, 0, rank) == 1;
    const int others = std::count(named, named + std::strlen(named), ' ');
    for (int axis = 0;; ++named) {
      if (*named == '.') {
        const std::vector<int64_t> dots(shape + axis, shape + std::max(axis, axis + rank - others));
        if (rank < others || (has_dots_ && dots != dots_)) return false;
        dots_ = dots;
        has_dots_ = true;
        axis += dots.size();
        named += 3;
      } else if (axis == rank || !is_sum(&named, shape[axis++])) {
        return false;
      }
      if (!*named) return axis == rank;
    }
  }

  // Whether a size is what is named; a letter that stands there for the first time is what fits from then on.
  bool is_sum(const char **named, int64_t size) {
    for (int64_t sum = 0;; ++*named) {
      char *at = const_cast<char *>(*named);
      int64_t term = std::isdigit(*at) ? std::strtol(at, &at, 10) : 1;
      if (std::isalpha(*at)) {
        int64_t &letter = letters_[static_cast<int>(*at++)];
        if (letter < 0 && term > 0) letter = (size - sum) / term;
        term *= letter;
      }
      sum += term;
      *named = at;
      if (*at != '+') return sum == size;
    }
  }

  std::string error(const char *kernel, int index, const std::string &named) const {
    std::ostringstream text;
    text << kernel << ": input " << index << " is (";
    for (int axis = 0; axis < ranks_[index]; ++axis) text << (axis ? ", " : "") << shapes_[index][axis];
    text << "), not (" << named << ")";
    for (int letter = 0; letter < 128; ++letter) {
      if (letters_[letter] >= 0) text << ", " << static_cast<char>(letter) << " = " << letters_[letter];
    }
    return text.str();
  }

  const int *ranks_;
  const int64_t *const *shapes_;
  int64_t letters_[128];
  std::vector<int64_t> dots_;
  bool has_dots_ = false;
};

int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// A register of the processor, and a tile of a product, as large as all of them hold. Vectors longer than a register are
// kept in memory by GCC, which takes several times as long.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kRows = 6;
#else
constexpr int64_t kLanes = 4, kRows = 6;
#endif
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
constexpr int64_t kWide = 2;
constexpr int64_t kColumns = kWide * kLanes;

// c = a b, or c += a b, for kRows rows of a, (kRows, depth), and c, each with its row length, and b, (depth, kColumns).
inline void multiply_tile(const float *a, int64_t a_row, const float *b, int64_t depth, bool adds, float *c,
                          int64_t c_row) {
  const auto at = [=](int64_t row, int64_t wide) { return reinterpret_cast<Lanes *>(c + row * c_row + wide * kLanes); };
  Lanes sums[kRows][kWide];
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t wide = 0; wide < kWide; ++wide) sums[row][wide] = adds ? *at(row, wide) : Lanes{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes right[kWide];
    for (int64_t wide = 0; wide < kWide; ++wide) {
      right[wide] = *reinterpret_cast<const Lanes *>(b + k * kColumns + wide * kLanes);
    }
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
      const float left = a[row * a_row + k];
      for (int64_t wide = 0; wide < kWide; ++wide) sums[row][wide] += left * right[wide];
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t wide = 0; wide < kWide; ++wide) *at(row, wide) = sums[row][wide];
  }
}

// bfloat16 is a float's upper half. A word is two of a row, or one as a float; a register holds so many words.
using Words = uint32_t __attribute__((vector_size(sizeof(Lanes)), aligned(2), may_alias));

// The nearest bfloat16, ties to even; what is no number stays none.
inline uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}

// sum + the two products of each of a's words with b's.
inline Lanes add_pairs(Lanes sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + (Lanes)(a << 16) * (Lanes)(b << 16) + (Lanes)(a & 0xffff0000) * (Lanes)(b & 0xffff0000);
#endif
}

// Turns kLanes rows of kLanes words over, by as many shuffles of two rows as they have bits.
inline void transpose(Words *rows) {
  Words low, high, turned[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int64_t done = 1; done < kLanes; done *= 2) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      turned[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
    std::copy_n(turned, kLanes, rows);
  }
}

// sums (kRows, kColumns) = kRows columns' words by those of Wide * kLanes rows: kLanes rows' first words, their second and
// so on, and the next rows' so many ``group`` words on. A word is so many Halves.
template <int64_t Halves, int64_t Wide>
inline void multiply_words(const uint16_t *const *columns, const uint32_t *rows, int64_t group, int64_t words,
                           float *sums) {
  Lanes tile[kRows][Wide] = {};
  for (int64_t k = 0; k < words; ++k) {
    Words right[Wide];
    for (int64_t wide = 0; wide < Wide; ++wide) {
      right[wide] = *reinterpret_cast<const Words *>(rows + wide * group + k * kLanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i) {
      uint32_t word;
      std::memcpy(&word, columns[i] + 2 * k, sizeof(word));
      const Words left = Words{} + word;
      for (int64_t wide = 0; wide < Wide; ++wide) {
        Lanes &sum = tile[i][wide];
        sum = Halves == 2 ? add_pairs(sum, left, right[wide]) : sum + (Lanes)left * (Lanes)right[wide];
      }
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t wide = 0; wide < Wide; ++wide) {
      *reinterpret_cast<Lanes *>(sums + i * kColumns + wide * kLanes) = tile[i][wide];
    }
  }
}

// The sum of the products of two rows of bfloat16 of this length.
inline float dot(const uint16_t *a, const uint16_t *b, int64_t length) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    sums = add_pairs(sums, *reinterpret_cast<const Words *>(a + i), *reinterpret_cast<const Words *>(b + i));
  }
  Words ends[2] = {};
  std::memcpy(&ends[0], a + i, (length - i) * sizeof(*a));
  std::memcpy(&ends[1], b + i, (length - i) * sizeof(*b));
  sums = add_pairs(sums, ends[0], ends[1]);
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// Whether the processor has an instruction for pairs of bfloat16 that is worth it: AMD's multiply twice as many in a cycle
// as they do floats, Intel's half as many.
#ifndef FAST_PAIRS
#ifdef __AVX512BF16__
#define FAST_PAIRS __builtin_cpu_is("amd")
#else
#define FAST_PAIRS false
#endif
#endif

// y += x w^T, x (rows, depth) rounded to bfloat16, w (columns, depth) of it, summed in float; rows lie x_row and y_row
// apart. A register holds words of so many rows of x, which are turned over: there are fewer of them than of w's.
template <int64_t Halves>
class Bfloat16Product {
 public:
  Bfloat16Product(const float *x, int64_t x_row, int64_t rows, const uint16_t *w, int64_t columns, int64_t depth,
                  float *y, int64_t y_row)
      : x_(x), x_row_(x_row), rows_(rows), w_(w), columns_(columns), depth_(depth), y_(y), y_row_(y_row) {}

  void add() {
    if (rows_ < kRows) return add_row_by_row();
    turned_.resize(rounded_up(rows_, kLanes) * kWords);
    for (int64_t first = 0; first < depth_; first += Halves * kWords) {
      const int64_t deep = std::min(Halves * kWords, depth_ - first);
      for (int64_t row = 0; row < rows_; row += kLanes) turn(row, first, deep);
      for (int64_t column = 0; column < columns_; column += kBlock) add_columns(column, first, deep);
    }
  }

 private:
  // So many words of a row, and so many columns, at a time stay in the cache.
  static constexpr int64_t kWords = 512, kBlock = kRows * kLanes / 2, kGroup = kWords * kLanes;

  // For fewer rows than a tile has.
  void add_row_by_row() {
    std::vector<uint16_t> halves(depth_);
    for (int64_t row = 0; row < rows_; ++row) {
#pragma omp simd
      for (int64_t i = 0; i < depth_; ++i) halves[i] = bfloat16(x_[row * x_row_ + i]);
      for (int64_t column = 0; column < columns_; ++column) {
        y_[row * y_row_ + column] += dot(halves.data(), w_ + column * depth_, depth_);
      }
    }
  }

  // kLanes rows' words of a piece of the depth, word by word; zeros behind it and below the last row.
  void turn(int64_t row, int64_t first, int64_t deep) {
    for (int64_t at = 0; at < deep; at += Halves * kLanes) {
      Words block[kLanes] = {};
      for (int64_t i = 0; i < std::min(kLanes, rows_ - row); ++i) {
        const float *from = x_ + (row + i) * x_row_ + first + at;
        uint16_t halves[Halves * kLanes] = {};
#pragma omp simd
        for (int64_t j = 0; j < std::min(Halves * kLanes, deep - at); ++j) halves[j] = bfloat16(from[j]);
        to_words(halves, Halves * kLanes, reinterpret_cast<uint32_t *>(&block[i]));
      }
      transpose(block);
      std::memcpy(&turned_[row * kWords + at / Halves * kLanes], block, sizeof(block));
    }
  }

  static void to_words(const uint16_t *halves, int64_t size, uint32_t *words) {
    if (Halves == 2) {
      std::memcpy(words, halves, size * sizeof(*halves));
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) words[i] = static_cast<uint32_t>(halves[i]) << 16;
  }

  // A block of columns by all rows, over a piece of the depth.
  void add_columns(int64_t column, int64_t first, int64_t deep) {
    const int64_t count = std::min(kBlock, columns_ - column);
    const uint16_t *columns[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      columns[i] = w_ + (column + std::min(i, count - 1)) * depth_ + first;
      // They are words as they lie, where the last one is whole.
      if (Halves == 2 && deep % 2 == 0) continue;
      copied_.resize(kBlock * kWords);
      to_words(columns[i], deep, &copied_[i * kWords]);
      columns[i] = reinterpret_cast<const uint16_t *>(&copied_[i * kWords]);
    }
    float sums[kBlock * kColumns];
    for (int64_t row = 0; row < rows_; row += kColumns) {
      const int64_t tall = std::min(kColumns, rows_ - row);
      const auto multiply = tall > kLanes ? multiply_words<Halves, kWide> : multiply_words<Halves, 1>;
      for (int64_t i = 0; i < count; i += kRows) {
        multiply(columns + i, &turned_[row * kWords], kGroup, (deep + Halves - 1) / Halves, sums + i * kColumns);
      }
      for (int64_t i = 0; i < tall; i += kLanes) {
        for (int64_t j = 0; j < count; j += kLanes) {
          add_turned(sums + j * kColumns + i, std::min(kLanes, tall - i), std::min(kLanes, count - j),
                     y_ + (row + i) * y_row_ + column + j);
        }
      }
    }
  }

  // y (rows, columns) += sums (columns, rows), no more than kLanes of either.
  void add_turned(const float *sums, int64_t rows, int64_t columns, float *y) {
    Words block[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(&block[i], sums + i * kColumns, sizeof(block[i]));
    transpose(block);
    for (int64_t i = 0; i < rows; ++i, y += y_row_) {
      const Lanes row = (Lanes)block[i];
      for (int64_t j = 0; j < columns; ++j) y[j] += row[j];
    }
  }

  const float *x_;
  int64_t x_row_, rows_;
  const uint16_t *w_;
  int64_t columns_, depth_;
  float *y_;
  int64_t y_row_;
  std::vector<uint32_t> turned_, copied_;
};

void add_bfloat16_product(const float *x, int64_t x_row, int64_t rows, const uint16_t *w, int64_t columns,
                          int64_t depth, float *y, int64_t y_row) {
  static const bool pairs = FAST_PAIRS;
  if (pairs) return Bfloat16Product<2>(x, x_row, rows, w, columns, depth, y, y_row).add();
  Bfloat16Product<1>(x, x_row, rows, w, columns, depth, y, y_row).add();
}

// One stream's queries, keys and values (B, length, heads * width), the weights (width) of its RMSNorms, and where what
// its tokens attend to goes: like the queries, but with rows that may be longer.
struct Stream {
  const float *query, *key, *value, *query_weight, *key_weight;
  int64_t length;
  float *output;
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

// Softmax of a row that comes piece by piece: the greatest so far, and the sum of e^(x - that).
struct Softmax {
  float most = std::numeric_limits<float>::lowest(), sum = 0;

  // Makes e^(x - most) of a piece, in memory of whole Lanes, and returns the factor for what came of earlier pieces.
  float add(float *x, int64_t size) {
    std::fill(x + size, x + rounded_up(size, kLanes), std::numeric_limits<float>::lowest());
    Lanes each = Lanes{} + most;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes here = *reinterpret_cast<const Lanes *>(x + i);
      each = here > each ? here : each;
    }
    float greatest = most, pieces = 0;
    for (int64_t i = 0; i < kLanes; ++i) greatest = std::max(greatest, each[i]);
#pragma omp simd reduction(+ : pieces)
    for (int64_t i = 0; i < size; ++i) {
      x[i] = exponential(x[i] - greatest);
      pieces += x[i];
    }
    const float factor = exponential(most - greatest);
    most = greatest;
    sum = sum * factor + pieces;
    return factor;
  }
};

// Attention of one head after the other, of pieces of the queries to pieces of the keys: what is made of these stays in
// the processor's cache, whatever the length.
class Head {
 public:
  Head(int64_t length, int64_t width)
      : length_(length),
        width_(width),
        wide_(rounded_up(width, kColumns)),
        queries_(rounded_up(length, kRows) * width),
        keys_(rounded_up(length, kColumns) * width),
        values_(length * wide_),
        scores_(kQueries * kKeys),
        attended_(kQueries * wide_) {}

  // The streams' tokens are one after the other; every pointer is at the head's first element, rows are ``row`` apart,
  // those of the outputs ``output_row``.
  void attend(const std::vector<Stream> &streams, const float *cosine, const float *sine, float epsilon, int64_t row,
              int64_t output_row) {
    std::vector<float *> outputs;
    const float scale = 1 / std::sqrt(static_cast<float>(width_));
    for (const Stream &stream : streams) {
      for (int64_t t = 0; t < stream.length; ++t) {
        const int64_t token = outputs.size();
        const float *c = cosine + token * width_, *s = sine + token * width_, *value = stream.value + t * row;
        norm_rotate(stream.query + t * row, stream.query_weight, c, s, epsilon, scale, width_,
                    &queries_[token * width_], 1);
        // Keys as multiply_tile takes them, and so the values.
        float *key = &keys_[token / kColumns * kColumns * width_ + token % kColumns];
        norm_rotate(stream.key + t * row, stream.key_weight, c, s, epsilon, 1, width_, key, kColumns);
        for (int64_t i = 0; i < width_; i += kColumns) {
          std::copy_n(value + i, std::min(kColumns, width_ - i), &values_[i * length_ + token * kColumns]);
        }
        outputs.push_back(stream.output + t * output_row);
      }
    }
    for (int64_t first = 0; first < length_; first += kQueries) {
      attend(first, std::min(kQueries, length_ - first), &outputs[first]);
    }
  }

 private:
  static constexpr int64_t kQueries = 8 * kRows, kKeys = 256;

  // So many queries from the first on.
  void attend(int64_t first, int64_t queries, float *const *outputs) {
    Softmax softmaxes[kQueries];
    for (int64_t key = 0; key < length_; key += kKeys) {
      const int64_t keys = std::min(kKeys, length_ - key);
      for (int64_t column = 0; column < keys; column += kColumns) {
        for (int64_t i = 0; i < queries; i += kRows) {
          multiply_tile(&queries_[(first + i) * width_], width_, &keys_[(key + column) * width_], width_, false,
                        &scores_[i * kKeys + column], kKeys);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const float factor = softmaxes[i].add(&scores_[i * kKeys], keys);
        for (int64_t j = 0; key > 0 && j < wide_; ++j) attended_[i * wide_ + j] *= factor;
      }
      for (int64_t column = 0; column < wide_; column += kColumns) {
        for (int64_t i = 0; i < queries; i += kRows) {
          multiply_tile(&scores_[i * kKeys], kKeys, &values_[column * length_ + key * kColumns], keys, key > 0,
                        &attended_[i * wide_ + column], wide_);
        }
      }
    }
    for (int64_t i = 0; i < queries; ++i) {
      const float factor = 1 / softmaxes[i].sum;
      for (int64_t j = 0; j < width_; ++j) outputs[i][j] = attended_[i * wide_ + j] * factor;
    }
  }

  int64_t length_, width_, wide_;
  std::vector<float> queries_, keys_, values_, scores_, attended_;
};

// The rotary table of a block, cosine and sine (L, width), and the epsilon of its RMSNorms.
struct Rotary {
  const float *cosine, *sine;
  float epsilon;
  int64_t width;
};

// Attention of all samples' heads; ``row`` is heads * width.
void attend_all(const std::vector<Stream> &streams, int64_t batch, int64_t row, int64_t output_row,
                const Rotary &rotary) {
  if (rotary.width < 1 || rotary.width % 2 || row % rotary.width) {
    throw std::invalid_argument("attention: heads of width " + std::to_string(rotary.width) + " for a width of " +
                                std::to_string(row));
  }
  const int64_t heads = row / rotary.width;
  int64_t length = 0;
  for (const Stream &stream : streams) length += stream.length;
  // A pair of tokens takes about as long as kLanes elements do elsewhere for every kLanes of the width.
  const int64_t elements = batch * length * length * row / kLanes;
  in_pieces(batch * heads, elements, [&](int64_t begin, int64_t end) {
    Head head(length, rotary.width);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t sample = pair / heads, offset = pair % heads * rotary.width;
      std::vector<Stream> here(streams);
      for (Stream &stream : here) {
        const int64_t start = sample * stream.length * row + offset;
        stream.query += start;
        stream.key += start;
        stream.value += start;
        stream.output += sample * stream.length * output_row + offset;
      }
      head.attend(here, rotary.cosine, rotary.sine, rotary.epsilon, row, output_row);
    }
  });
}

// So many rows of int8 weights are made floats at a time: they stay in the cache.
constexpr int64_t kDenseRows = 64;

// So many products of two levels are summed exactly in float.
constexpr int64_t kExact = 1024;

// A linear layer: weight (columns, depth), bias (columns). Where the weight is null, there is one of bfloat16, or levels
// of its shape and a scale (columns). Where it rounds, each row of x is made levels and a scale too.
struct Linear {
  const float *weight, *bias;
  int64_t columns, depth;
  const uint16_t *half = nullptr;
  const int8_t *levels = nullptr;
  const float *scale = nullptr;
  bool rounds = false;

  // x w^T + b of so many rows; theirs lie x_row and y_row apart.
  void operator()(const float *x, int64_t x_row, int64_t rows, float *y, int64_t y_row) const {
    for (int64_t row = 0; row < rows; ++row) std::copy_n(bias, columns, y + row * y_row);
    // oneDNN takes none without rows.
    if (rows == 0) return;
    if (half) return add_bfloat16_product(x, x_row, rows, half, columns, depth, y, y_row);
    if (!levels) return add_product(x, x_row, rows, weight, columns, y, y_row);
    std::vector<float> dense(std::min(columns, kDenseRows) * depth), rounded, steps;
    if (rounds) round_rows(x, x_row, rows, &rounded, &steps);
    for (int64_t begin = 0; begin < columns; begin += kDenseRows) {
      const int64_t count = std::min(columns - begin, kDenseRows);
      for (int64_t column = begin; column < begin + count; ++column) {
        const int8_t *level = levels + column * depth;
        const float by = rounds ? 1 : scale[column];
        float *to = dense.data() + (column - begin) * depth;
#pragma omp simd
        for (int64_t i = 0; i < depth; ++i) to[i] = by * level[i];
      }
      if (rounds) {
        add_exact_product(rounded, steps, rows, dense.data(), begin, count, y + begin, y_row);
      } else {
        add_product(x, x_row, rows, dense.data(), count, y + begin, y_row);
      }
    }
  }

  // How many elements take about as long elsewhere as its products.
  int64_t elements(int64_t rows) const { return rows * depth * columns / 32; }

  // The columns [begin, end) alone.
  Linear part(int64_t begin, int64_t end) const {
    const int64_t start = begin * depth;
    Linear found{nullptr, bias + begin, end - begin, depth};
    if (weight) found.weight = weight + start;
    if (half) found.half = half + start;
    if (levels) found.levels = levels + start, found.scale = scale + begin, found.rounds = rounds;
    return found;
  }

 private:
  void add_product(const float *x, int64_t x_row, int64_t rows, const float *w, int64_t w_rows, float *y,
                   int64_t y_row) const {
    multiplied(rows, w_rows, depth, x, x_row, w, 1, y, y_row);
  }

  void multiplied(int64_t rows, int64_t w_rows, int64_t deep, const float *x, int64_t x_row, const float *w, float beta,
                  float *y, int64_t y_row) const {
    if (multiply('N', 'T', rows, w_rows, deep, 1, x, x_row, w, depth, beta, y, y_row, nullptr) != 0) {
      throw std::runtime_error("oneDNN cannot multiply matrices");
    }
  }

  // Each row as levels and the step between them, max|x| / 127.
  void round_rows(const float *x, int64_t x_row, int64_t rows, std::vector<float> *rounded,
                  std::vector<float> *steps) const {
    rounded->resize(rows * depth);
    for (int64_t row = 0; row < rows; ++row, x += x_row) {
      float greatest = 0, *to = rounded->data() + row * depth;
      for (int64_t i = 0; i < depth; ++i) greatest = std::max(greatest, std::abs(x[i]));
      const float step = greatest > 0 ? greatest / 127 : 1;
      for (int64_t i = 0; i < depth; ++i) to[i] = std::nearbyint(x[i] / step);
      steps->push_back(step);
    }
  }

  // Levels by levels, exact until they are scaled.
  void add_exact_product(const std::vector<float> &rounded, const std::vector<float> &steps, int64_t rows,
                         const float *w, int64_t first, int64_t w_rows, float *y, int64_t y_row) const {
    std::vector<float> part(rows * w_rows);
    std::vector<double> sums(rows * w_rows);
    for (int64_t begin = 0; begin < depth; begin += kExact) {
      const int64_t deep = std::min(depth - begin, kExact);
      multiplied(rows, w_rows, deep, rounded.data() + begin, depth, w + begin, 0, part.data(), w_rows);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < w_rows; ++i) {
        y[row * y_row + i] += static_cast<float>(sums[row * w_rows + i]) * steps[row] * scale[first + i];
      }
    }
  }
};

// In place x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU with tanh.
inline void gelu(float *x, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    x[i] = x[i] / (1 + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
  }
}

// In place x / (1 + e^-x).
inline void silu(float *x, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) x[i] = x[i] / (1 + exponential(-x[i]));
}

// A layer of silu(x), for few rows: x (rows, depth).
void of_silu(const Linear &layer, const float *x, int64_t rows, float *y) {
  std::vector<float> activated(x, x + rows * layer.depth);
  silu(activated.data(), rows * layer.depth);
  in_pieces(
      layer.columns, layer.elements(rows),
      [&](int64_t begin, int64_t end) {
        layer.part(begin, end)(activated.data(), layer.depth, rows, y + begin, layer.columns);
      },
      kLanes);
}

// norm(x) (1 + scale) + shift of a row.
inline void modulate(const float *x, int64_t width, const float *scale, const float *shift, float epsilon, float *y) {
  const float centre = mean(x, width);
  const float factor = 1 / std::sqrt(mean_square(x, width, centre) + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - centre) * factor * (1 + scale[i]) + shift[i];
}

// x + gate y, of part of a row.
inline void add_gated(const float *x, const float *gate, const float *y, int64_t size, float *z) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) z[i] = x[i] + gate[i] * y[i];
}

// Memory for what a kernel makes on its way to the output.
class Scratch {
 public:
  float *floats(int64_t size) {
    parts_.emplace_back(new float[size]);
    return parts_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float[]>> parts_;
};

// What matrices are of. With int8 a scale stands between weight and bias, and before all weights whether each layer
// rounds, 1 or 0.
enum class Matrices { kFloat, kBfloat16, kInt8 };

// A kernel's inputs, read one after the other.
struct Inputs {
  void **tensors;
  int64_t **shapes;
  int next;
  Matrices matrices = Matrices::kFloat;
  const float *rounds = nullptr;

  const float *tensor() { return static_cast<const float *>(tensors[next++]); }
  void begin_weights() {
    if (matrices == Matrices::kInt8) rounds = tensor();
  }
  Linear linear() {
    const int64_t *shape = shapes[next];
    const float *weight = tensor();
    Linear found{nullptr, nullptr, shape[0], shape[1]};
    if (matrices == Matrices::kFloat) {
      found.weight = weight;
    } else if (matrices == Matrices::kBfloat16) {
      found.half = reinterpret_cast<const uint16_t *>(weight);
    } else {
      found.levels = reinterpret_cast<const int8_t *>(weight);
      found.scale = tensor();
      found.rounds = *rounds++ > 0;
    }
    found.bias = tensor();
    return found;
  }
};

// Where a kernel's weights lie, one row each: what a kernel can be given in their place, as one input. MindSpore hands a
// branch or a loop each weight that it may read, at every pass, which for many small blocks takes longer than they do.
// It says so as of now: only a kernel of the same graph may be given it, while that graph has the weights too.
struct Place {
  void *tensor;
  int64_t rank, shape[2];
};
constexpr int64_t kPlace = sizeof(Place) / sizeof(float);

std::vector<int64_t> places_shape(const char *named) {
  return {1 + std::count(named, named + std::strlen(named), ','), kPlace};
}

int write_places(int count, void **tensors, const int *ranks, int64_t **shapes) {
  for (int index = 0; index + 1 < count; ++index) {
    Place place{tensors[index], ranks[index], {0, 0}};
    std::copy_n(shapes[index], std::min<int64_t>(place.rank, 2), place.shape);
    std::memcpy(static_cast<float *>(tensors[count - 1]) + index * kPlace, &place, sizeof(place));
  }
  return 0;
}

// A kernel's inputs and outputs with the weights in the place of the two last inputs: a table that says where they lie,
// and the row of it where they begin.
class Placed {
 public:
  // Throws unless there are the places of as many weights as are named.
  Placed(int count, void **tensors, const int *ranks, int64_t **shapes, int places, const char *weights) {
    const int64_t wanted = places_shape(weights)[0], first = *static_cast<const float *>(tensors[places + 1]);
    if (first < 0 || first + wanted > shapes[places][0]) {
      throw std::invalid_argument("weights " + std::to_string(first) + " to " + std::to_string(first + wanted) + " of " +
                                  std::to_string(shapes[places][0]));
    }
    add(places, tensors, ranks, shapes);
    places_.resize(wanted);
    std::memcpy(places_.data(), static_cast<float *>(tensors[places]) + first * kPlace, wanted * sizeof(Place));
    for (Place &place : places_) {
      int64_t *shape = place.shape;
      const int rank = place.rank;
      add(1, &place.tensor, &rank, &shape);
    }
    const int outputs = places + 2;
    add(count - outputs, tensors + outputs, ranks + outputs, shapes + outputs);
  }

  int count() const { return tensors.size(); }

  std::vector<void *> tensors;
  std::vector<int> ranks;
  std::vector<int64_t *> shapes;

 private:
  void add(int count, void **their_tensors, const int *their_ranks, int64_t **their_shapes) {
    tensors.insert(tensors.end(), their_tensors, their_tensors + count);
    ranks.insert(ranks.end(), their_ranks, their_ranks + count);
    shapes.insert(shapes.end(), their_shapes, their_shapes + count);
  }

  std::vector<Place> places_;
};

// What a double block has for one stream up to the attention's output projection, its weights in this order.
struct Attending {
  Linear modulation, query, key, value;
  const float *query_norm, *key_norm;
  Linear out;

  explicit Attending(Inputs *inputs)
      : modulation(inputs->linear()),
        query(inputs->linear()),
        key(inputs->linear()),
        value(inputs->linear()),
        query_norm(inputs->tensor()),
        key_norm(inputs->tensor()),
        out(inputs->linear()) {}
};

// A stream (B, length, width) and what its tokens attend to, with gates and the MLP's modulation, rows of ``step``.
struct Attended {
  const float *x, *attended, *gate, *shift, *scale, *mlp_gate;
  int64_t step, batch, length, width;
};

// What a double block has behind the attention for one stream.
class FeedForward {
 public:
  FeedForward(Inputs *inputs, const Attended &from, float epsilon, float *output, Scratch *scratch)
      : up_(inputs->linear()),
        down_(inputs->linear()),
        from_(from),
        epsilon_(epsilon),
        output_(output),
        normed_(scratch->floats(from.batch * from.length * from.width)),
        hidden_(scratch->floats(from.batch * from.length * up_.columns)) {}

  int64_t elements() const { return 2 * up_.elements(from_.batch * from_.length); }

  // Rows [begin, end) of y = x + gate a, then y + mlp_gate W gelu(V (norm(y) (1 + scale) + shift)).
  void operator()(int64_t begin, int64_t end) const {
    const int64_t width = from_.width, wide = up_.columns;
    float *y = output_ + begin * width, *normed = normed_ + begin * width, *hidden = hidden_ + begin * wide;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = row * width, by = row / from_.length * from_.step;
      add_gated(from_.x + start, from_.gate + by, from_.attended + start, width, output_ + start);
      modulate(output_ + start, width, from_.scale + by, from_.shift + by, epsilon_, normed_ + start);
    }
    up_(normed, width, end - begin, hidden, wide);
    gelu(hidden, (end - begin) * wide);
    down_(hidden, wide, end - begin, normed, width);
    for (int64_t row = begin; row < end; ++row, y += width, normed += width) {
      add_gated(y, from_.mlp_gate + row / from_.length * from_.step, normed, width, y);
    }
  }

 private:
  Linear up_, down_;
  Attended from_;
  float epsilon_, *output_, *normed_, *hidden_;
};

// Calls work(i, begin, end) for pieces of the rows of two streams, i of them, one after the other.
template <typename Work>
void in_pieces_of_both(const int64_t (&rows)[2], int64_t elements, const Work &work) {
  in_pieces(rows[0] + rows[1], elements, [&](int64_t begin, int64_t end) {
    if (begin < rows[0]) work(0, begin, std::min(end, rows[0]));
    if (end > rows[0]) work(1, std::max(begin - rows[0], int64_t{0}), end - rows[0]);
  });
}

}  // namespace

// A kernel named so checks its inputs' sizes, and has no other tensors than it knows of.
#define SIZES(name, named) constexpr char name##_sizes[] = named;
#define CHECK(name) Sizes(ranks, shapes).check(#name, name##_sizes)
#define INFER(name, result)                                                             \
  result name##_shape(const int *ranks, int64_t **shapes);                              \
  extern "C" result name##InferShape(int *ranks, int64_t **shapes, void *extra) {       \
    CHECK(name);                                                                        \
    return name##_shape(ranks, shapes);                                                 \
  }                                                                                     \
  result name##_shape(const int *ranks, int64_t **shapes)
#define INFER_SHAPE(name) INFER(name, std::vector<int64_t>)
#define INFER_SHAPES(name) INFER(name, std::vector<std::vector<int64_t>>)
#define INFER_TYPE(name) \
  extern "C" int name##InferType(std::vector<int> types, void *extra) { return types[0]; }
#define INFER_TYPES(name, outputs) \
  extern "C" std::vector<int> name##InferType(std::vector<int> types, void *extra) { \
    return std::vector<int>(outputs, types[0]); \
  }
#define KERNEL(name)                                                                                             \
  int name##_run(int count, void **tensors, int *ranks, int64_t **shapes);                                       \
  extern "C" int name(int count, void **tensors, int *ranks, int64_t **shapes, const char **types, void *stream, \
                      void *extra) {                                                                             \
    CHECK(name);                                                                                                 \
    return name##_run(count, tensors, ranks, shapes);                                                            \
  }                                                                                                              \
  int name##_run(int count, void **tensors, int *ranks, int64_t **shapes)
#define TENSOR(index) static_cast<const float *>(tensors[index])
#define OUTPUT static_cast<float *>(tensors[count - 1])
#define OUTPUTS(outputs, index) static_cast<float *>(tensors[count - (outputs) + (index)])

// x w^T + b: x (..., K), w (N, K), b (N). MindSpore has two changes of shape, a product and a sum in its place.
SIZES(linear, "... K, N K, N")
SIZES(linear_bfloat16, "... K, N K, N")
INFER_TYPE(linear)
INFER_TYPE(linear_bfloat16)
std::vector<int64_t> linear_output(const int *ranks, int64_t **shapes) {
  std::vector<int64_t> shape(shapes[0], shapes[0] + ranks[0]);
  shape.back() = shapes[1][0];
  return shape;
}
INFER_SHAPE(linear) { return linear_output(ranks, shapes); }
INFER_SHAPE(linear_bfloat16) { return linear_output(ranks, shapes); }
int linear_of(Inputs inputs, int count, const int *ranks) {
  const int64_t rows = product(inputs.shapes[0], 0, ranks[0] - 1);
  const float *x = inputs.tensor();
  const Linear layer = inputs.linear();
  float *y = static_cast<float *>(inputs.tensors[count - 1]);
  in_pieces(rows, layer.elements(rows), [=](int64_t begin, int64_t end) {
    layer(x + begin * layer.depth, layer.depth, end - begin, y + begin * layer.columns, layer.columns);
  });
  return 0;
}
KERNEL(linear) { return linear_of({tensors, shapes, 0}, count, ranks); }
KERNEL(linear_bfloat16) { return linear_of({tensors, shapes, 0, Matrices::kBfloat16}, count, ranks); }

// GELU with tanh, x of any shape.
SIZES(gelu_tanh, "...")
INFER_TYPE(gelu_tanh)
INFER_SHAPE(gelu_tanh) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(gelu_tanh) {
  const float *x = TENSOR(0);
  float *y = OUTPUT;
  const int64_t size = product(shapes[0], 0, ranks[0]);
  in_pieces(size, size, [=](int64_t begin, int64_t end) {
    std::copy(x + begin, x + end, y + begin);
    gelu(y + begin, end - begin);
  });
  return 0;
}

// norm(x) over the last axis of x (..., D), epsilon a scalar.
SIZES(layer_norm, "... D, 1")
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
SIZES(group_norm, "B C ..., C, C, 1, 1")
INFER_TYPE(group_norm)
INFER_SHAPE(group_norm) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(group_norm) {
  const float *x = TENSOR(0), *weight = TENSOR(1), *bias = TENSOR(2);
  const float epsilon = *TENSOR(4);
  float *y = OUTPUT;
  const int64_t groups = static_cast<int64_t>(*TENSOR(3)), all_channels = shapes[0][1];
  if (groups < 1 || all_channels % groups) {
    throw std::invalid_argument("group_norm: " + std::to_string(groups) + " groups of " + std::to_string(all_channels) +
                                " channels");
  }
  const int64_t channels = all_channels / groups;
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

// norm(x) (1 + scale) + shift over the last axis of x (B, L, D), scale and shift from a linear layer of silu(c), c (B, E):
// x, c, the layer, epsilon.
SIZES(ada_layer_norm, "B L D, B E, 2D E, 2D, 1")
INFER_TYPE(ada_layer_norm)
INFER_SHAPE(ada_layer_norm) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(ada_layer_norm) {
  Inputs inputs{tensors, shapes, 0};
  const float *x = inputs.tensor(), *condition = inputs.tensor();
  const Linear layer = inputs.linear();
  const float epsilon = *inputs.tensor();
  const int64_t batch = shapes[0][0], length = shapes[0][1], width = shapes[0][2], step = layer.columns;
  Scratch scratch;
  float *scales = scratch.floats(batch * step), *y = OUTPUT;
  of_silu(layer, condition, batch, scales);
  in_pieces(batch * length, batch * length * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *scale = scales + row / length * step;
      modulate(x + row * width, width, scale, scale + width, epsilon, y + row * width);
    }
  });
  return 0;
}

// w silu(v x + a) + b of x (B, K): x and the two layers.
SIZES(timestep_embedding, "B K, H K, H, E H, E")
INFER_TYPE(timestep_embedding)
INFER_SHAPE(timestep_embedding) { return {shapes[0][0], shapes[3][0]}; }
KERNEL(timestep_embedding) {
  Inputs inputs{tensors, shapes, 0};
  const float *x = inputs.tensor();
  const Linear first = inputs.linear(), second = inputs.linear();
  const int64_t batch = shapes[0][0];
  Scratch scratch;
  float *hidden = scratch.floats(batch * first.columns), *y = OUTPUT;
  first(x, first.depth, batch, hidden, first.columns);
  of_silu(second, hidden, batch, y);
  return 0;
}

#define ATTENDING "6D D, 6D, D D, D, D D, D, D D, D, d, d, D D, D"
#define FEED_FORWARD "W D, W, D W, D"
#define ATTENDING_INT8 "6D D, 6D, 6D, D D, D, D, D D, D, D, D D, D, D, d, d, D D, D, D"
#define FEED_FORWARD_INT8 "W D, W, W, D W, D, D"

// A block's kernels of one kind of matrices: with the weights behind the streams, with their places there, and what
// says these.
#define INFER_ONE(name, outputs) INFER_TYPE(name) INFER_SHAPE(name)
#define INFER_MANY(name, outputs) INFER_TYPES(name, outputs) INFER_SHAPES(name)
#define BLOCK_KERNELS_OF(name, block, of, many, outputs, streams, weights)            \
  SIZES(name, streams ", " weights)                                                   \
  INFER_##many(name, outputs) { return block##_outputs(shapes); }                     \
  KERNEL(name) { return block##_of({tensors, shapes, 0, of}, count); }                \
  SIZES(name##_placed, streams ", N 8, 1")                                            \
  INFER_##many(name##_placed, outputs) { return block##_outputs(shapes); }            \
  KERNEL(name##_placed) {                                                             \
    Placed all(count, tensors, ranks, shapes, count - (outputs) - 2, weights);        \
    Sizes(all.ranks.data(), all.shapes.data()).check(#name, name##_sizes);            \
    return block##_of({all.tensors.data(), all.shapes.data(), 0, of}, all.count());   \
  }                                                                                   \
  SIZES(name##_places, weights)                                                       \
  extern "C" int name##_placesInferType(std::vector<int> types, void *extra) {        \
    return types.back(); /* a vector's; a matrix may be of another type */            \
  }                                                                                   \
  INFER_SHAPE(name##_places) { return places_shape(weights); }                        \
  KERNEL(name##_places) { return write_places(count, tensors, ranks, shapes); }
#define BLOCK_KERNELS(name, many, outputs, streams, weights, weights_int8)                          \
  BLOCK_KERNELS_OF(name, name, Matrices::kFloat, many, outputs, streams, weights)                   \
  BLOCK_KERNELS_OF(name##_bfloat16, name, Matrices::kBfloat16, many, outputs, streams, weights)     \
  BLOCK_KERNELS_OF(name##_int8, name, Matrices::kInt8, many, outputs, streams, weights_int8)

// A double block without the end of its text stream: image (B, S, D), text (B, T, D), modulation vector (B, D), cosine
// and sine (T + S, d), the epsilons of LayerNorm and RMSNorm (2), the image's weights as Attending and FeedForward read
// them, the text's as Attending does. Then come the image behind the block and what behind_double takes for the text:
// what it attends to, gate, shift, scale and gate of the MLP.
#define STREAMS "B S D, B T D, B D, T+S d, T+S d, 2"
std::vector<std::vector<int64_t>> double_block_outputs(int64_t **shapes) {
  const std::vector<int64_t> image(shapes[0], shapes[0] + 3), text(shapes[1], shapes[1] + 3);
  const std::vector<int64_t> vector(shapes[2], shapes[2] + 2);
  return {image, text, vector, vector, vector, vector};
}
int double_block_of(Inputs inputs, int count) {
  void **tensors = inputs.tensors;
  int64_t **shapes = inputs.shapes;
  const float *x[] = {inputs.tensor(), inputs.tensor()}, *condition = inputs.tensor();
  const float *cosine = inputs.tensor(), *sine = inputs.tensor(), *epsilons = inputs.tensor();
  const int64_t batch = shapes[0][0], width = shapes[0][2], step = 6 * width;
  const int64_t lengths[] = {shapes[0][1], shapes[1][1]};
  const Rotary rotary{cosine, sine, epsilons[1], shapes[3][1]};
  Scratch scratch;
  inputs.begin_weights();
  const Attending image(&inputs);
  float *attended[] = {scratch.floats(batch * lengths[0] * width), OUTPUTS(6, 1)};
  float *modulations[] = {scratch.floats(batch * step), scratch.floats(batch * step)};
  // Of a modulation's six parts, shift, scale, gate, and those of the MLP.
  const float *m = modulations[0];
  const FeedForward feed_forward(&inputs,
                                 {x[0], attended[0], m + 2 * width, m + 3 * width, m + 4 * width, m + 5 * width, step,
                                  batch, lengths[0], width},
                                 epsilons[0], OUTPUTS(6, 0), &scratch);
  const Attending halves[] = {image, Attending(&inputs)};
  float *normed[2], *queries[2], *keys[2], *values[2], *heads[2];
  for (int i = 0; i < 2; ++i) {
    for (float **buffer : {&normed[i], &queries[i], &keys[i], &values[i], &heads[i]}) {
      *buffer = scratch.floats(batch * lengths[i] * width);
    }
  }
  std::vector<Stream> streams;
  for (int i : {1, 0}) {
    const Attending &half = halves[i];
    streams.push_back({queries[i], keys[i], values[i], half.query_norm, half.key_norm, lengths[i], heads[i]});
  }
  for (int i = 0; i < 2; ++i) of_silu(halves[i].modulation, condition, batch, modulations[i]);
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int part = 2; part < 6; ++part) {
      std::copy_n(modulations[1] + sample * step + part * width, width, OUTPUTS(6, part) + sample * width);
    }
  }
  const int64_t rows[] = {batch * lengths[0], batch * lengths[1]}, elements = image.out.elements(rows[0] + rows[1]);
  in_pieces_of_both(rows, 3 * elements, [&](int i, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *by = modulations[i] + row / lengths[i] * step;
      modulate(x[i] + row * width, width, by + width, by, epsilons[0], normed[i] + row * width);
    }
    const int64_t start = begin * width, count = end - begin;
    halves[i].query(normed[i] + start, width, count, queries[i] + start, width);
    halves[i].key(normed[i] + start, width, count, keys[i] + start, width);
    halves[i].value(normed[i] + start, width, count, values[i] + start, width);
  });
  attend_all(streams, batch, width, width, rotary);
  in_pieces_of_both(rows, elements, [&](int i, int64_t begin, int64_t end) {
    halves[i].out(heads[i] + begin * width, width, end - begin, attended[i] + begin * width, width);
  });
  in_pieces(rows[0], feed_forward.elements(), feed_forward);
  return 0;
}
BLOCK_KERNELS(double_block, MANY, 6, STREAMS, ATTENDING ", " FEED_FORWARD ", " ATTENDING,
              "12, " ATTENDING_INT8 ", " FEED_FORWARD_INT8 ", " ATTENDING_INT8)

// behind_double: a stream (B, L, D), what it attends to, gate, shift, scale and gate of the MLP (B, D), the epsilons, and
// the weights as FeedForward reads them.
#define ATTENDED "B L D, B L D, B D, B D, B D, B D, 1"
std::vector<int64_t> behind_double_outputs(int64_t **shapes) { return {shapes[0], shapes[0] + 3}; }
int behind_double_of(Inputs inputs, int count) {
  void **tensors = inputs.tensors;
  int64_t **shapes = inputs.shapes;
  const int64_t batch = shapes[0][0], length = shapes[0][1], width = shapes[0][2];
  const Attended from{TENSOR(0), TENSOR(1), TENSOR(2), TENSOR(3), TENSOR(4), TENSOR(5), width, batch, length, width};
  inputs.next = 7;
  inputs.begin_weights();
  Scratch scratch;
  const FeedForward feed_forward(&inputs, from, *TENSOR(6), OUTPUT, &scratch);
  in_pieces(batch * length, feed_forward.elements(), feed_forward);
  return 0;
}
BLOCK_KERNELS(behind_double, ONE, 1, ATTENDED, FEED_FORWARD, "2, " FEED_FORWARD_INT8)

// A single block: image (B, S, D), text (B, T, D), modulation vector (B, D), cosine and sine (T + S, d), the epsilons,
// then weights and biases of modulation, queries, keys, values, the RMSNorms' weights, MLP and output. Both streams
// behind it, text first.
#define SINGLE "3D D, 3D, D D, D, D D, D, D D, D, d, d, W D, W, D D+W, D"
#define SINGLE_INT8 "3D D, 3D, 3D, D D, D, D, D D, D, D, D D, D, D, d, d, W D, W, W, D D+W, D, D"
std::vector<std::vector<int64_t>> single_block_outputs(int64_t **shapes) {
  return {{shapes[1], shapes[1] + 3}, {shapes[0], shapes[0] + 3}};
}
int single_block_of(Inputs inputs, int count) {
  void **tensors = inputs.tensors;
  int64_t **shapes = inputs.shapes;
  const float *image = inputs.tensor(), *text = inputs.tensor(), *condition = inputs.tensor();
  const float *cosine = inputs.tensor(), *sine = inputs.tensor(), *epsilons = inputs.tensor();
  inputs.begin_weights();
  const Linear modulation = inputs.linear(), query = inputs.linear(), key = inputs.linear(), value = inputs.linear();
  const float *query_norm = inputs.tensor(), *key_norm = inputs.tensor();
  const Linear mlp = inputs.linear(), out = inputs.linear();
  const int64_t batch = shapes[0][0], width = shapes[0][2], step = 3 * width;
  const int64_t text_length = shapes[1][1], length = text_length + shapes[0][1], rows = batch * length;
  const Rotary rotary{cosine, sine, epsilons[1], shapes[3][1]};
  Scratch scratch;
  float *modulations = scratch.floats(batch * step), *normed = scratch.floats(rows * width);
  float *queries = scratch.floats(rows * width), *keys = scratch.floats(rows * width);
  float *values = scratch.floats(rows * width), *wide = scratch.floats(rows * out.depth);
  float *added = normed;
  // Where a row of both streams' tokens lies in the one or the other.
  const auto place = [=](auto *texts, auto *images, int64_t row) {
    const int64_t sample = row / length, token = row % length;
    return token < text_length ? texts + (sample * text_length + token) * width
                               : images + (sample * (length - text_length) + token - text_length) * width;
  };
  of_silu(modulation, condition, batch, modulations);
  in_pieces(rows, 3 * query.elements(rows) + mlp.elements(rows), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *by = modulations + row / length * step;
      modulate(place(text, image, row), width, by + width, by, epsilons[0], normed + row * width);
    }
    const int64_t start = begin * width, count = end - begin;
    query(normed + start, width, count, queries + start, width);
    key(normed + start, width, count, keys + start, width);
    value(normed + start, width, count, values + start, width);
    mlp(normed + start, width, count, wide + begin * out.depth + width, out.depth);
    for (int64_t row = begin; row < end; ++row) gelu(wide + row * out.depth + width, mlp.columns);
  });
  attend_all({{queries, keys, values, query_norm, key_norm, length, wide}}, batch, width, out.depth, rotary);
  in_pieces(rows, out.elements(rows), [&](int64_t begin, int64_t end) {
    out(wide + begin * out.depth, out.depth, end - begin, added + begin * width, width);
    for (int64_t row = begin; row < end; ++row) {
      const float *gate = modulations + row / length * step + 2 * width;
      add_gated(place(text, image, row), gate, added + row * width, width, place(OUTPUTS(2, 0), OUTPUTS(2, 1), row));
    }
  });
  return 0;
}
BLOCK_KERNELS(single_block, MANY, 2, STREAMS, SINGLE, "6, " SINGLE_INT8)

// cos(t f), then sin(t f) in a row: times t (N), frequencies f (K). MindSpore takes 3 ms for a thousand times.
SIZES(sinusoids, "N, K")
INFER_TYPE(sinusoids)
INFER_SHAPE(sinusoids) { return {shapes[0][0], 2 * shapes[1][0]}; }
KERNEL(sinusoids) {
  const float *times = TENSOR(0), *frequencies = TENSOR(1);
  float *y = OUTPUT;
  const int64_t rows = shapes[0][0], width = shapes[1][0];
  in_pieces(rows, 4 * rows * width, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float *cosines = y + row * 2 * width, *sines = cosines + width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sine_and_cosine(times[row] * frequencies[i], &sines[i], &cosines[i]);
    }
  });
  return 0;
}

// The sum of w_i D_i: differences D (K, ...), and K weights of one element each.
void weighted_sum(int count, void **tensors, const int *ranks, int64_t *const *shapes) {
  const float *differences = TENSOR(0);
  float *y = OUTPUT;
  const int64_t orders = shapes[0][0], size = product(shapes[0], 1, ranks[0]);
  in_pieces(size, orders * size, [=](int64_t begin, int64_t end) {
    std::fill(y + begin, y + end, 0.0f);
    for (int64_t order = 0; order < orders; ++order) {
      const float weight = *TENSOR(1 + order), *difference = differences + order * size;
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) y[i] += weight * difference[i];
    }
  });
}

// The differences at a computed step: D'_0 = Y, D'_{i+1} = (D'_i - D_i) / gap_i while i is less than the filled orders,
// else 0: value Y (...), differences D (K, ...), filled and K - 1 gaps of one element each.
void finite_differences(int count, void **tensors, const int *ranks, int64_t *const *shapes) {
  const float *value = TENSOR(0), *before = TENSOR(1);
  const float filled = *TENSOR(2);
  float *y = OUTPUT;
  const int64_t orders = shapes[1][0], size = product(shapes[0], 0, ranks[0]);
  in_pieces(size, orders * size, [=](int64_t begin, int64_t end) {
    std::copy(value + begin, value + end, y + begin);
    for (int64_t order = 0; order + 1 < orders; ++order) {
      const float gap = *TENSOR(3 + order), *newer = y + order * size, *older = before + order * size;
      float *next = y + (order + 1) * size;
      if (order >= filled) {
        std::fill(next + begin, next + end, 0.0f);
        continue;
      }
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) next[i] = (newer[i] - older[i]) / gap;
    }
  });
}

// A kernel has a fixed number of inputs: one of each kind for every order but 0, which has neither weight nor gap.
#define OF_ORDER(order, orders, ones)                                                       \
  SIZES(weighted_sum_##order, orders " ..., " ones)                                         \
  INFER_TYPE(weighted_sum_##order)                                                          \
  INFER_SHAPE(weighted_sum_##order) { return {shapes[0] + 1, shapes[0] + ranks[0]}; }       \
  KERNEL(weighted_sum_##order) {                                                            \
    weighted_sum(count, tensors, ranks, shapes);                                            \
    return 0;                                                                               \
  }                                                                                         \
  SIZES(finite_differences_##order, "..., " orders " ..., " ones)                           \
  INFER_TYPE(finite_differences_##order)                                                    \
  INFER_SHAPE(finite_differences_##order) { return {shapes[1], shapes[1] + ranks[1]}; }     \
  KERNEL(finite_differences_##order) {                                                      \
    finite_differences(count, tensors, ranks, shapes);                                      \
    return 0;                                                                               \
  }
OF_ORDER(1, "2", "1, 1")
OF_ORDER(2, "3", "1, 1, 1")
OF_ORDER(3, "4", "1, 1, 1, 1")

// mean|r - p| / mean|r| of two tensors of one shape: (1), since MindSpore takes an output of no axes for a number.
SIZES(relative_difference, "... D, ... D")
INFER_TYPE(relative_difference)
INFER_SHAPE(relative_difference) { return {1}; }
KERNEL(relative_difference) {
  const float *reference = TENSOR(0), *probe = TENSOR(1);
  const int64_t width = shapes[0][ranks[0] - 1], rows = product(shapes[0], 0, ranks[0] - 1);
  double change = 0, size = 0;
  for (int64_t row = 0; row < rows; ++row) {
    float differences = 0, values = 0;
    for (int64_t i = row * width; i < (row + 1) * width; ++i) {
      differences += std::abs(reference[i] - probe[i]);
      values += std::abs(reference[i]);
    }
    change += differences;
    size += values;
  }
  *OUTPUT = change / size;
  return 0;
}

// The number of a step, which is an int32: throws, naming the kernel, unless it is one of so many.
int64_t step_in(const char *kernel, const void *tensor, int64_t steps) {
  const int64_t step = *static_cast<const int32_t *>(tensor);
  if (step >= 0 && step < steps) return step;
  throw std::invalid_argument(std::string(kernel) + ": step " + std::to_string(step) + " of " + std::to_string(steps));
}

// Whether a step is reused, 1 or 0, and what is written down of that: the tallies; the limits that they have to stay
// below at each step of each gate, and behind these the score's; the number of the step, in int32, and of the gate's first
// row of limits; difference and score; for each step whether it was reused, and the difference, -1 where it was not asked.
SIZES(decision, "3, M 3+L, 1, 1, 1, 1, 2 N")
INFER_TYPES(decision, 3)
INFER_SHAPES(decision) { return {{1}, {3}, {2, shapes[6][1]}}; }
KERNEL(decision) {
  const int64_t steps = shapes[6][1], step = step_in("decision", tensors[2], steps);
  const int64_t first = *TENSOR(3), row = first + step_in("decision", tensors[2], shapes[1][0] - first);
  if (first < 0 || shapes[1][1] < 4) throw std::invalid_argument("decision: " + std::to_string(shapes[1][1]) + " limits");
  const float *tallies = TENSOR(0), *limits = TENSOR(1) + row * shapes[1][1];
  const float difference = *TENSOR(4), score = *TENSOR(5);
  float *decision = OUTPUTS(3, 0), *told = OUTPUTS(3, 1), *trace = OUTPUTS(3, 2);
  const bool asked = tallies[0] < limits[0] && tallies[1] < limits[1] && tallies[2] < limits[2];
  const bool reused = asked && score < limits[3];
  *decision = reused;
  told[0] = tallies[0] + reused;
  told[1] = reused ? tallies[1] + 1 : std::min(tallies[1], 0.0f);
  told[2] = asked && std::isfinite(difference) ? tallies[2] + difference : tallies[2];
  std::copy_n(TENSOR(6), 2 * steps, trace);
  trace[step] = reused;
  trace[steps + step] = asked ? difference : -1;
  return 0;
}

// x + s v: latents x and velocity v, the strides of all steps, and the number of the step, in int32.
SIZES(euler_step, "... D, ... D, N, 1")
INFER_TYPE(euler_step)
INFER_SHAPE(euler_step) { return {shapes[0], shapes[0] + ranks[0]}; }
KERNEL(euler_step) {
  const float *x = TENSOR(0), *velocity = TENSOR(1);
  const float stride = TENSOR(2)[step_in("euler_step", tensors[3], shapes[2][0])];
  float *y = OUTPUT;
  const int64_t size = product(shapes[0], 0, ranks[0]);
  in_pieces(size, size, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) y[i] = stride * velocity[i];
    // The product is rounded too, as mindone's scheduler does: no fused multiplication and addition.
    asm volatile("" ::: "memory");
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) y[i] += x[i];
  });
  return 0;
}
