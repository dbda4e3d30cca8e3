// The C interface. It distributes images over threads, and chooses the instruction set at run time.
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
  const InstructionSet* found[3] = {&plain};  // for float, the best last
  int count = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) found[count++] = &avx2;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    found[count++] = &avx512;
  const bool has_bf16 = found[count - 1] == &avx512 && __builtin_cpu_supports("avx512bf16");
  if (name && !std::strcmp(avx512_bf16.name, name)) return has_bf16 ? &avx512_bf16 : nullptr;
#endif
  if (!name) return found[count - 1];
  for (int i = 0; i < count; i++)
    if (!std::strcmp(found[i]->name, name)) return found[i];
  return nullptr;
}

namespace {

constexpr int64_t CACHED_FLOATS = 128 << 10;  // 512 KB of the second-level cache

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

// A model's weights for an instruction set with vectors of some width.
struct Layout {
  Floats position, rope;
  std::vector<Layer> layers;
  std::vector<int32_t> place;
  Weights weights;

  Layout(const Problem& p, int64_t width) : layers(p.layers), place(p.padded(width)) {
    const int64_t D = p.hidden, F = p.features, panels = ceil_div(p.tokens, width);
    const int64_t* address = p.weights;
    auto matrix = [&] { return reinterpret_cast<const void*>(*address++); };
    auto floats = [&] { return reinterpret_cast<const float*>(*address++); };
    const void* embed = matrix();
    const float* of_tokens = floats();
    auto floats_if = [&](bool present) { return present ? floats() : nullptr; };
    for (Layer& l : layers)
      l = {matrix(), floats(), matrix(), floats(), matrix(), floats(), matrix(), floats(),
           floats_if(p.rms), floats_if(p.rms), floats_if(p.qk_norm), floats_if(p.qk_norm),
           floats_if(p.qk_norm == 1), floats_if(p.qk_norm == 1)};
    const void* last = matrix();
    const float* last_bias = floats();
    const float* last_norm = floats_if(p.rms);
    if (p.rope) rope = rope_panels(p, width, floats());
    position = allocate(panels * D * width);
    for (int64_t q = 0; q < panels; q++)
      for (int64_t i = 0; i < D; i++)
        for (int64_t n = q * width; n < (q + 1) * width; n++)
          position.get()[(q * D + i) * width + n % width] =
              n < p.tokens ? of_tokens[n * D + i] : 0.f;
    // A token's outputs are [pixel][eps, range][channel] where the range is learned.
    for (int64_t e = 0; e < p.elements(); e++) {  // padding has place 0 and is never stored
      const int64_t token = e / F, f = e % F, C = p.channels;
      const int64_t output = p.learned() ? f / C * 2 * C + f % C : f;
      place[e] = (token / width * p.out_features + output) * width + token % width;
    }
    weights = {embed, last, last_bias, position.get(), layers.data(), place.data(), last_norm,
               rope.get()};
  }

 private:
  // Lays a table [cosines, sines][tokens][head dim / 2] out in panels.
  static Floats rope_panels(const Problem& p, int64_t width, const float* table) {
    const int64_t N = p.tokens, half = p.hidden / p.heads / 2, panels = ceil_div(N, width);
    Floats laid = allocate(panels * 2 * half * width);
    float* out = laid.get();
    for (int64_t q = 0; q < panels; q++)
      for (int64_t i = 0; i < 2 * half; i++)
        for (int64_t n = q * width; n < (q + 1) * width; n++)
          *out++ = n < N ? table[(i / half * N + n) * half + i % half] : 0.f;
    return laid;
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
  const int64_t most = std::min(T, set.useful_threads(p));
  return std::clamp<int64_t>(flop / 800'000, 1, most);
}

void trajectory(const Problem& p, const InstructionSet& set) {
  static Limit limit;
  const Layout layout(p, set.width);
  // Only images that threads share make one thread wait for another.
  const int64_t in_time = limit.threads(p.threads);
  const int64_t threads = p.images < p.threads ? in_time : p.threads;
  const int64_t together = images_together(p, set), of_image = set.team_floats(p, 1);
  const int64_t left_over = std::min(p.images, threads);  // at most, for any number of threads
  const int64_t shared = set.team_floats(p, together), own = set.thread_floats(p, together);
  const int64_t of_thread = shared + own + set.thread_floats(p, left_over);
  const Floats memory = allocate(left_over * of_image + threads * of_thread);
  std::vector<std::unique_ptr<TeamState>> states(left_over);  // of as many teams, at most
  for (auto& state : states) state = std::make_unique<TeamState>(threads);
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    // OpenMP may give fewer threads than it was asked for.
    const int64_t T = omp_get_num_threads(), id = omp_get_thread_num();
    float* mine = memory.get() + left_over * of_image + id * of_thread;

    // There are as many groups of whole images for each thread, of which the next thread that is
    // free takes the next one.
    const int64_t whole = p.images / T * T, groups = T * ceil_div(p.images / T, together);
    for (int64_t i; (i = taken++) < groups;) {
      const int64_t first = block_start(whole, groups, i);
      const int64_t count = block_start(whole, groups, i + 1) - first;
      set.run(p, layout.weights, {0, 1, nullptr, nullptr}, first, count, mine, mine + shared);
    }

    // Teams of threads share the remaining images.
    const int64_t rest = p.images - whole, some = std::min(T, in_time);
    if (rest && id < some) {
      const int64_t worth = threads_of_an_image(p, set, some);
      const int64_t teams = std::clamp<int64_t>(some / worth, 1, rest), team = id % teams;
      const int64_t first = block_start(rest, teams, team);
      const int64_t count = block_start(rest, teams, team + 1) - first;
      const int64_t size = std::min(ceil_div(some - team, teams), worth * count);
      TeamState* state = states[team].get();
      if (id < teams) state->others = some - size;  // read by the first thread, which is this one
      const Team here{id / teams, size, state, &limit, whole == 0};
      if (here.id < size)
        set.run(p, layout.weights, here, whole + first, count, memory.get() + first * of_image,
                mine + shared + own);
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
  const int64_t K = linear->in_features, features = linear->out_features;
  // As many pairs of panels at a time as stay in a second-level cache, since weights come from
  // further away; and some pieces for each thread, but large ones, since each lays its rows out.
  const int64_t pair = 2 * set->width, pairs = ceil_div(linear->rows, pair);
  const int64_t most = std::max<int64_t>(1, CACHED_FLOATS / std::max<int64_t>(1, K * pair));
  const int64_t wanted = 4 * linear->threads;
  const int64_t pieces = std::clamp<int64_t>(
      features / 192, 1, ceil_div(wanted, std::max<int64_t>(1, ceil_div(pairs, most))));
  const int64_t groups = std::min(pairs, std::max(ceil_div(pairs, most), ceil_div(wanted, pieces)));
  const int64_t own = groups ? ceil_div(pairs, groups) * pair * K : 0;
  const Floats panels = allocate(linear->threads * own);
#pragma omp parallel for num_threads(linear->threads) schedule(dynamic)
  for (int64_t i = 0; i < groups * pieces; i++) {
    const int64_t first = block_start(pairs, groups, i % groups) * pair;
    const int64_t last = std::min(linear->rows, block_start(pairs, groups, i % groups + 1) * pair);
    float* of_thread = panels.get() + omp_get_thread_num() * own;
    set->linear(*linear, first, last, block_start(features, pieces, i / groups),
                block_start(features, pieces, i / groups + 1), of_thread);
  }
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
