"""Training: a `Trainer` takes a model's config, a `Recipe`, a source of images and a folder.

from fastdit.train import RECIPES, Monitor, Shapes, Trainer

trainer = Trainer(fastdit.DiTConfig(), RECIPES["seed"], Shapes(), out="runs/toy")
result = trainer.run(Monitor(progress=True))
"""

from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Latents, Shapes, Source
from fastdit.train.trainer import Trainer, TrainResult

__all__ = [
    "RECIPES",
    "Latents",
    "Monitor",
    "Recipe",
    "RunFolder",
    "Runtime",
    "Shapes",
    "Source",
    "TrainResult",
    "Trainer",
]
