// The structs that Python fills and the library takes. structs.py reads their members, one type a
// line, so that each is declared once.
#pragma once
#include <cstdint>

namespace fastdit::fields {

// Some steps of the sampling loop of a batch of images under one model.
struct Problem {
  int64_t tokens, features, out_features, channels, hidden, layers, heads;  // kernels/shape.py
  int64_t mlp_hidden;
  int64_t block_parts;        // of a block's modulation: 6, or 4 without shifts
  int64_t rms;                // 1: RMSNorms with weights; 0: LayerNorms without
  int64_t qk_norm;            // 0: none; 1: LayerNorm; 2: RMSNorm
  int64_t rope, swiglu;       // 1: the model has it
  int64_t tanh_gelu;          // 1: GELU by tanh; 0: the exact one
  int64_t images, steps;
  int64_t first;      // the number of steps that were taken before these
  int64_t step_rows;  // rows of by_step at one step: 1, or one for each label
  int64_t guided;     // guidance acts on channels below this one; 0: there is no guidance
  int64_t threads;
  float eps, mlp_eps;  // of the norms before attention and at the end; before the MLPs
  float qk_norm_eps;
  float scale;  // of guidance
  const int64_t *weights;     // the addresses of the tensors that kernels/shape.py lists
  const float *by_step;       // [steps][step_rows][width]
  const float *by_label;      // [labels][width], or null
  const int64_t *rows;        // [images]; guided: [2 * images], the null label's last
  const float *coefficients;  // [steps][column::count]
  const int64_t *seeds;       // [images][2] (key, stream), or null
  const float *noise;         // [steps][images][tokens * features], or null
  float *x, *x0;              // [images][tokens * features], in and out
};

// One step's update of states in any layout.
struct Update {
  int64_t images, elements, channels;  // elements: of an image
  int64_t space;    // elements from one channel to the next: 1 for tokens, H * W for images
  int64_t learned;  // 1: each group of channels * space of eps is followed by one of range
  int64_t guided;   // guidance acts on channels below this one; 0: there is no guidance
  int64_t step, threads;
  float scale;  // of guidance
  const float *x;                // [images][elements]
  const float *model_out;        // [images][elements]; guided: 2 * images; learned: 2 * elements
  const float *coefficients;     // [column::count], of this step
  const float *x0_prev, *noise;  // [images][elements], or null
  const int64_t *seeds;          // [images][2] (key, stream), or null
  float *x_next, *x0;            // [images][elements], out
};

// y = x weight^T + bias, or the GELU of that.
struct Linear {
  int64_t rows, in_features, out_features, threads;
  int64_t gelu;         // 0: none; 1: the exact one; 2: by tanh
  const float *x;       // [rows][in_features]
  const float *weight;  // [out_features][in_features], float or bfloat16
  const float *bias;    // [out_features], or null
  float *y;             // [rows][out_features], out
};

// r = x + gate * y and h = norm(r) * (1 + scale) + shift. Without a gate r is x, and not written.
// The norm is RMSNorm with a weight where there is one, and LayerNorm where there is none.
struct AdaLN {
  int64_t images, tokens, hidden;
  int64_t gate_stride, scale_stride, shift_stride;  // from one image's row to the next
  int64_t threads;
  float eps;
  const float *x, *y;                 // [images][tokens][hidden]; y: or null
  const float *gate, *scale, *shift;  // [images][hidden]; gate, shift: or null
  const float *weight;                // [hidden], or null
  float *r, *h;                       // [images][tokens][hidden], out
  float *mean, *rstd;                 // [images][tokens], out; mean: null with a weight
};

// The gradients of AdaLN; the modulation's are sums over each chunk of an image's tokens. g is the
// sum of dh times the norm before its weight, which dscale and dweight are made of.
struct AdaLNBackward {
  int64_t images, tokens, hidden;
  int64_t gate_stride, scale_stride;  // from one image's row to the next
  int64_t chunk_tokens, threads;
  int64_t shifted;  // 1: there is a dshift
  const float *dr, *dh, *r, *y;  // [images][tokens][hidden]; dr, y: or null
  const float *gate, *scale;     // [images][hidden]; gate: or null
  const float *weight;           // [hidden], or null
  const float *mean, *rstd;      // [images][tokens]; mean: null with a weight
  float *dx, *dy;                // [images][tokens][hidden], out; dy: or null
  float *partial;                // [images][chunks][g, dshift, dgate][hidden], out
};

}  // namespace fastdit::fields
