// A DiT's forward on a group of rows (an image each, or an image under one of two labels), by the
// threads of a team.

// What a team works in. Panel q belongs to row q / panels of the group.
struct Memory {
  vf *x, *qkv, *heads, *hidden, *in, *out;    // [panel][features of each]
  float *modulation, *state, *x0;             // [row][width], [image][padded elements]
  vf *normed, *scores;                        // a thread's own: [panel][hidden], [PAIR][tokens]
};

// Of f(i), i < n, in four chains, since an addition waits for the one before it.
template <class F> INLINE vf sum_of(int64_t n, F f) {
  vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) a += f(i), b += f(i + 1), c += f(i + 2), d += f(i + 3);
  for (; i < n; i++) a += f(i);
  return (a + b) + (c + d);
}

struct Network {
  const Problem& p;
  const Weights& w;
  Team team;
  Memory at;
  int64_t panels;  // of a row
  Share mine;
  int64_t columns;  // how many shares of the panels there are
  int64_t rows;

  const float* modulation(int64_t panel, int64_t part) const {
    return at.modulation + panel / panels * p.width() + part * p.hidden;
  }

  // Where threads share the rows of a product, they need each other's; where they share panels
  // only, none of another's before attention.
  void wait_for_rows() const {
    if (mine.parts > 1) team.wait();
  }

  // at.normed of this thread's panels. Modulation holds 1 + scale.
  void layer_norm(int64_t part, float eps) const {
    const int64_t D = p.hidden;
    for (int64_t q = mine.first_panel; q < mine.last_panel; q++) {
      const vf* x = at.x + q * D;
      vf* out = at.normed + q * D;
      const float *scale = modulation(q, part), *shift = modulation(q, part + 1);
      const vf mean = sum_of(D, [&](int64_t i) INLINED { return x[i]; }) / (float)D;
      const vf variance = sum_of(D, [&](int64_t i) INLINED {
        const vf d = x[i] - mean;
        return d * d;
      }) / (float)D;
      const vf inverse = 1.f / square_root(variance + eps);
      for (int64_t i = 0; i < D; i++) out[i] = (x[i] - mean) * inverse * scale[i] + shift[i];
    }
  }

  // x += gate * (w in + bias)
  void add_gated(const float* weight, const float* bias, int64_t K, const vf* in,
                 int64_t part) const {
    product(mine, weight, p.hidden, K, in,
            [&](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
      vf* x = at.x + q * p.hidden + row;
      const float *gate = modulation(q, part) + row, *b = bias + row;
      for (int64_t i = 0; i < n; i++) x[i] += gate[i] * (sums[i] + b[i]);
    });
  }

  // at.heads of one head, for one or two panels of queries from panel `query` on.
  void attend(int64_t head, int64_t query, int64_t vectors) const {
    const int64_t D = p.hidden, d = D / p.heads, N = p.tokens;
    const int64_t first = query / panels * panels, lanes = panels * WIDTH;
    const vf* q = at.qkv + query * 3 * D + head * 3 * d;
    for (int64_t key = 0; key < panels; key++) {
      const float* k = (const float*)(q + (first + key - query) * 3 * D + d);
      const int64_t keys = least(WIDTH, N - key * WIDTH), blocks = ceil_div(keys, ROWS);
      for (int64_t n = 0; n < blocks; n++) {
        const int64_t j = block_start(keys, blocks, n), m = block_start(keys, blocks, n + 1) - j;
        multiply<1>(m, vectors, k + j, WIDTH, q, 3 * D, d, at.scores + key * WIDTH + j, lanes);
      }
    }
    vf inverse[PAIR];
    for (int64_t v = 0; v < vectors; v++) {
      vf* s = at.scores + v * lanes;
      vf most = s[0], total = {};
      for (int64_t j = 1; j < N; j++) most = larger(most, s[j]);
      for (int64_t j = 0; j < N; j++) total += s[j] = exponential(s[j] - most);
      inverse[v] = 1.f / total;
    }
    vf* out = at.heads + query * D + head * d;
    for (int64_t key = 0; key < panels; key++) {
      const float* value = (const float*)(q + (first + key - query) * 3 * D + 2 * d);
      const int64_t keys = least(WIDTH, N - key * WIDTH), blocks = ceil_div(d, ROWS);
      for (int64_t n = 0; n < blocks; n++) {
        const int64_t i = block_start(d, blocks, n), m = block_start(d, blocks, n + 1) - i;
        multiply<WIDTH>(m, vectors, value + i * WIDTH, 1, at.scores + key * WIDTH, lanes, keys,
                        out + i, D, key > 0);
      }
    }
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t i = 0; i < d; i++) out[v * D + i] *= inverse[v];
  }

  // Queries, keys and values of this thread's panels and heads, then their attention: where threads
  // share the heads of a row they need nothing of each other.
  void attention(const Layer& l) const {
    const int64_t D = p.hidden, d = D / p.heads;
    const int64_t first = block_start(p.heads, mine.parts, mine.part);
    const int64_t last = block_start(p.heads, mine.parts, mine.part + 1);
    const Share all_rows{mine.first_panel, mine.last_panel, 0, 1};
    const float scale = 1.f / __builtin_sqrtf((float)d);
    for (int64_t h = first; h < last; h++) {
      const float* weight = l.qkv + h * 3 * d * D;
      product(all_rows, weight, 3 * d, D, at.normed,
              [&](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
        vf* out = at.qkv + q * 3 * D + h * 3 * d + row;
        const float* b = l.qkv_bias + h * 3 * d + row;
        for (int64_t i = 0; i < n; i++) out[i] = (sums[i] + b[i]) * (row + i < d ? scale : 1.f);
      });
    }
    if (columns > 1) team.wait();  // keys and values of all of a row's panels
    for (int64_t h = first; h < last; h++)
      for (int64_t q = mine.first_panel, n; q < mine.last_panel; q += n) {
        n = least(least(PAIR, mine.last_panel - q), panels - q % panels);
        attend(h, q, n);
      }
    team.wait();
  }

  void layer(const Layer& l, int64_t first_part) const {
    const int64_t D = p.hidden, M = 4 * D;
    layer_norm(first_part, p.eps);
    attention(l);
    add_gated(l.proj, l.proj_bias, D, at.heads, first_part + 2);
    wait_for_rows();
    layer_norm(first_part + 3, p.mlp_eps);
    auto into_hidden = [&](auto gelu) INLINED {
      product(mine, l.fc1, M, D, at.normed,
              [&](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
        vf* out = at.hidden + q * M + row;
        const float* b = l.fc1_bias + row;
        for (int64_t i = 0; i < n; i++) out[i] = gelu(sums[i] + b[i]);
      });
    };
    if (p.tanh_gelu)
      into_hidden([](vf x) INLINED { return gelu_tanh(x); });
    else
      into_hidden([](vf x) INLINED { return gelu_erf(x); });
    wait_for_rows();
    add_gated(l.fc2, l.fc2_bias, M, at.hidden, first_part + 5);
    wait_for_rows();
  }

  // at.out of at.in, which has a panel for each panel of the group's images; `images` of them.
  void forward(int64_t images) const {
    const int64_t D = p.hidden;
    for (int64_t row = 0; row < rows; row += images) {  // the same tokens for every label
      Share share = mine;
      share.first_panel = larger_of(mine.first_panel, row * panels);
      share.last_panel = least(mine.last_panel, (row + images) * panels);
      const vf* in = at.in - row * panels * p.features;
      product(share, w.embed, D, p.features, in,
              [&](int64_t q, int64_t r, int64_t n, const vf* sums) INLINED {
        vf* x = at.x + q * D + r;
        const vf* position = (const vf*)w.position + q % panels * D + r;
        for (int64_t i = 0; i < n; i++) x[i] = sums[i] + position[i];
      });
    }
    wait_for_rows();
    for (int64_t i = 0; i < p.layers; i++) layer(w.layers[i], 6 * i);
    layer_norm(6 * p.layers, p.eps);
    product(mine, w.final, p.out_features, D, at.normed,
            [&](int64_t q, int64_t r, int64_t n, const vf* sums) INLINED {
      vf* out = at.out + q * p.out_features + r;
      for (int64_t i = 0; i < n; i++) out[i] = sums[i] + w.final_bias[r + i];
    });
    team.wait();
  }
};
