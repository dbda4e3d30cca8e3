// Declarations that the code of each instruction set shares with the code that calls it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "structs.h"

namespace fastdit {

// The places of kernels/columns.py in a row of coefficients; build.py defines the macro.
namespace column {
enum : int { FASTDIT_COLUMNS, count };
}

using fields::AdaLN;
using fields::AdaLNBackward;
using fields::Linear;
using fields::Update;

struct Problem : fields::Problem {
  int64_t elements() const { return tokens * features; }
  // The elements of a state, rounded up to a whole number of quads of vectors.
  int64_t padded(int64_t width) const {
    return (elements() + 4 * width - 1) / (4 * width) * 4 * width;
  }
  int64_t width() const { return (6 * layers + 2) * hidden; }
  bool learned() const { return out_features != features; }
  // The floats of a layer's matrices qkv, proj, fc1 and fc2, and of their biases.
  int64_t layer_matrices() const { return 12 * hidden * hidden; }
  int64_t layer_biases() const { return 9 * hidden; }
};
static_assert(sizeof(Problem) == sizeof(fields::Problem));

// Weights in the order in which an instruction set reads them. A matrix [M][K] is stored as blocks
// of rows, each [K][rows of the block]; `block_start` says at which row a block starts.
struct Layer {
  const float *qkv, *qkv_bias, *proj, *proj_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};
struct Weights {
  const float *embed, *position;  // position: panels [tokens / width][hidden][width]
  const Layer* layers;
  const float *final, *final_bias;  // the rows of the noise first, then those of the learned range
  const int32_t* place;  // the index in an image's panels of output for each padded element
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The start of block i when `total` is split into `blocks` blocks of nearly equal size.
inline int64_t block_start(int64_t total, int64_t blocks, int64_t i) {
  return i * (total / blocks) + (i < total % blocks ? i : total % blocks);
}

// A layer's heads and its MLP's features are split into two slices, whose contributions to x are
// summed separately. Two threads with a slice each exchange these sums alone, and one thread that
// has both slices gets the same bits.
static constexpr int64_t SLICES = 2;
inline int64_t slice_start(int64_t n, int64_t i) { return block_start(n, SLICES, i); }

// A barrier that spins first, since the other threads are seldom late, and then yields the CPU,
// since they may be waiting for it. It sleeps only if a thread is held up for long: to wake up
// takes longer than a layer, so the thread that arrives next would sleep too, and so on at every
// barrier.
class Barrier {
 public:
  void wait(int size) {
    const int turn = turn_.load();
    if (arrived_.fetch_add(1) == size - 1) {
      arrived_.store(0);
      turn_.store(turn + 1);
      if (sleepers_.load()) turn_.notify_all();
      return;
    }
    for (int i = 0; i < 3000; i++) {
      if (turn_.load() != turn) return;
      if (i >= 2000) std::this_thread::yield();
    }
    sleepers_.fetch_add(1);
    while (turn_.load() == turn) turn_.wait(turn);
    sleepers_.fetch_sub(1);
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> turn_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

// The threads that share a group of images, and the calling thread's place among them.
struct Team {
  int64_t id, size;
  Barrier* barrier;
  void wait() const {
    if (size > 1) barrier->wait(size);
  }
};

// The code for one instruction set.
struct InstructionSet {
  const char* name;
  int width;  // floats of a vector
  int rows;   // the most rows of a block of weights
  int64_t (*team_floats)(const Problem&, int64_t images);     // memory that a team shares
  int64_t (*thread_floats)(const Problem&, int64_t images);   // memory of each of its threads
  int64_t (*useful_threads)(const Problem&, int64_t images);  // the largest useful team
  void (*run)(const Problem&, const Weights&, Team, int64_t first_image, int64_t images,
              float* shared, float* own);
  // Updates 4 * width elements from `element` on.
  void (*update)(const Update&, int64_t image, int64_t element);
  // Writes 4 * width normals from a quad of elements on.
  void (*normals)(uint64_t key, uint32_t step, uint32_t stream, uint32_t quad, float* out);
  float (*multiply_adds)(int64_t repeats);  // 12 vectors each time
  // Computes 2 * width rows of y; own: 2 * width * in_features floats of scratch memory.
  void (*linear)(const Linear&, const float* blocks, int64_t first_row, float* own);
  void (*adaln)(const AdaLN&, int64_t first_row, int64_t last_row);
  void (*adaln_backward)(const AdaLNBackward&, int64_t chunk);
};

extern const InstructionSet plain;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512;
#endif

// Returns the best instruction set of this CPU, or the one of a name; null if the CPU lacks it.
const InstructionSet* choose(const char* name);

}  // namespace fastdit
