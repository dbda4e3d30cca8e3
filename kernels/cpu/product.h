// Matrix products of a DiT. Weights lie as the model has them, and tokens in the lanes of vectors.
//
// Activations are panels [feature][WIDTH tokens], so that LayerNorm, softmax and the products of
// attention run along the features. Nothing is transposed, and no hidden size, number of tokens or
// number of heads needs masks. Nothing reads the lanes past the last token.

static constexpr int PAIR = 2;  // panels at a time

// c[v][i] (+)= sum over k of a(i, k) * b[v][k], for MR rows i and NV vectors v, which are b_v and c_v
// vectors apart. a(i, k) is a[i * a_stride + k], or by columns a[k * a_stride + i]. For any MR and NV
// an element is the same sum in the same order. `next`: rows to fetch into the cache meanwhile.
enum class By { ROW, COLUMN };
template <int MR, int NV, By BY>
static __attribute__((noinline)) void block(const float* a, int64_t a_stride, const vf* b,
                                            int64_t b_v, int64_t K, vf* c, int64_t c_v, bool add,
                                            const float* next) {
  vf sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) sum[i][v] = add ? c[v * c_v + i] : vf{};
  // Four rows each have a pointer, so that every address is one of these plus 0 to 3 strides.
  const float* quads[3] = {a, a + 4 * a_stride, a + 8 * a_stride};
  for (int64_t k = 0; k < K;) {
    const int64_t end = k + 16 < K ? k + 16 : K;
    if (BY == By::ROW && next)  // a cache line of each row
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) __builtin_prefetch(next + i * a_stride + k);
    for (; k < end; k++) {
      vf factor[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) factor[v] = b[v * b_v + k];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const float s = BY == By::ROW ? quads[i / 4][i % 4 * a_stride] : a[i];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[i][v] += s * factor[v];
      }
      if (BY == By::ROW)
        quads[0]++, quads[1]++, quads[2]++;
      else
        a += a_stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) c[v * c_v + i] = sum[i][v];
}
static_assert(ROWS <= 12);

template <By BY, int MR = ROWS>
INLINE void multiply(int rows, int vectors, const float* a, int64_t a_stride, const vf* b,
                     int64_t b_v, int64_t K, vf* c, int64_t c_v, bool add = false,
                     const float* next = nullptr) {
  if constexpr (MR > 1)
    if (rows < MR)
      return multiply<BY, MR - 1>(rows, vectors, a, a_stride, b, b_v, K, c, c_v, add, next);
  if (vectors == 1)
    block<MR, 1, BY>(a, a_stride, b, b_v, K, c, c_v, add, next);
  else
    block<MR, PAIR, BY>(a, a_stride, b, b_v, K, c, c_v, add, next);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger_of(int64_t a, int64_t b) { return a < b ? b : a; }
static constexpr int64_t CACHED_FLOATS = 8192;  // 32 KB of the first-level cache
static constexpr int64_t FAR_FLOATS = 1 << 17;  // 512 KB do not stay in the second-level cache

// A thread's share of its team's panels, of the two slices of every layer, and of a slice's rows. A
// thread that has whole slices needs nothing of other threads but their sums over other slices.
struct Share {
  int64_t first_panel, last_panel;
  int64_t first_slice, last_slice;
  int64_t part, parts;  // which part of the blocks of rows, and of how many

  bool has_all_slices() const { return last_slice - first_slice == SLICES; }
  // Shares of products without slices: this thread takes all rows of its panels, or the threads of
  // its panels split the rows.
  Share of_all_rows() const { return {first_panel, last_panel, 0, SLICES, 0, 1}; }
  Share without_slices() const {
    if (has_all_slices()) return *this;
    return {first_panel, last_panel, 0, SLICES, first_slice * parts + part, SLICES * parts};
  }
};

// Multiplies w [M][K], whose rows are w_stride apart, by in [panel][K], whose panels are in_v vectors
// apart, for a thread's share. Calls finish(panel, row, rows, sums) for each block of rows.
template <class Finish>
INLINE void product(const Share& mine, const float* w, int64_t w_stride, int64_t M, int64_t K,
                    const vf* in, int64_t in_v, Finish finish) {
  const int64_t blocks = ceil_div(M, ROWS);
  const int64_t first = block_start(blocks, mine.parts, mine.part);
  const int64_t last = block_start(blocks, mine.parts, mine.part + 1);
  // Take as many panels at a time as stay in the first-level cache while all rows pass; or all
  // panels, if the rows come from so far that they should be read once only.
  const bool far = M * K > FAR_FLOATS;
  const int64_t cached = larger_of(PAIR, CACHED_FLOATS / larger_of(1, K * WIDTH) / PAIR * PAIR);
  const int64_t group = far ? larger_of(PAIR, mine.last_panel - mine.first_panel) : cached;
  for (int64_t g = mine.first_panel; g < mine.last_panel; g += group) {
    const int64_t end = least(g + group, mine.last_panel);
    for (int64_t n = first; n < last; n++) {
      const int64_t row = block_start(M, blocks, n), below = block_start(M, blocks, n + 1);
      const int64_t rows = below - row;
      for (int64_t q = g; q < end; q += PAIR) {
        vf sums[PAIR * ROWS];
        const int64_t vectors = least(PAIR, end - q);
        const bool fetch = far && q == g && n + 1 < last;
        multiply<By::ROW>(rows, vectors, w + row * w_stride, w_stride, in + q * in_v, in_v, K,
                           sums, ROWS, false, fetch ? w + below * w_stride : nullptr);
        for (int64_t v = 0; v < vectors; v++) finish(q + v, row, rows, sums + v * ROWS);
      }
    }
  }
}
