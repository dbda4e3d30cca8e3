// The kernels for AVX-512 with products of bfloat16 weights and activations, summed in float.
// problem.h includes all standard headers, since their code must not be compiled for AVX-512.
#include "problem.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512vl,avx512bw,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,prefer-vector-width=512")
#endif
#define WIDTH 16
#define ROWS 12
#define NAME avx512_bf16
#define BFLOAT16
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
