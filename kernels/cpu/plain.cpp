// The kernels for any CPU: what the compiler makes of vectors of 4 floats (SSE2, NEON).
#include "problem.h"
#define WIDTH 4
#define ROWS 6
#define NAME plain
#include "kernels.h"
