"""The columns of a solver's table of coefficients, [steps, columns], for every language.

`fastdit.update.Coefficients` says what each of them multiplies. Triton kernels name them by the
constants of `fastdit.kernels.sampling`, C++ by the enumerators of `column` in `cpu/problem.h`.
"""

COLUMNS = tuple("x0_x x0_eps x0_limit x eps x0 x0_prev sigma log_sigma_low log_sigma_high".split())
