// The code of the instruction set NAME: vectors have WIDTH floats, blocks of rows at most ROWS.
namespace fastdit {
namespace {
#define INLINED __attribute__((always_inline))
#include "vector.h"
#include "product.h"
#include "update.h"
#include "network.h"
#include "loop.h"
#include "linear.h"
#include "adaln.h"
}  // namespace

#define AS_STRING(name) #name
#define NAME_OF(name) AS_STRING(name)
const InstructionSet NAME = {NAME_OF(NAME), WIDTH, team_floats, thread_floats,
                             useful_threads, run, update, normals, multiply_adds, linear,
                             adaln, adaln_backward};
}  // namespace fastdit
