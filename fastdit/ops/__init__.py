"""The kernels as PyTorch ops, and the choice of how each op runs.

`definitions` gives every op its schema, shapes and gradients; `registration` says how an op is
registered and called; `dispatch` decides which backend runs it; `checks` looks at arguments;
`trajectory` holds the arguments of the sampling loop in one op, and that loop in plain PyTorch.
`fastdit.functional` is the public interface of all of them. CONTRIBUTING.md says how to add an op.
"""
