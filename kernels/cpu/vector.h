// Vectors of WIDTH floats, and the functions of them that a DiT needs. The file is included once
// for each instruction set, inside a namespace of its own. NaN stays NaN.

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t vu64 __attribute__((vector_size(8 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf at_least(vf x, float low) { return x < low ? splat(low) : x; }
INLINE vf at_most(vf x, float high) { return x > high ? splat(high) : x; }
INLINE vf larger(vf x, vf y) { return x < y ? y : x; }
INLINE vf square_root(vf x) {
  for (int i = 0; i < WIDTH; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// The first n floats at p, and zeros.
INLINE vf load(const float* p, int64_t n) {
  vf v = {};
  if (n >= WIDTH)
    __builtin_memcpy(&v, p, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}
INLINE void store(float* p, vf v, int64_t n) {
  if (n >= WIDTH)
    __builtin_memcpy(p, &v, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
}

// Exchanges the lanes of a whose number has the bit STEP with those of b whose number has not.
template <int STEP, int... LANE>
INLINE void exchange(vf& a, vf& b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  const vf first = __builtin_shufflevector(a, b, (LANE & STEP ? WIDTH + LANE - STEP : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & STEP ? WIDTH + LANE : LANE + STEP)...);
#else
  const vf first = __builtin_shuffle(a, b, vi{(LANE & STEP ? WIDTH + LANE - STEP : LANE)...});
  b = __builtin_shuffle(a, b, vi{(LANE & STEP ? WIDTH + LANE : LANE + STEP)...});
#endif
  a = first;
}
// Transposes WIDTH vectors.
template <int STEP = 1> INLINE void transpose(vf* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++)
    if (!(i & STEP))
      exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, WIDTH>());
  if constexpr (2 * STEP < WIDTH) transpose<2 * STEP>(rows);
}

// Rounds x, |x| < 2^22, to the nearest integer n: adding 1.5 * 2^23 leaves no bits for a fraction.
INLINE vf nearest(vf x, vi* n) {
  const vf magic = splat(12582912.f), y = x + magic;
  *n = (vi)y - (vi)magic;
  return y - magic;
}

// Cephes expf: x = n ln 2 + r, with ln 2 in two parts. It underflows to 1.6e-38 instead of to 0.
INLINE vf exponential(vf of) {
  const vf x = at_most(at_least(of, -87.f), 88.72f);
  vi n;
  const vf q = nearest(x * 1.44269504f, &n);
  vf r = x - q * 0.693359375f;
  r = r + q * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const vf y = (vf)((vi)p + (n << 23));
  return of <= 88.72f ? y : of + __builtin_inff();  // inf on overflow, NaN for NaN
}

// Cephes logf for normal x > 0: x = 2^e (1 + f), with 1 + f from sqrt(1/2) to sqrt(2).
INLINE vf logarithm(vf x) {
  const vi bits = (vi)x, e = (bits - 0x3f3504f3) >> 23;
  const vf f = (vf)(bits - (e << 23)) - 1.f, z = f * f, n = __builtin_convertvector(e, vf);
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf y = f * z * p + n * -2.12194440e-4f - 0.5f * z;
  return f + y + n * 0.693359375f;
}

// sin(pi v) and cos(pi v) for |v| <= 1: v = turn / 2 + r exactly, |r| <= 1/4; then Taylor series.
INLINE void sine_cosine_pi(vf v, vf* sine, vf* cosine) {
  vi turn;
  const vf r = v - 0.5f * nearest(v + v, &turn), s = r * r;
  vf a = s * 0.082145887f - 0.59926453f;
  a = a * s + 2.5501640f;
  a = a * s - 5.1677128f;
  a = r * (a * s + 3.14159265f);
  vf b = s * -0.025806891f + 0.23533063f;
  b = b * s - 1.3352628f;
  b = b * s + 4.0587121f;
  b = b * s - 4.9348022f;
  b = b * s + 1.f;
  const vi odd = (turn & 1) != 0;
  const vf of_sine = odd ? b : a, of_cosine = odd ? a : b;
  *sine = (vf)((vi)of_sine ^ ((turn & 2) << 30));
  *cosine = (vf)((vi)of_cosine ^ (((turn + 1) & 2) << 30));
}

#if WIDTH == 16
// The exact GELU, max(x, 0) - |x| Phi(-|x|). Phi(-t) is a polynomial of degree 4 in each 32nd of
// [0, 5.5), from Chebyshev's nodes, and 0 beyond; two registers hold a coefficient of all of them.
static const float PHI[5][32] = {
    {5.00000000e-1f, 4.31767911e-1f, 3.65517139e-1f, 3.03058177e-1f, 2.45883852e-1f,
     1.95066825e-1f, 1.51211798e-1f, 1.14463978e-1f, 8.45657215e-2f, 6.09466955e-2f,
     4.28299531e-2f, 2.93372106e-2f, 1.95800792e-2f, 1.27292043e-2f, 8.05861503e-3f,
     4.96690255e-3f, 2.97976285e-3f, 1.73965539e-3f, 9.88219515e-4f, 5.46113704e-4f,
     2.93555204e-4f, 1.53467699e-4f, 7.80213595e-5f, 3.85685089e-5f, 1.85367080e-5f,
     8.66112259e-6f, 3.93389109e-6f, 1.73677961e-6f, 7.45266618e-7f, 3.10810691e-7f,
     1.25971567e-7f, 4.96156041e-8f},
    {-3.98941457e-1f, -3.93092275e-1f, -3.76054227e-1f, -3.49282652e-1f, -3.14973563e-1f,
     -2.75766641e-1f, -2.34412014e-1f, -1.93458796e-1f, -1.55012786e-1f, -1.20591566e-1f,
     -9.10828635e-2f, -6.67923540e-2f, -4.75539975e-2f, -3.28713469e-2f, -2.20606383e-2f,
     -1.43743670e-2f, -9.09346435e-3f, -5.58521552e-3f, -3.33058392e-3f, -1.92828232e-3f,
     -1.08390348e-3f, -5.91534714e-4f, -3.13429191e-4f, -1.61238291e-4f, -8.05316013e-5f,
     -3.90511559e-5f, -1.83852990e-5f, -8.40382017e-6f, -3.72951126e-6f, -1.60692719e-6f,
     -6.72216913e-7f, -2.73018202e-7f},
    {-3.90422865e-5f, 3.37474234e-2f, 6.46100715e-2f, 9.00375769e-2f, 1.08273119e-1f,
     1.18505515e-1f, 1.20888539e-1f, 1.16401210e-1f, 1.06594913e-1f, 9.32905972e-2f,
     7.82899708e-2f, 6.31497055e-2f, 4.90449108e-2f, 3.67241129e-2f, 2.65394654e-2f,
     1.85255948e-2f, 1.24990763e-2f, 8.15537293e-3f, 5.14830276e-3f, 3.14558321e-3f,
     1.86076993e-3f, 1.06599682e-3f, 5.91550488e-4f, 3.18044447e-4f, 1.65699123e-4f,
     8.36673280e-5f, 4.09500026e-5f, 1.94297227e-5f, 8.93800279e-6f, 3.98673501e-6f,
     1.72438672e-6f, 7.23312837e-7f},
    {6.71276301e-2f, 6.41386881e-2f, 5.56733236e-2f, 4.29389328e-2f, 2.76753865e-2f,
     1.18259871e-2f, -2.80288374e-3f, -1.48181627e-2f, -2.34012250e-2f, -2.83368565e-2f,
     -2.99270116e-2f, -2.88298614e-2f, -2.58732475e-2f, -2.18860507e-2f, -1.75759569e-2f,
     -1.34641118e-2f, -9.87173058e-3f, -6.94421772e-3f, -4.69532143e-3f, -3.05588660e-3f,
     -1.91658735e-3f, -1.15940359e-3f, -6.76985655e-4f, -3.81797057e-4f, -2.08075449e-4f,
     -1.09631961e-4f, -5.58659449e-5f, -2.75419152e-5f, -1.31402330e-5f, -6.06853200e-6f,
     -2.71351837e-6f, -1.17499599e-6f},
    {-4.25267499e-3f, -1.21424794e-2f, -1.83091722e-2f, -2.19842046e-2f, -2.28685997e-2f,
     -2.11509690e-2f, -1.74179897e-2f, -1.24907317e-2f, -7.23582739e-3f, -2.39975355e-3f,
     1.49968592e-3f, 4.21183323e-3f, 5.72907832e-3f, 6.22133259e-3f, 5.95474290e-3f,
     5.21683088e-3f, 4.26195841e-3f, 3.28177121e-3f, 2.39790673e-3f, 1.67017418e-3f,
     1.11251755e-3f, 7.10415130e-4f, 4.35688969e-4f, 2.56996049e-4f, 1.45970116e-4f,
     7.99095287e-5f, 4.21958321e-5f, 2.15060900e-5f, 1.05856097e-5f, 5.03430829e-6f,
     2.31426111e-6f, 1.02870183e-6f},
};
INLINE vf gelu_erf(vf x) {
  const float piece = 5.5f / 32;  // exactly
  const vf t = at_most((vf)((vi)x & 0x7fffffff), 5.5f);
  // The number of t's piece, in the last bits as in `nearest`. The factor is a little less than
  // 1 / piece, so that no t below 5.5 is rounded up to piece 32.
  const vf shifted = (t * 5.81818f - 0.5f) + 12582912.f;
  const vf d = t - (shifted - 12582912.f) * piece;
  auto coefficient = [&](int i) INLINED {
    const __m512 low = _mm512_loadu_ps(PHI[i]), high = _mm512_loadu_ps(PHI[i] + 16);
    return (vf)_mm512_permutex2var_ps(low, (__m512i)shifted, high);
  };
  vf p = coefficient(4) * d + coefficient(3);
  p = p * d + coefficient(2);
  p = p * d + coefficient(1);
  p = p * d + coefficient(0);
  return at_least(x, 0.f) - (t < 5.5f ? t * p : vf{});
}
#else
// The exact GELU, x Phi(x). Phi(c) - 1/2 = c P(c^2) with c = x clamped to +-5.5, beyond which Phi
// is 0 or 1 in float32. P is in Chebyshev's variable and fitted for the least maximal error, 4e-8.
INLINE vf gelu_erf(vf x) {
  const vf c = at_least(at_most(x, 5.5f), -5.5f), w = c * c * (2.f / (5.5f * 5.5f)) - 1.f;
  vf p = w * 5.380677176e-04f + -1.368825440e-03f;
  p = p * w + 1.023878809e-03f;
  p = p * w - 1.229412621e-03f;
  p = p * w + 4.236333072e-03f;
  p = p * w - 7.674657274e-03f;
  p = p * w + 1.046865154e-02f;
  p = p * w - 1.467137318e-02f;
  p = p * w + 2.028797194e-02f;
  p = p * w - 2.611246705e-02f;
  p = p * w + 3.208174184e-02f;
  p = p * w - 3.878726810e-02f;
  p = p * w + 4.773699120e-02f;
  p = p * w - 6.417247653e-02f;
  p = p * w + 1.285519302e-01f;
  return x * (c * p + 0.5f);
}
#endif

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
INLINE vf gelu_tanh(vf x) {
  const vf minus_2u = x * (x * x * 0.044715f + 1.f) * -1.5957691216f;
  return x / (exponential(at_most(minus_2u, 87.f)) + 1.f);
}

INLINE vf silu(vf x) { return x / (exponential(at_most(-x, 87.f)) + 1.f); }

// Philox4x32-10 on WIDTH counters at a time.
INLINE void philox(vu c[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const vu64 a = __builtin_convertvector(c[0], vu64) * (uint64_t)0xD2511F53u;
    const vu64 b = __builtin_convertvector(c[2], vu64) * (uint64_t)0xCD9E8D57u;
    const vu high_a = __builtin_convertvector(a >> 32, vu), low_a = __builtin_convertvector(a, vu);
    const vu high_b = __builtin_convertvector(b >> 32, vu), low_b = __builtin_convertvector(b, vu);
    c[0] = high_b ^ c[1] ^ key0;
    c[1] = low_b;
    c[2] = high_a ^ c[3] ^ key1;
    c[3] = low_a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Writes the normals of the 4 * WIDTH elements from 4 * quad on, as fastdit/noise.py defines them.
static __attribute__((noinline)) void normals(uint64_t key, uint32_t step, uint32_t stream,
                                              uint32_t quad, float* out) {
  vu c[4] = {vu{} + quad, vu{} + step, vu{} + stream, vu{}};
  for (int i = 0; i < WIDTH; i++) c[0][i] += i;
  philox(c, (uint32_t)key, (uint32_t)(key >> 32));
  vf z[4];
  for (int i = 0; i < 4; i += 2) {
    const vf u = __builtin_convertvector(c[i], vf) * 0x1p-32f + 0x1p-33f;
    const vf v = __builtin_convertvector((vi)c[i + 1], vf) * 0x1p-31f;
    const vf radius = square_root(-2.f * logarithm(u));
    sine_cosine_pi(v, &z[i + 1], &z[i]);
    z[i] *= radius;
    z[i + 1] *= radius;
  }
  for (int i = 0; i < WIDTH; i++)
    for (int j = 0; j < 4; j++) out[4 * i + j] = z[j][i];
}
