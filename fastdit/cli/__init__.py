"""The command line: `fastdit train`, `sample`, `evaluate`, `encode`, `convert` and `info`.

- `app` gathers the commands; `train`, `sample` and `evaluate` hold one each, and `models` the rest.
- `common` has what all of them share, above all errors of one line, and `memory` what they say
  where memory does not suffice.
- `checkpoints` has the options that answer what a checkpoint does not tell.
- `labels` reads the classes that `sample` is given, and `batches` makes its images.
- `data` and `trainers` set up the run of `train`, and `losses` prints the table at its end.
"""
