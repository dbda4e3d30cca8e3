// The kernels for AVX2 with FMA: 16 registers of 8 floats.
// problem.h includes all standard headers, since their code must not be compiled for AVX2.
#include "problem.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define WIDTH 8
#define ROWS 6
#define NAME avx2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
