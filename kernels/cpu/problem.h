// What the files of one instruction set and the code that calls them share.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "structs.h"  // generated where the library is built

namespace fastdit {

// structs.py declares the fields of these with their comments, for Python and for the generated
// structs.h. `python -c "from fastdit.kernels.cpu import structs; print(structs.header())"` prints it.
using generated::AdaLN;
using generated::AdaLNBackward;
using generated::Linear;
using generated::Update;

struct Problem : generated::Problem {
  int64_t elements() const { return tokens * features; }
  // A state's elements, up to a whole number of quads of vectors.
  int64_t padded(int64_t width) const {
    return (elements() + 4 * width - 1) / (4 * width) * 4 * width;
  }
  int64_t width() const { return (6 * layers + 2) * hidden; }
  bool learned() const { return out_features != features; }
  // Of a layer: the floats of qkv, proj, fc1 and fc2, and those of their biases.
  int64_t layer_matrices() const { return 12 * hidden * hidden; }
  int64_t layer_biases() const { return 9 * hidden; }
};
static_assert(sizeof(Problem) == sizeof(generated::Problem));

// Weights in the order in which an instruction set multiplies by them: a matrix [M][K] is blocks of
// rows, each [K][rows of the block]. Where the rows of a block start, `block_start` says.
struct Layer {
  const float *qkv, *qkv_bias, *proj, *proj_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};
struct Weights {
  const float *embed, *position;  // position: panels [tokens / width][hidden][width]
  const Layer* layers;
  const float *final, *final_bias;  // the noise's rows first, then those of the learned range
  const int32_t* place;             // of the state's padded elements in an image's panels of output
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of `blocks` blocks of nearly equal size.
inline int64_t block_start(int64_t total, int64_t blocks, int64_t i) {
  return i * (total / blocks) + (i < total % blocks ? i : total % blocks);
}

// A layer's heads and the MLP's features are two slices, each with sums of its own over what it
// gives to x: so two threads exchange nothing else, and one thread gets the same bits.
static constexpr int64_t SLICES = 2;
inline int64_t slice_start(int64_t n, int64_t i) { return block_start(n, SLICES, i); }

// Spins first, since the others are seldom late; then lets other threads have the CPU, since they
// may be the ones that are waited for. Sleeps only where somebody was held up for long: to be woken
// takes longer than a layer, so that the next to arrive would sleep as well, and so on at every
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

// The threads that share a group of images, and the caller's place among them.
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
  int rows;   // of a block of weights, at most
  int64_t (*team_floats)(const Problem&, int64_t images);    // of memory that a team shares
  int64_t (*thread_floats)(const Problem&, int64_t images);  // and that each of its threads needs
  int64_t (*useful_threads)(const Problem&, int64_t images);  // of a team
  void (*run)(const Problem&, const Weights&, Team, int64_t first_image, int64_t images,
              float* shared, float* own);
  void (*update)(const Update&, int64_t image, int64_t element);  // 4 * width elements from there
  // Of a key, step and stream: 4 * width normals from a quad on.
  void (*normals)(uint64_t key, uint32_t step, uint32_t stream, uint32_t quad, float* out);
  float (*multiply_adds)(int64_t repeats);  // 12 vectors of them each
  // Of two vectors of rows; own: 2 * width * in floats.
  void (*linear)(const Linear&, const float* blocks, int64_t first_row, float* own);
  void (*adaln)(const AdaLN&, int64_t first_row, int64_t last_row);
  void (*adaln_backward)(const AdaLNBackward&, int64_t chunk);
};

extern const InstructionSet plain;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512;
#endif

// The best that this CPU has, or the one of a name; null where it has it not.
const InstructionSet* choose(const char* name);

}  // namespace fastdit
