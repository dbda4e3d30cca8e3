// The C interface. It packs weights into blocks, distributes images over threads, and chooses the
// instruction set at run time.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>
#include <string_view>
#include <vector>

#include "problem.h"

namespace fastdit {

const InstructionSet* choose(const char* name) {
  const InstructionSet* found[3] = {&plain};
  int count = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) found[count++] = &avx2;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    found[count++] = &avx512;
#endif
  if (!name) return found[count - 1];
  for (int i = 0; i < count; i++)
    if (!std::strcmp(found[i]->name, name)) return found[i];
  return nullptr;
}

namespace {

// Treats denormals as zero while it lives, since they would slow a thread down a hundredfold.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(int64_t count) {
  const std::size_t bytes = ceil_div(count * sizeof(float), 4096) * 4096;
  Floats memory(static_cast<float*>(std::aligned_alloc(4096, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Packs a matrix [M][K], whose rows are `stride` apart in w, into blocks of rows. Row i of the
// packed matrix is row from(i) of w.
template <class From>
void pack(const float* w, int64_t M, int64_t K, int64_t stride, int64_t rows, float* out,
          From from) {
  const int64_t blocks = ceil_div(M, rows);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t start = block_start(M, blocks, b), n = block_start(M, blocks, b + 1) - start;
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < K; k++) out[start * K + k * n + i] = w[from(start + i) * stride + k];
  }
}

// A model's weights as an instruction set takes them. Here the rows of qkv are
// [head][query, key, value][d], with a packed matrix for every head and a copy of the biases in
// this order. The other biases of the layers are read where the caller has them.
struct Packed {
  Floats memory, final_bias;
  std::vector<Layer> layers;
  std::vector<int32_t> place;
  Weights weights;

  Packed(const Problem& p, const InstructionSet& set)
      : layers(p.layers), place(p.padded(set.width)) {
    const int64_t D = p.hidden, F = p.features, F_out = p.out_features, W = set.width;
    const int64_t panels = ceil_div(p.tokens, W), of_layer = p.layer_matrices() + p.layer_biases();
    const int64_t of_packed_layer = p.layer_matrices() + 3 * D;  // with the biases of qkv
    const float *embed = p.weights, *position = embed + D * F, *blocks = position + p.tokens * D;
    const float *last = blocks + p.layers * of_layer, *last_bias = last + F_out * D;
    memory = allocate(D * F + panels * D * W + p.layers * of_packed_layer + F_out * D);
    final_bias = allocate(F_out);
    float *to_position = memory.get(), *to_embed = to_position + panels * D * W;  // aligned
    float *to_layers = to_embed + D * F, *to_final = to_layers + p.layers * of_packed_layer;

    auto same = [](int64_t row) { return row; };
    // The model's rows are [pixel][eps, range][channel]; here, [eps, range][pixel][channel].
    auto channels_apart = [&](int64_t row) {
      if (!p.learned()) return row;
      const int64_t e = row % F, C = p.channels;
      return e / C * 2 * C + row / F * C + e % C;
    };
    pack(embed, D, F, F, set.rows, to_embed, same);
    pack(last, F_out, D, D, set.rows, to_final, channels_apart);
    for (int64_t i = 0; i < F_out; i++) final_bias.get()[i] = last_bias[channels_apart(i)];
    for (int64_t q = 0; q < panels; q++)
      for (int64_t i = 0; i < D; i++)
        for (int64_t n = q * W; n < (q + 1) * W; n++)
          to_position[(q * D + i) * W + n % W] = n < p.tokens ? position[n * D + i] : 0.f;
    for (int64_t e = 0; e < p.elements(); e++)  // padding has place 0 and is never stored
      place[e] = (e / F / W * F_out + e % F) * W + e / F % W;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t l = 0; l < p.layers; l++) {
      const float* from = blocks + l * of_layer;
      float* to = to_layers + l * of_packed_layer;
      const int64_t d = D / p.heads;
      float* to_bias = to + p.layer_matrices();
      layers[l].qkv = to, layers[l].qkv_bias = to_bias;
      for (int64_t h = 0; h < p.heads; h++) {
        auto row = [&](int64_t i) { return i / d * D + h * d + i % d; };
        pack(from, 3 * d, D, D, set.rows, to + h * 3 * d * D, row);
        for (int64_t i = 0; i < 3 * d; i++) to_bias[h * 3 * d + i] = from[3 * D * D + row(i)];
      }
      to += 3 * D * D, from += 3 * D * D + 3 * D;
      // Packs the two slices of a matrix [M][K] as matrices of their own: [m][k], and the rows
      // below it or, if m = M, the columns beside it.
      auto next = [&](int64_t M, int64_t K, int64_t m, int64_t k, const float*& weight,
                      const float*& bias) {
        const bool below = m < M;
        pack(from, m, k, K, set.rows, to, same);
        pack(from + (below ? m * K : k), below ? M - m : M, below ? K : K - k, K, set.rows,
             to + m * k, same);
        weight = to, bias = from + M * K;
        to += M * K, from += M * K + M;
      };
      next(D, D, D, slice_start(p.heads, 1) * d, layers[l].proj, layers[l].proj_bias);
      next(4 * D, D, slice_start(4 * D, 1), D, layers[l].fc1, layers[l].fc1_bias);
      next(D, 4 * D, D, slice_start(4 * D, 1), layers[l].fc2, layers[l].fc2_bias);
    }
    weights = {to_embed, to_position, layers.data(), to_final, final_bias.get(), place.data()};
  }
};

// The number of images that a team takes in lockstep: as many as keep its panels in the
// second-level cache, but enough that every weight serves 16 panels once it is read, and at most 8.
int64_t images_together(const Problem& p, const InstructionSet& set) {
  const int64_t cached = (1 << 18) / set.team_floats(p, 1);
  const int64_t enough = ceil_div(16, ceil_div(p.tokens, set.width));
  return std::min<int64_t>(std::max(cached, enough), 8);
}

// How many of T threads to give to one image. They exchange sums twice per layer, which takes 2 to
// 3 microseconds. (Measured on two threads: no gain at 0.4 MFLOP a layer, 1.4 times the speed at
// 1.6, 1.6 times from 3.6 on.) The lanes past the last token cost time too.
int64_t threads_of_an_image(const Problem& p, const InstructionSet& set, int64_t T) {
  const int64_t lanes = (p.guided ? 2 : 1) * ceil_div(p.tokens, set.width) * set.width;
  const int64_t D = p.hidden, flop = 2 * lanes * (p.layer_matrices() + 2 * p.tokens * D);
  const int64_t most = std::min(T, set.useful_threads(p, 1));
  return std::clamp<int64_t>(flop / 800'000, 1, most);
}

void trajectory(const Problem& p, const InstructionSet& set) {
  const Packed packed(p, set);
  const int64_t together = images_together(p, set), of_image = set.team_floats(p, 1);
  const int64_t left_over = std::min(p.images, p.threads);  // at most, for any number of threads
  const int64_t shared = set.team_floats(p, together), own = set.thread_floats(p, together);
  const int64_t of_thread = shared + own + set.thread_floats(p, left_over);
  const Floats memory = allocate(left_over * of_image + p.threads * of_thread);
  std::vector<Barrier> barriers(p.threads);
#pragma omp parallel num_threads(p.threads)
  {
    const FlushDenormals flush;
    // OpenMP may give fewer threads than it was asked for.
    const int64_t T = omp_get_num_threads(), id = omp_get_thread_num();
    float* mine = memory.get() + left_over * of_image + id * of_thread;

    // Each thread takes the same number of whole images, some of them in lockstep.
    const int64_t of_each = p.images / T, end = of_each * (id + 1);
    for (int64_t i = of_each * id; i < end; i += together)
      set.run(p, packed.weights, {0, 1, nullptr}, i, std::min(together, end - i), mine,
              mine + shared);

    // Teams of threads share the remaining images.
    const int64_t rest = p.images % T, worth = threads_of_an_image(p, set, T);
    if (rest) {
      const int64_t teams = std::clamp<int64_t>(T / worth, 1, rest), team = id % teams;
      const int64_t first = block_start(rest, teams, team);
      const int64_t count = block_start(rest, teams, team + 1) - first;
      const int64_t size = std::min(ceil_div(T - team, teams), worth * count);
      if (id / teams < size)
        set.run(p, packed.weights, {id / teams, size, &barriers[team]}, p.images - rest + first,
                count, memory.get() + first * of_image, mine + shared + own);
    }
  }
}

}  // namespace
}  // namespace fastdit

using namespace fastdit;

extern "C" {

// Takes a problem's steps. Returns 0, or 1 if memory does not suffice, or 2 if this CPU does not
// have the instruction set of that name (null: its best).
int fastdit_trajectory(const Problem* problem, const char* instruction_set) {
  const InstructionSet* set = choose(instruction_set);
  if (!set) return 2;
  try {
    trajectory(*problem, *set);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

int fastdit_update(const Update* update, const char* instruction_set) {
  const InstructionSet* set = choose(instruction_set);
  if (!set) return 2;
  const int64_t chunks = ceil_div(update->elements, 4 * set->width);
  const int64_t total = update->images * chunks;
#pragma omp parallel for num_threads(update->threads) if (total > 64)
  for (int64_t i = 0; i < total; i++)
    set->update(*update, i / chunks, i % chunks * 4 * set->width);
  return 0;
}

// Writes the noise of seeds [n_seeds][2] to out [n_steps][n_seeds][elements], as fastdit/noise.py
// defines it.
void fastdit_normal(const int64_t* seeds, const int64_t* steps, int64_t n_seeds, int64_t n_steps,
                    int64_t elements, int64_t threads, float* out) {
  const InstructionSet* set = choose(nullptr);
  const int64_t at_once = 4 * set->width, chunks = ceil_div(elements, at_once);
  const int64_t total = n_steps * n_seeds * chunks;
#pragma omp parallel for num_threads(threads) if (total > 64)
  for (int64_t i = 0; i < total; i++) {
    float z[64];
    const int64_t row = i / chunks, first = i % chunks * at_once, *seed = seeds + row % n_seeds * 2;
    set->normals(seed[0], steps[row / n_seeds], seed[1], first / 4, z);
    std::copy_n(z, std::min(at_once, elements - first), out + row * elements + first);
  }
}

// Returns the size of a struct of structs.h, or -1 if it has none of that name.
int64_t fastdit_struct_size(const char* name) {
  const std::string_view asked = name;
  if (asked == "Problem") return sizeof(Problem);
  if (asked == "Update") return sizeof(Update);
  if (asked == "Linear") return sizeof(Linear);
  if (asked == "AdaLN") return sizeof(AdaLN);
  if (asked == "AdaLNBackward") return sizeof(AdaLNBackward);
  return -1;
}

const char* fastdit_instruction_set() { return choose(nullptr)->name; }

// A row's bits depend neither on the other rows nor on the number of threads. Returns as
// fastdit_trajectory does.
int fastdit_linear(const Linear* linear, const char* instruction_set) try {
  const InstructionSet* set = choose(instruction_set);
  if (!set) return 2;
  const int64_t at_once = 2 * set->width, own = at_once * linear->in_features;
  const Floats blocks = allocate(linear->out_features * linear->in_features);
  const Floats panels = allocate(linear->threads * own);
  pack(linear->weight, linear->out_features, linear->in_features, linear->in_features, set->rows,
       blocks.get(), [](int64_t row) { return row; });
#pragma omp parallel for num_threads(linear->threads)
  for (int64_t i = 0; i < ceil_div(linear->rows, at_once); i++)
    set->linear(*linear, blocks.get(), i * at_once, panels.get() + omp_get_thread_num() * own);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Measures the FLOP/s of multiply-adds on registers alone.
double fastdit_peak(int64_t threads, int64_t repeats) {
  const InstructionSet* set = choose(nullptr);
  volatile float sink;
  int64_t took_part = 0;
  const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : took_part)
  {
    sink = set->multiply_adds(repeats);
    took_part++;
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return 2.0 * 12 * set->width * repeats * took_part / taken.count();
}
}
