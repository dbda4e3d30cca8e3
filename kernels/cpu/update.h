// Guidance, a solver's step and its noise, as fastdit.reference.sampler_update defines them.

// The elements of an image are updated in chunks, as many as one call of `normals` makes.
static constexpr int64_t CHUNK = 4 * WIDTH;

struct Chunk {
  alignas(64) float x[CHUNK], x0[CHUNK];  // x0: the prediction of the step before
  alignas(64) float eps[CHUNK], range[CHUNK], noise[CHUNK];
};

// Replaces x and x0 by those of the next step; c is a row of coefficients.
INLINE void solve(const float* c, bool noisy, bool learned, Chunk& at) {
  for (int64_t i = 0; i < CHUNK; i += WIDTH) {
    vf *x = (vf*)(at.x + i), *x0 = (vf*)(at.x0 + i);
    const vf eps = *(vf*)(at.eps + i), range = *(vf*)(at.range + i);
    const float limit = c[column::x0_limit];
    const vf predicted = c[column::x0_x] * *x + c[column::x0_eps] * eps;
    const vf now = at_least(at_most(predicted, limit), -limit);
    vf next = c[column::x] * *x + c[column::eps] * eps + c[column::x0] * now;
    next += c[column::x0_prev] * *x0;
    if (noisy) {
      vf sigma = splat(c[column::sigma]);
      if (learned) {
        const float low = c[column::log_sigma_low], high = c[column::log_sigma_high];
        sigma = exponential(low + (range + 1.f) * 0.5f * (high - low));
      }
      next += sigma * *(vf*)(at.noise + i);
    }
    *x = next;
    *x0 = now;
  }
}

// Updates elements e to e + CHUNK of an image, for states in any layout.
static void update(const Update& u, int64_t image, int64_t e) {
  Chunk at = {};
  const int64_t E = u.elements, count = least(CHUNK, E - e), group = u.channels * u.space;
  const int64_t width = u.learned ? 2 * E : E;
  const float *out = u.model_out + image * width, *null_out = out + u.images * width;
  for (int64_t i = 0; i < count; i++) {
    const int64_t place = u.learned ? e + i + (e + i) / group * group : e + i;
    at.x[i] = u.x[image * E + e + i];
    if (u.x0_prev) at.x0[i] = u.x0_prev[image * E + e + i];
    if (u.noise) at.noise[i] = u.noise[image * E + e + i];
    at.eps[i] = out[place];
    if (u.learned) at.range[i] = out[place + group];
    if (u.guided && (e + i) / u.space % u.channels < u.guided)
      at.eps[i] = null_out[place] + u.scale * (out[place] - null_out[place]);
  }
  const bool noisy = (u.seeds || u.noise) && u.coefficients[column::sigma] != 0.f;
  if (noisy && u.seeds)
    normals(u.seeds[2 * image], u.step + 1, u.seeds[2 * image + 1], e / 4, at.noise);
  solve(u.coefficients, noisy, u.learned, at);
  for (int64_t i = 0; i < count; i++) {
    u.x_next[image * E + e + i] = at.x[i];
    u.x0[image * E + e + i] = at.x0[i];
  }
}
