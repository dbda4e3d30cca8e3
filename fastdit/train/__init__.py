"""Training: a `Trainer` takes a model's config, a `Recipe`, a source of images and a folder.

from fastdit.train import RECIPES, Monitor, Shapes, Trainer

trainer = Trainer(fastdit.DiTConfig(), RECIPES["seed"], Shapes(), out="runs/toy")
result = trainer.run(Monitor(progress=True))

The loop is in `trainer`, and its parts are in the other files:

- what is computed: `recipe` has the settings, `sources` the training sets, `batches` the checks
  of what they return, `loading` the order of the images and the batches, `objective` the noise
  and the loss of a batch, `losses` the formulas, `flows` what only flows have, `alignment` the loss
  of a hidden state, and `ema` the averaged weights;
- how it is computed: `runtime` has device, precision and the like, `placement` moves, splits and
  compiles, and `distributed` has everything about several processes;
- what is kept: `state` has a run's tensors, `run_folder` its files, and `changes` what may differ
  when a run goes on;
- what is shown: `monitor` has the outputs, `samples` makes the grids' images, and `meter` measures
  the speed.
"""

from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Images, Latents, Shapes, Source, open_data
from fastdit.train.trainer import Trainer, TrainResult

__all__ = [
    "RECIPES",
    "Images",
    "Latents",
    "Monitor",
    "Recipe",
    "RunFolder",
    "Runtime",
    "Shapes",
    "Source",
    "TrainResult",
    "Trainer",
    "open_data",
]
