"""From labels or prompts and seeds to images; users need only `Sampler`.

`sampler` and `arguments` check a call, `executions` lists the ways to run its loop, `loop` and
`trajectory` are the two kinds of loop of planned steps, `adaptive` the loop of a solver that
chooses its own, `steps` and `graphs` run one step, `predictors` says what a model does in a loop,
`text` what one that takes prompts does, and `modulation` what is computed ahead of the steps.
"""

from fastdit.sampling.sampler import Sampler

__all__ = ["Sampler"]
