// The kernels for any CPU, with the compiler's own code for vectors of 4 floats (SSE2, NEON).
#include "problem.h"
#define WIDTH 4
#define ROWS 6
#define NAME plain
#include "kernels.h"
