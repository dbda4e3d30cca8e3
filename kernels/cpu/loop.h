// The sampling loop of a group of images, which a team of threads takes through it in lockstep.

struct Loop : Network {
  int64_t first_image, images, padded;  // padded: p.padded(WIDTH)

  // Calls f(i) for every i below total, spread over the team's threads.
  template <class F> void share_out(int64_t total, F f) const {
    const int64_t last = block_start(total, team.size, team.id + 1);
    for (int64_t i = block_start(total, team.size, team.id); i < last; i++) f(i);
  }

  void load() const {
    share_out(images, [&](int64_t g) {
      const int64_t E = p.elements();
      for (int64_t e = 0; e < padded; e++) {
        at.state[g * padded + e] = e < E ? p.x[(first_image + g) * E + e] : 0.f;
        at.x0[g * padded + e] = e < E ? p.x0[(first_image + g) * E + e] : 0.f;
      }
    });
  }

  void store() const {
    share_out(images, [&](int64_t g) {
      const int64_t E = p.elements();
      for (int64_t e = 0; e < E; e++) {
        p.x[(first_image + g) * E + e] = at.state[g * padded + e];
        p.x0[(first_image + g) * E + e] = at.x0[g * padded + e];
      }
    });
  }

  // The weight of the norm that a part of modulation scales, or null.
  const float* norm_weight(int64_t part) const {
    if (part == 6 * p.layers) return w.final_norm;
    const Layer& l = w.layers[part / 6];
    return part % 6 ? l.norm2 : l.norm1;
  }

  // Writes at.modulation of this thread's rows: 1 + scale instead of scale, times the norm's weight
  // where there is one, and zeros where the model has no shift.
  void modulate(int64_t step) const {
    const int64_t D = p.hidden, parts = 6 * p.layers + 2;
    for (int64_t r = mine.first_panel / panels; r < ceil_div(mine.last_panel, panels); r++) {
      const int64_t label = p.rows[r / images * p.images + first_image + r % images];
      const int64_t step_row = step * p.step_rows + (p.by_label ? 0 : label);
      const float* by_step = p.by_step + step_row * p.width();
      const float* by_label = p.by_label ? p.by_label + label * p.width() : nullptr;
      float* out = at.modulation + r * p.laid_width();
      for (int64_t part = 0; part < parts; part++, out += D) {
        if (part % 3 == 1 && part < 6 * p.layers && p.block_parts == 4) {
          for (int64_t j = 0; j < D; j++) out[j] = 0.f;
          continue;
        }
        const float one = part % 3 == 0 ? 1.f : 0.f;  // scale
        for (int64_t j = 0; j < D; j++)
          out[j] = one + (by_label ? by_step[j] + by_label[j] : by_step[j]);
        if (const float* weight = part % 3 == 0 ? norm_weight(part) : nullptr)
          for (int64_t j = 0; j < D; j++) out[j] *= weight[j];
        by_step += D;
        if (by_label) by_label += D;
      }
    }
  }

  // Writes at.in of this thread's panels, with the same tokens for every label.
  void read_tokens() const {
    const int64_t F = p.features;
    for (int64_t q = mine.first_panel; q < mine.last_panel; q++) {
      const int64_t image = q / panels % images, start = q % panels * WIDTH;
      const float* from = at.state + image * padded + start * F;
      const int64_t tokens = least(WIDTH, p.tokens - start);
      write_features(at.in + q * F / FEATURES, F, [&](int64_t f) INLINED {
        vf v = {};
        for (int64_t i = 0; i < tokens; i++) v[i] = from[i * F + f];
        return v;
      });
    }
  }

  void update_chunk(int64_t step, int64_t g, int64_t e) const {
    const float* c = p.coefficients + step * column::count;
    const int64_t panel_floats = panels * p.out_features * WIDTH, image = first_image + g;
    const float *out = (float*)at.out + g * panel_floats, *null_out = out + images * panel_floats;
    const int32_t* place = w.place + e;
    float *x = at.state + g * padded + e, *x0 = at.x0 + g * padded + e;
    Chunk chunk;
    for (int64_t i = 0; i < CHUNK; i++) chunk.x[i] = x[i], chunk.x0[i] = x0[i];
    for (int64_t i = 0; i < CHUNK; i++) chunk.eps[i] = out[place[i]];
    if (p.learned())
      for (int64_t i = 0; i < CHUNK; i++) chunk.range[i] = out[place[i] + p.channels * WIDTH];
    if (p.guided)
      for (int64_t i = 0; i < CHUNK; i++)
        if ((e + i) % p.channels < p.guided) {
          const float null = null_out[place[i]];
          chunk.eps[i] = null + p.scale * (chunk.eps[i] - null);
        }
    const bool noisy = (p.seeds || p.noise) && c[column::sigma] != 0.f;
    if (noisy && p.seeds) {
      normals(p.seeds[2 * image], p.first + step + 1, p.seeds[2 * image + 1], e / 4, chunk.noise);
    } else if (noisy) {
      const float* z = p.noise + (step * p.images + image) * p.elements() + e;
      for (int64_t i = 0; i < CHUNK; i++) chunk.noise[i] = e + i < p.elements() ? z[i] : 0.f;
    }
    solve(c, noisy, p.learned(), chunk);
    for (int64_t i = 0; i < CHUNK; i++) x[i] = chunk.x[i], x0[i] = chunk.x0[i];
  }

  // Sets this thread's share of the work of a team, and the team's useful size.
  void take_share() {
    const int64_t pairs = ceil_div(all, PAIR), size = team.size;
    // Threads share pairs of panels, and those that share a pair split the slices, then the rows
    // of a slice. The best number of columns leaves each thread least to do. Of equally good ones,
    // more columns exchange less, and fewer read each weight fewer times.
    mine.far = p.layer_matrices() > FAR_FLOATS;
    int64_t of_slice = 0;  // threads; 0: one thread has all slices
    double least_work = 0;
    for (int64_t c = 1; c <= least(size, pairs); c++) {
      const int64_t threads = size / c / SLICES;
      const double work = (double)ceil_div(pairs, c) / larger_of(1, SLICES * threads);
      if (c > 1 && (mine.far ? work >= least_work : work > least_work)) continue;
      least_work = work, columns = c, of_slice = threads;
    }
    const int64_t of_column = larger_of(1, SLICES * of_slice);
    team.size = columns * of_column;
    const int64_t column = team.id / of_column, place = team.id % of_column;
    mine.first_panel = least(all, block_start(pairs, columns, column) * PAIR);
    mine.last_panel = least(all, block_start(pairs, columns, column + 1) * PAIR);
    mine.first_slice = of_slice ? place / of_slice : 0;
    mine.last_slice = of_slice ? mine.first_slice + 1 : SLICES;
    mine.part = of_slice ? place % of_slice : 0;
    mine.parts = larger_of(1, of_slice);
  }

  void run() {
    take_share();
    if (team.id >= team.size) return;
    load();
    for (int64_t step = 0; step < p.steps; step++) {
      if (!team.take_step(step)) return;
      take_share();
      if (team.id >= team.size) return;
      modulate(step);
      read_tokens();
      forward();
      const int64_t chunks = padded / CHUNK;
      share_out(images * chunks, [&](int64_t i) {
        update_chunk(step, i / chunks, i % chunks * CHUNK);
      });
    }
    team.wait();
    store();
  }
};

static int64_t team_floats(const Problem& p, int64_t images) {
  const int64_t rows = p.guided ? 2 * images : images, panels = ceil_div(p.tokens, WIDTH);
  const int64_t of_panel = (3 + 1 + 2 * SLICES) * p.hidden + mlp_features(p) + p.out_features;
  return rows * panels * of_panel * WIDTH + 2 * images * p.padded(WIDTH);
}

static int64_t thread_floats(const Problem& p, int64_t images) {
  const int64_t rows = p.guided ? 2 * images : images, panels = ceil_div(p.tokens, WIDTH);
  const int64_t of_panel = p.features + 2 * p.hidden;
  const int64_t of_attention = PAIR * (panels * WIDTH + p.hidden / p.heads);
  const int64_t of_modulation = ceil_div(rows * p.laid_width(), WIDTH);
  return (rows * panels * of_panel + of_attention + of_modulation) * WIDTH;
}

static int64_t useful_threads(const Problem& p) {
  const int64_t rows = p.guided ? 2 : 1;
  return ceil_div(rows * ceil_div(p.tokens, WIDTH), PAIR) * ceil_div(p.hidden, ROWS);
}

static void run(const Problem& p, const Weights& w, Team team, int64_t first_image, int64_t images,
                float* shared, float* own) {
  const int64_t rows = p.guided ? 2 * images : images, panels = ceil_div(p.tokens, WIDTH);
  const int64_t D = p.hidden, all = rows * panels, padded = p.padded(WIDTH);
  auto take = [](float*& from, int64_t vectors) INLINED {
    float* start = from;
    from += vectors * WIDTH;
    return start;
  };
  Memory at;
  at.qkv = (vf*)take(shared, all * 3 * D);
  at.heads = (operand*)take(shared, all * D);  // in bfloat16 half of it
  at.hidden = (operand*)take(shared, all * mlp_features(p));
  at.out = (vf*)take(shared, all * p.out_features);
  at.sums = (vf*)take(shared, 2 * SLICES * all * D);
  at.state = take(shared, images * padded / WIDTH);
  at.x0 = take(shared, images * padded / WIDTH);
  at.in = (operand*)take(own, all * p.features);
  at.x = (vf*)take(own, all * D);
  at.normed = (operand*)take(own, all * D);
  at.scores = (vf*)take(own, PAIR * panels * WIDTH);
  at.mixed = (vf*)take(own, PAIR * (D / p.heads));
  at.modulation = take(own, ceil_div(rows * p.laid_width(), WIDTH));

  Loop{{p, w, team, at, panels, all, {}, 1}, first_image, images, padded}.run();
}

// 12 chains of multiply-adds, for which every instruction set has registers.
static float multiply_adds(int64_t repeats) {
  vf sum[12];
  for (int i = 0; i < 12; i++) sum[i] = splat(i);
  volatile float unknown[2] = {0.999f, 0.001f};  // so that the compiler cannot compute the sums
  const vf factor = splat(unknown[0]), addend = splat(unknown[1]);
  for (int64_t n = 0; n < repeats; n++)
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) sum[i] = sum[i] * factor + addend;
  vf total = {};
  for (int i = 0; i < 12; i++) total += sum[i];
  return total[0];
}
