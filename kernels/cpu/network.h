// A DiT's forward on a group of rows by the threads of a team. A row is an image or, with guidance,
// an image under one of its two labels.

// The memory that a team shares, and below it that of each thread. Panel q belongs to the group's
// row q / panels.
struct Memory {
  vf *qkv, *out;                   // [panel][features of each]
  operand *heads, *hidden;         // likewise
  vf* sums;                        // [attention or MLP][slice][panel][hidden]
  float *state, *x0;               // [image][padded elements]
  operand *in, *normed;            // of a thread: [panel][features]
  vf *x, *scores, *mixed;          // of a thread; scores: [PAIR][tokens], mixed: [PAIR][head dim]
  float* modulation;               // of a thread: [row][width]
};

// Sums f(i) over i < n in four chains, since an addition has to wait for the one before it.
template <class F> INLINE vf sum_of(int64_t n, F f) {
  vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) a += f(i), b += f(i + 1), c += f(i + 2), d += f(i + 3);
  for (; i < n; i++) a += f(i);
  return (a + b) + (c + d);
}

// The features of an MLP between its linears, as products take them: in bfloat16 an even number.
static int64_t mlp_features(const Problem& p) {
  return ceil_div(p.mlp_hidden, FEATURES) * FEATURES;
}

struct Network {
  const Problem& p;
  const Weights& w;
  Team& team;
  Memory at;
  int64_t panels;  // of a row
  int64_t all;     // panels of the group
  Share mine;
  int64_t columns;  // the number of shares of the panels

  const float* modulation(int64_t panel, int64_t part) const {
    return at.modulation + panel / panels * p.laid_width() + part * p.hidden;
  }

  // Writes at.normed of this thread's panels. Modulation has 1 + scale instead of scale, times the
  // weight of an RMSNorm.
  void norm(int64_t part, float eps) const {
    if (p.rms)
      norm<false>(part, eps);
    else
      norm<true>(part, eps);
  }

  template <bool CENTRED> void norm(int64_t part, float eps) const {
    const int64_t D = p.hidden;
    for (int64_t q = mine.first_panel; q < mine.last_panel; q++) {
      const vf* x = at.x + q * D;
      const float *scale = modulation(q, part), *shift = modulation(q, part + 1);
      vf mean;
      const vf inverse = 1.f / deviation<CENTRED>(x, D, eps, &mean);
      write_features(at.normed + q * D / FEATURES, D, [&](int64_t i) INLINED {
        return (x[i] - mean) * inverse * scale[i] + shift[i];
      });
    }
  }

  // The root of a variance, or unless CENTRED of a mean square, plus eps. Writes the mean, or 0.
  template <bool CENTRED>
  static INLINED vf deviation(const vf* x, int64_t n, float eps, vf* mean) {
    const vf m = CENTRED ? sum_of(n, [&](int64_t i) INLINED { return x[i]; }) / (float)n : vf{};
    *mean = m;
    const vf variance = sum_of(n, [&](int64_t i) INLINED {
      const vf d = x[i] - m;
      return d * d;
    }) / (float)n;
    return square_root(variance + eps);
  }

  // Norms and rotates the queries or keys of one head of a panel, multiplied by `scale`, where they
  // lie: x [head dim].
  void norm_and_rotate(vf* x, int64_t panel, const float* weight, const float* bias,
                       float scale) const {
    const int64_t d = p.hidden / p.heads;
    if (p.qk_norm == 1) {
      vf mean;
      const vf inverse = scale / deviation<true>(x, d, p.qk_norm_eps, &mean);
      for (int64_t i = 0; i < d; i++)
        x[i] = (x[i] - mean) * inverse * weight[i] + bias[i] * scale;
    } else if (p.qk_norm == 2) {
      vf zero;
      const vf inverse = scale / deviation<false>(x, d, p.qk_norm_eps, &zero);
      for (int64_t i = 0; i < d; i++) x[i] = x[i] * inverse * weight[i];
    }
    if (!p.rope) return;
    const vf *cosine = (const vf*)w.rope + panel % panels * d, *sine = cosine + d / 2;
    for (int64_t i = 0; i < d / 2; i++) {
      const vf even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * cosine[i] - odd * sine[i];
      x[2 * i + 1] = odd * cosine[i] + even * sine[i];
    }
  }

  // x += gate * (w in + bias). The first `cut` of in's K features are one slice, the others the
  // second. Threads that have one slice each exchange their sums, and all of them add both.
  void add_gated(int64_t use, const void* matrix, const float* bias, int64_t K, int64_t cut,
                 const operand* in, int64_t part) const {
    const int64_t D = p.hidden;
    const weight *w = (const weight*)matrix, *rest = w + cut;
    const operand* in_rest = in + cut / FEATURES;
    vf *first = at.sums + use * SLICES * all * D, *second = first + all * D;
    auto keep = [&](vf* to) INLINED {
      return [=](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
        for (int64_t i = 0; i < n; i++) to[q * D + row + i] = sums[i];
      };
    };
    auto add = [&](int64_t q, int64_t row, int64_t n, const vf* of_second) INLINED {
      vf* x = at.x + q * D + row;
      const vf* of_first = first + q * D + row;
      const float *gate = modulation(q, part) + row, *b = bias + row;
      for (int64_t i = 0; i < n; i++) x[i] += gate[i] * (of_first[i] + of_second[i] + b[i]);
    };
    if (mine.first_slice == 0) product(mine, w, K, D, cut, in, K, keep(first));
    if (mine.has_all_slices()) return product(mine, rest, K, D, K - cut, in_rest, K, add);
    if (mine.first_slice == 1) product(mine, rest, K, D, K - cut, in_rest, K, keep(second));
    team.wait();
    for (int64_t q = mine.first_panel; q < mine.last_panel; q++) add(q, 0, D, second + q * D);
  }

  // Writes at.heads of one head, for one or two panels of queries from panel `query` on.
  void attend(int64_t head, int64_t query, int64_t vectors) const {
    const int64_t D = p.hidden, d = D / p.heads, N = p.tokens;
    const int64_t first = query / panels * panels, lanes = panels * WIDTH;
    const vf* q = at.qkv + query * 3 * D + head * d;
    for (int64_t key = 0; key < panels; key++) {
      const float* k = (const float*)(q + (first + key - query) * 3 * D + D);
      const int64_t keys = least(WIDTH, N - key * WIDTH), blocks = ceil_div(keys, ROWS);
      for (int64_t n = 0; n < blocks; n++) {
        const int64_t j = block_start(keys, blocks, n), m = block_start(keys, blocks, n + 1) - j;
        multiply<By::COLUMN>(m, vectors, k + j, WIDTH, q, 3 * D, d, at.scores + key * WIDTH + j,
                              lanes);
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
    for (int64_t key = 0; key < panels; key++) {
      const float* value = (const float*)(q + (first + key - query) * 3 * D + 2 * D);
      const int64_t keys = least(WIDTH, N - key * WIDTH), blocks = ceil_div(d, ROWS);
      for (int64_t n = 0; n < blocks; n++) {
        const int64_t i = block_start(d, blocks, n), m = block_start(d, blocks, n + 1) - i;
        multiply<By::ROW>(m, vectors, value + i * WIDTH, WIDTH, at.scores + key * WIDTH, lanes,
                          keys, at.mixed + i, d, key > 0);
      }
    }
    for (int64_t v = 0; v < vectors; v++)
      write_features(at.heads + ((query + v) * D + head * d) / FEATURES, d, [&](int64_t i) INLINED {
        return at.mixed[v * d + i] * inverse[v];
      });
  }

  // Computes queries, keys and values of this thread's panels and heads, then their attention.
  // Threads that share the heads of a row do not need each other's results here.
  void attention(const Layer& l) const {
    const int64_t D = p.hidden, d = D / p.heads, start = slice_start(p.heads, mine.first_slice);
    const int64_t heads = slice_start(p.heads, mine.last_slice) - start;
    const int64_t first = start + block_start(heads, mine.parts, mine.part);
    const int64_t last = start + block_start(heads, mine.parts, mine.part + 1);
    const float scale = 1.f / __builtin_sqrtf((float)d);
    for (int64_t part = 0; part < 3; part++) {
      const int64_t row = part * D + first * d;
      const float factor = part == 0 && !p.qk_norm ? scale : 1.f;
      product(mine.of_all_rows(), (const weight*)l.qkv + row * D, D, (last - first) * d, D, at.normed, D,
              [&](int64_t q, int64_t m, int64_t n, const vf* sums) INLINED {
        vf* out = at.qkv + q * 3 * D + row + m;
        const float* b = l.qkv_bias + row + m;
        for (int64_t i = 0; i < n; i++) out[i] = (sums[i] + b[i]) * factor;
      });
    }
    if (p.qk_norm || p.rope)
      for (int64_t q = mine.first_panel; q < mine.last_panel; q++)
        for (int64_t h = first; h < last; h++) {
          vf *query = at.qkv + q * 3 * D + h * d, *key = query + D;
          norm_and_rotate(query, q, l.q_weight, l.q_bias, scale);
          norm_and_rotate(key, q, l.k_weight, l.k_bias, 1.f);
        }
    if (columns > 1) team.wait();  // for the keys and values of a row's other panels
    for (int64_t h = first; h < last; h++)
      for (int64_t q = mine.first_panel, n; q < mine.last_panel; q += n) {
        n = least(least(PAIR, mine.last_panel - q), panels - q % panels);
        attend(h, q, n);
      }
  }

  // The first of a slice's features of the MLP, an even one. The last slice ends with the features.
  int64_t mlp_start(int64_t slice) const {
    return least(p.mlp_hidden, 2 * slice_start(ceil_div(p.mlp_hidden, 2), slice));
  }

  // Writes at.hidden of a slice.
  template <class Gelu> void into_hidden(const Layer& l, int64_t slice, Gelu gelu) const {
    const int64_t D = p.hidden, M = mlp_features(p), start = mlp_start(slice);
    const weight* w = (const weight*)l.fc1 + start * D;
    product(mine, w, D, mlp_start(slice + 1) - start, D, at.normed, D,
            [&](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
      const float* b = l.fc1_bias + start + row;
      write_features(at.hidden + (q * M + start + row) / FEATURES, n, [&](int64_t i) INLINED {
        return gelu(sums[i] + b[i]);
      });
    });
  }

  // The same of a SwiGLU, whose two halves are computed together, so that at.hidden is written once.
  void into_gated_hidden(const Layer& l, int64_t slice) const {
    const int64_t D = p.hidden, M = mlp_features(p), start = mlp_start(slice);
    const weight* w = (const weight*)l.fc1 + start * D;
    products<2>(mine, {w, w + p.mlp_hidden * D}, D, mlp_start(slice + 1) - start, D, at.normed, D,
                [&](int64_t q, int64_t row, int64_t n, const vf* sums) INLINED {
      const float *a = l.fc1_bias + start + row, *b = a + p.mlp_hidden;
      write_features(at.hidden + (q * M + start + row) / FEATURES, n, [&](int64_t i) INLINED {
        return silu(sums[i] + a[i]) * (sums[ROWS + i] + b[i]);
      });
    });
  }

  void layer(const Layer& l, int64_t first_part) const {
    const int64_t D = p.hidden;
    norm(first_part, p.eps);
    attention(l);
    // Wait for other threads' heads. If add_gated does not wait, other threads may also still read
    // this thread's keys, which the next layer overwrites.
    if (mine.parts > 1 || (columns > 1 && mine.has_all_slices())) team.wait();
    const int64_t cut = slice_start(p.heads, 1) * (D / p.heads);
    add_gated(0, l.proj, l.proj_bias, D, cut, at.heads, first_part + 2);
    norm(first_part + 3, p.mlp_eps);
    for (int64_t s = mine.first_slice; s < mine.last_slice; s++)
      if (p.swiglu)
        into_gated_hidden(l, s);
      else if (p.tanh_gelu)
        into_hidden(l, s, [](vf x) INLINED { return gelu_tanh(x); });
      else
        into_hidden(l, s, [](vf x) INLINED { return gelu_erf(x); });
    if (mine.parts > 1) team.wait();
    add_gated(1, l.fc2, l.fc2_bias, mlp_features(p), mlp_start(1), at.hidden, first_part + 5);
  }

  // Computes at.out from at.in. Each thread has its own x.
  void forward() const {
    const int64_t D = p.hidden;
    product(mine.of_all_rows(), (const weight*)w.embed, p.features, D, p.features, at.in, p.features,
            [&](int64_t q, int64_t r, int64_t n, const vf* sums) INLINED {
      vf* x = at.x + q * D + r;
      const vf* position = (const vf*)w.position + q % panels * D + r;
      for (int64_t i = 0; i < n; i++) x[i] = sums[i] + position[i];
    });
    for (int64_t i = 0; i < p.layers; i++) layer(w.layers[i], 6 * i);
    norm(6 * p.layers, p.eps);
    product(mine.without_slices(), (const weight*)w.final, D, p.out_features, D, at.normed, D,
            [&](int64_t q, int64_t r, int64_t n, const vf* sums) INLINED {
      vf* out = at.out + q * p.out_features + r;
      for (int64_t i = 0; i < n; i++) out[i] = sums[i] + w.final_bias[r + i];
    });
    team.wait();
  }
};
