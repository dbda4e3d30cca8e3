// LayerNorm and RMSNorm with adaLN modulation, with or without a gated residual before them, and
// their backward, as kernels/adaln.py defines them. Features are in the lanes; lanes past the last
// feature are zero.

INLINE vf first_lanes(vf v, int64_t n) {
  for (int64_t i = n; i < WIDTH; i++) v[i] = 0.f;
  return v;
}
template <int N> struct Vector {
  typedef float of __attribute__((vector_size(4 * N)));
};
template <int N> INLINE float sum_of_lanes(typename Vector<N>::of v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Vector<N / 2>::of half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of_lanes<N / 2>(half[0] + half[1]);
  }
}

// 1 + scale, times the weight where there is one.
INLINE vf factor_at(const float* scale, const float* weight, int64_t k, int64_t n) {
  const vf factor = 1.f + load(scale + k, n);
  return weight ? factor * load(weight + k, n) : factor;
}

static void adaln(const AdaLN& p, int64_t first_row, int64_t last_row) {
  const int64_t D = p.hidden, vectors = ceil_div(D, WIDTH);
  for (int64_t row = first_row; row < last_row; row++) {
    const int64_t image = row / p.tokens;
    const float* x = p.x + row * D;
    const float* y = p.gate ? p.y + row * D : nullptr;
    const float* gate = p.gate ? p.gate + image * p.gate_stride : nullptr;
    const float* scale = p.scale + image * p.scale_stride;
    const float* shift = p.shift ? p.shift + image * p.shift_stride : nullptr;
    float *r = p.gate ? p.r + row * D : nullptr, *h = p.h + row * D;
    const float* from = p.gate ? r : x;
    auto residual = [&](int64_t i) INLINED {
      const int64_t k = i * WIDTH, n = D - k;
      vf v = load(x + k, n);
      if (gate) {
        v += load(gate + k, n) * load(y + k, n);
        store(r + k, v, n);
      }
      return v;
    };
    float mean = 0.f, square;
    if (p.weight) {
      square = sum_of_lanes<WIDTH>(sum_of(vectors, [&](int64_t i) INLINED {
        const vf v = residual(i);
        return v * v;
      })) / D;
    } else {
      p.mean[row] = mean = sum_of_lanes<WIDTH>(sum_of(vectors, residual)) / D;
      square = sum_of_lanes<WIDTH>(sum_of(vectors, [&](int64_t i) INLINED {
        const int64_t k = i * WIDTH, n = D - k;
        const vf d = first_lanes(load(from + k, n) - mean, n);
        return d * d;
      })) / D;
    }
    const float rstd = p.rstd[row] = 1.f / __builtin_sqrtf(square + p.eps);
    for (int64_t k = 0; k < D; k += WIDTH) {
      const int64_t n = D - k;
      const vf normed = (load(from + k, n) - mean) * rstd;
      const vf scaled = normed * factor_at(scale, p.weight, k, n);
      store(h + k, shift ? scaled + load(shift + k, n) : scaled, n);
    }
  }
}

// Computes the gradients of a chunk of an image's tokens, and its part of those of the modulation.
static void adaln_backward(const AdaLNBackward& p, int64_t chunk) {
  const int64_t D = p.hidden, chunks = ceil_div(p.tokens, p.chunk_tokens), image = chunk / chunks;
  const int64_t first = chunk % chunks * p.chunk_tokens;
  const int64_t last = least(first + p.chunk_tokens, p.tokens);
  const float* scale = p.scale + image * p.scale_stride;
  const float* gate = p.gate ? p.gate + image * p.gate_stride : nullptr;
  float *g = p.partial + chunk * 3 * D, *dshift = g + D, *dgate = dshift + D;
  for (int64_t i = 0; i < 3 * D; i++) g[i] = 0.f;
  for (int64_t row = image * p.tokens + first; row < image * p.tokens + last; row++) {
    const int64_t at = row * D;
    const float mean = p.weight ? 0.f : p.mean[row], rstd = p.rstd[row];
    auto normed = [&](int64_t k, int64_t n) INLINED {
      return (load(p.r + at + k, n) - mean) * rstd;
    };
    auto dn = [&](int64_t k, int64_t n) INLINED {
      return load(p.dh + at + k, n) * factor_at(scale, p.weight, k, n);
    };
    vf sum = {}, sum_with_n = {};
    for (int64_t k = 0; k < D; k += WIDTH) {
      const vf d = dn(k, D - k);
      sum += d, sum_with_n += d * normed(k, D - k);
    }
    const float mean_dn = p.weight ? 0.f : sum_of_lanes<WIDTH>(sum) / D;
    const float mean_dn_n = sum_of_lanes<WIDTH>(sum_with_n) / D;
    for (int64_t k = 0; k < D; k += WIDTH) {
      const int64_t n = D - k;
      const vf dh = load(p.dh + at + k, n), of_row = normed(k, n);
      vf dx = rstd * (dn(k, n) - mean_dn - of_row * mean_dn_n);
      if (p.dr) dx += load(p.dr + at + k, n);
      store(p.dx + at + k, dx, n);
      store(g + k, load(g + k, n) + dh * of_row, n);
      if (p.shifted) store(dshift + k, load(dshift + k, n) + dh, n);
      if (!gate) continue;
      store(p.dy + at + k, dx * load(gate + k, n), n);
      store(dgate + k, load(dgate + k, n) + dx * load(p.y + at + k, n), n);
    }
  }
}
