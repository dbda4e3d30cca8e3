// A linear by itself, between rows of tokens as PyTorch has them.

// Lays rows of x, [rows][K], out in panels.
static void lay_out(const float* x, int64_t rows, int64_t K, operand* in) {
  for (int64_t start = 0; start < rows; start += WIDTH, in += K / FEATURES) {
    const float* from = x + start * K;
    const int64_t lanes = least(WIDTH, rows - start);
    for (int64_t k = 0; k < K; k += WIDTH) {
      vf block[WIDTH];
      for (int64_t i = 0; i < WIDTH; i++) block[i] = i < lanes ? load(from + i * K + k, K - k) : vf{};
      transpose(block);
      write_features(in + k / FEATURES, least(WIDTH, K - k), [&](int64_t i) INLINED {
        return block[i];
      });
    }
  }
}

// Writes N features of a panel's tokens to rows of y, which are `stride` floats apart.
template <int64_t N>
INLINE void write_tokens(float* y, int64_t stride, int64_t lanes, const vf* features) {
  if constexpr (N > WIDTH) {
    write_tokens<WIDTH>(y, stride, lanes, features);
    write_tokens<N - WIDTH>(y + WIDTH, stride, lanes, features + WIDTH);
  } else {
    vf block[WIDTH];
#pragma GCC unroll 16
    for (int64_t i = 0; i < WIDTH; i++) block[i] = i < N ? features[i] : vf{};
    transpose(block);
    if (lanes == WIDTH)
#pragma GCC unroll 16
      for (int64_t j = 0; j < WIDTH; j++) __builtin_memcpy(y + j * stride, &block[j], N * 4);
    else
      for (int64_t j = 0; j < lanes; j++) __builtin_memcpy(y + j * stride, &block[j], N * 4);
  }
}

template <class Activation>
INLINE void linear(const Linear& l, int64_t first_row, int64_t last_row, int64_t first_feature,
                   int64_t last_feature, const operand* in, Activation activation) {
  const int64_t K = l.in_features, panels = ceil_div(last_row - first_row, WIDTH);
  const bool far = (last_feature - first_feature) * K > FAR_FLOATS;
  const Share all{0, panels, 0, SLICES, 0, 1, far};
  const weight* w = (const weight*)l.weight + first_feature * K;
  product(all, w, K, last_feature - first_feature, K, in, K,
          [&](int64_t q, int64_t m, int64_t n, const vf* sums) INLINED {
    const int64_t start = first_row + q * WIDTH;
    m += first_feature;
    const int64_t lanes = least(WIDTH, last_row - start);
    float* y = l.y + start * l.out_features + m;
    auto result = [&](int64_t i) INLINED {
      return activation(sums[i] + (l.bias ? l.bias[m + i] : 0.f));
    };
    vf out[ROWS];
    if (n == ROWS) {  // as almost always
      for (int64_t i = 0; i < ROWS; i++) out[i] = result(i);
      return write_tokens<ROWS>(y, l.out_features, lanes, out);
    }
    for (int64_t i = 0; i < n; i++) out[i] = result(i);
    for (int64_t j = 0; j < lanes; j++)
      for (int64_t i = 0; i < n; i++) y[j * l.out_features + i] = out[i][j];
  });
}

// Computes some features of some rows of y.
static void linear(const Linear& l, int64_t first_row, int64_t last_row, int64_t first_feature,
                   int64_t last_feature, float* own) {
  operand* in = (operand*)own;
  lay_out(l.x + first_row * l.in_features, last_row - first_row, l.in_features, in);
  auto run = [&](auto activation) {
    linear(l, first_row, last_row, first_feature, last_feature, in, activation);
  };
  if (l.gelu == 1)
    run([](vf x) INLINED { return gelu_erf(x); });
  else if (l.gelu == 2)
    run([](vf x) INLINED { return gelu_tanh(x); });
  else
    run([](vf x) INLINED { return x; });
}
