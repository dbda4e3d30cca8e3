"""The metrics of samples: FID, sFID, Inception Score, precision and recall.

from fastdit.evaluation import evaluate, load_inception
print(evaluate("samples.npz", "VIRTUAL_imagenet256_labeled.npz", load_inception()))

- `comparison` compares samples with a reference.
- `inputs` reads images and statistics.
- `inception` is the network whose features are compared, with its published weights.
- `metrics` has the formulas.
"""

from fastdit.evaluation.comparison import Evaluation, evaluate
from fastdit.evaluation.inception import Features, load_inception
from fastdit.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    moments,
    precision_and_recall,
)

__all__ = [
    "Evaluation",
    "Features",
    "Moments",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "load_inception",
    "moments",
    "precision_and_recall",
]
