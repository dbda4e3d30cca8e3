// Matrix products of a DiT. Weights lie as the model has them, and tokens in the lanes of vectors.
//
// Activations are panels [feature][WIDTH tokens], so that LayerNorm, softmax and the products of
// attention run along the features. Nothing is transposed, and no hidden size, number of tokens or
// number of heads needs masks. Nothing reads the lanes past the last token.

static constexpr int PAIR = 2;  // panels at a time

// What a product multiplies: a weight, and an operand of a token in every lane. In bfloat16 an
// operand has two features, the even one in the lower half of a lane, as a row of weights has them.
#ifdef BFLOAT16
typedef uint16_t weight;
typedef vi operand;
static constexpr int FEATURES = 2;  // of an operand

INLINE operand to_operand(vf even, vf odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const vi i = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  return (operand)_mm512_permutexvar_epi16((__m512i)i, halves);
}
INLINE vf add_product(vf sum, const uint16_t* a, operand b) {
  int32_t both;
  __builtin_memcpy(&both, a, sizeof both);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
}
#else
typedef float weight;
typedef vf operand;
static constexpr int FEATURES = 1;
#endif
INLINE vf add_product(vf sum, const float* a, vf b) { return sum + *a * b; }

// Writes n features of a panel's tokens; f(i) is the vector of feature i. In bfloat16 zeros follow
// an odd number of features.
template <class F> INLINE void write_features(operand* out, int64_t n, F f) {
#ifdef BFLOAT16
  for (int64_t i = 0; i + 1 < n; i += 2) out[i / 2] = to_operand(f(i), f(i + 1));
  if (n % 2) out[n / 2] = to_operand(f(n - 1), vf{});
#else
  for (int64_t i = 0; i < n; i++) out[i] = f(i);
#endif
}

// c[v][i] (+)= sum over k of a(i, k) * b[v][k], for MR rows i and NV vectors v, which are b_v and
// c_v vectors apart. a(i, k) is a[i * a_stride + k], or by columns a[k * a_stride + i]; of bfloat16
// k counts pairs. For any MR and NV an element is the same sum in the same order. `next`: rows to
// fetch into the cache meanwhile.
enum class By { ROW, COLUMN };
template <int MR, int NV, By BY, class A, class B>
static __attribute__((noinline)) void block(const A* a, int64_t a_stride, const B* b, int64_t b_v,
                                            int64_t K, vf* c, int64_t c_v, bool add,
                                            const A* next) {
  constexpr int STEP = 4 / sizeof(A);  // elements of a row at a time
  vf sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[i][v] = add ? c[v * c_v + i] : vf{};
  // Four rows each have a pointer, so that every address is one of these plus 0 to 3 strides.
  const A* quads[3] = {a, a + 4 * a_stride, a + 8 * a_stride};
  for (int64_t k = 0; k < K;) {
    const int64_t end = k + 16 < K ? k + 16 : K;
    if (BY == By::ROW && next)  // a cache line of each row
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) __builtin_prefetch(next + i * a_stride + k * STEP);
    for (; k < end; k++) {
      B factor[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) factor[v] = b[v * b_v + k];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const A* of_row = BY == By::ROW ? quads[i / 4] + i % 4 * a_stride : a + i;
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[i][v] = add_product(sum[i][v], of_row, factor[v]);
      }
      if (BY == By::ROW)
        quads[0] += STEP, quads[1] += STEP, quads[2] += STEP;
      else
        a += a_stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) c[v * c_v + i] = sum[i][v];
}
static_assert(ROWS <= 12 && ROWS % 2 == 0);

template <By BY, class A, class B, int MR = ROWS>
INLINE void multiply(int rows, int vectors, const A* a, int64_t a_stride, const B* b, int64_t b_v,
                     int64_t K, vf* c, int64_t c_v, bool add = false, const A* next = nullptr) {
  if constexpr (MR > 1)
    if (rows < MR)
      return multiply<BY, A, B, MR - 1>(rows, vectors, a, a_stride, b, b_v, K, c, c_v, add, next);
  if (vectors == 1)
    block<MR, 1, BY>(a, a_stride, b, b_v, K, c, c_v, add, next);
  else
    block<MR, PAIR, BY>(a, a_stride, b, b_v, K, c, c_v, add, next);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger_of(int64_t a, int64_t b) { return a < b ? b : a; }
static constexpr int64_t CACHED_FLOATS = 8192;  // 32 KB of the first-level cache
static constexpr int64_t NEAR_FLOATS = 160 << 10;  // 640 KB of the second-level cache
static constexpr int64_t FAR_FLOATS = 1 << 17;  // weights of 512 KB do not stay there

// A thread's share of its team's panels, of the two slices of every layer, and of a slice's rows. A
// thread that has whole slices needs nothing of other threads but their sums over other slices.
struct Share {
  int64_t first_panel, last_panel;
  int64_t first_slice, last_slice;
  int64_t part, parts;  // which part of the blocks of rows, and of how many
  bool far;             // weights come from further than the second-level cache

  bool has_all_slices() const { return last_slice - first_slice == SLICES; }
  // Shares of products without slices: this thread takes all rows of its panels, or the threads of
  // its panels split the rows.
  Share of_all_rows() const { return {first_panel, last_panel, 0, SLICES, 0, 1, far}; }
  Share without_slices() const {
    if (has_all_slices()) return *this;
    return {first_panel, last_panel, 0, SLICES, first_slice * parts + part, SLICES * parts, far};
  }
};

// Multiplies COUNT matrices w [M][K], whose rows are w_stride apart, by in [panel][K], whose panels
// are in_v features apart, for a thread's share; of bfloat16 K is even. Calls finish(panel, row,
// rows, sums) for each block of rows, which begins at an even one; the sums of each further matrix
// are ROWS vectors behind those of the one before.
template <int COUNT, class Finish>
INLINE void products(const Share& mine, const weight* const (&w)[COUNT], int64_t w_stride,
                     int64_t M, int64_t K, const operand* in, int64_t in_v, Finish finish) {
  const int64_t blocks = ceil_div(M, ROWS);
  const int64_t first = block_start(blocks, mine.parts, mine.part);
  const int64_t last = block_start(blocks, mine.parts, mine.part + 1);
  auto start = [&](int64_t n) INLINED {
    return least(M, block_start(ceil_div(M, 2), blocks, n) * 2);
  };
  K /= FEATURES, in_v /= FEATURES;
  // Take as many panels at a time as stay in the first-level cache while all rows pass; or, if the
  // rows come from so far that they should be read seldom, as stay in the second-level cache.
  const int64_t cached = mine.far ? NEAR_FLOATS : CACHED_FLOATS;
  const int64_t most = larger_of(PAIR, cached / larger_of(1, K * WIDTH) / PAIR * PAIR);
  const int64_t panels = larger_of(1, mine.last_panel - mine.first_panel);
  const int64_t group = ceil_div(ceil_div(panels, ceil_div(panels, most)), PAIR) * PAIR;
  for (int64_t g = mine.first_panel; g < mine.last_panel; g += group) {
    const int64_t end = least(g + group, mine.last_panel);
    for (int64_t n = first; n < last; n++) {
      const int64_t row = start(n), below = start(n + 1), rows = below - row;
      for (int64_t q = g; q < end; q += PAIR) {
        vf sums[PAIR * COUNT * ROWS];
        const int64_t vectors = least(PAIR, end - q);
        const bool fetch = mine.far && q == g && n + 1 < last;
        for (int i = 0; i < COUNT; i++)
          multiply<By::ROW>(rows, vectors, w[i] + row * w_stride, w_stride, in + q * in_v, in_v, K,
                            sums + i * ROWS, COUNT * ROWS, false,
                            fetch ? w[i] + below * w_stride : nullptr);
        for (int64_t v = 0; v < vectors; v++) finish(q + v, row, rows, sums + v * COUNT * ROWS);
      }
    }
  }
}

template <class Finish>
INLINE void product(const Share& mine, const weight* w, int64_t w_stride, int64_t M, int64_t K,
                    const operand* in, int64_t in_v, Finish finish) {
  products<1>(mine, {w}, w_stride, M, K, in, in_v, finish);
}
