// The C interface of adaln.h, which distributes rows over threads.
#include "problem.h"

using namespace fastdit;

// Fewer elements are done before a second thread could start.
static constexpr int64_t FEW = 1 << 14;
static constexpr int64_t ROWS_AT_ONCE = 16;

extern "C" {

int fastdit_adaln(const AdaLN* p, const char* instruction_set) {
  const InstructionSet* set = choose(instruction_set);
  if (!set) return 2;
  const int64_t rows = p->images * p->tokens, parts = ceil_div(rows, ROWS_AT_ONCE);
#pragma omp parallel for num_threads(p->threads) if (rows * p->hidden > FEW)
  for (int64_t i = 0; i < parts; i++)
    set->adaln(*p, block_start(rows, parts, i), block_start(rows, parts, i + 1));
  return 0;
}

int fastdit_adaln_backward(const AdaLNBackward* p, const char* instruction_set) {
  const InstructionSet* set = choose(instruction_set);
  if (!set) return 2;
  const int64_t chunks = p->images * ceil_div(p->tokens, p->chunk_tokens);
#pragma omp parallel for num_threads(p->threads) if (chunks * p->chunk_tokens * p->hidden > FEW)
  for (int64_t i = 0; i < chunks; i++) set->adaln_backward(*p, i);
  return 0;
}
}
