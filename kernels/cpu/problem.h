// Declarations that the code of each instruction set shares with the code that calls it.
#pragma once
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "structs.h"
#include "team.h"

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
  int64_t width() const { return (block_parts * layers + 2) * hidden; }
  // As threads lay a row of modulation out: every block has six parts.
  int64_t laid_width() const { return (6 * layers + 2) * hidden; }
  bool learned() const { return out_features != features; }
  // The floats of a layer's matrices qkv, proj, fc1 and fc2.
  int64_t layer_matrices() const { return (4 * hidden + (2 + swiglu) * mlp_hidden) * hidden; }
};
static_assert(sizeof(Problem) == sizeof(fields::Problem));

// A model's weights. They are read where the model has them, but for those that have a layout of
// their own here. Matrices are float or bfloat16, as the instruction set takes them.
struct Layer {
  const void* qkv;
  const float* qkv_bias;
  const void* proj;
  const float* proj_bias;
  const void* fc1;
  const float* fc1_bias;
  const void* fc2;
  const float* fc2_bias;
  // Null where the model has none.
  const float *norm1, *norm2;       // [hidden]
  const float *q_weight, *k_weight;  // [head dim], of the norms of queries and of keys
  const float *q_bias, *k_bias;
};
struct Weights {
  const void *embed, *final;
  const float* final_bias;
  const float* position;  // panels [tokens / width][hidden][width]
  const Layer* layers;
  const int32_t* place;  // the index in an image's panels of output for each padded element
  const float* final_norm;  // [hidden], or null
  const float* rope;  // panels [tokens / width][cosines, then sines: head dim][width], or null
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

// The code for one instruction set.
struct InstructionSet {
  const char* name;
  int width;  // floats of a vector
  int64_t (*team_floats)(const Problem&, int64_t images);     // memory that a team shares
  int64_t (*thread_floats)(const Problem&, int64_t images);   // memory of each of its threads
  int64_t (*useful_threads)(const Problem&);  // the largest useful team of an image
  void (*run)(const Problem&, const Weights&, Team, int64_t first_image, int64_t images,
              float* shared, float* own);
  // Updates 4 * width elements from `element` on.
  void (*update)(const Update&, int64_t image, int64_t element);
  // Writes 4 * width normals from a quad of elements on.
  void (*normals)(uint64_t key, uint32_t step, uint32_t stream, uint32_t quad, float* out);
  float (*multiply_adds)(int64_t repeats);  // 12 vectors each time
  // Computes some features of some rows of y, of which the first is a whole number of panels' from
  // the start; own: in_features floats of memory for each row, rounded up to whole panels.
  void (*linear)(const Linear&, int64_t first_row, int64_t last_row, int64_t first_feature,
                 int64_t last_feature, float* own);
  void (*adaln)(const AdaLN&, int64_t first_row, int64_t last_row);
  void (*adaln_backward)(const AdaLNBackward&, int64_t chunk);
};

extern const InstructionSet plain;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512, avx512_bf16;
#endif

// Returns the best instruction set of this CPU, or the one of a name; null if the CPU lacks it.
const InstructionSet* choose(const char* name);

}  // namespace fastdit
