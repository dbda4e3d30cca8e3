"""REPA: aligning a hidden state of the model with an encoder's features of the clean image.

The features are the user's own, made once for all images (`fastdit.data.features`). The projector
between hidden state and features is trained with the model, and is no part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import DiTConfig
from fastdit.data.features import Features
from fastdit.train.recipe import Recipe
from fastdit.train.sources import Source, variants_of

ALIGN_WEIGHT = 0.5  # REPA's, with which `--features` begins


class Alignment(nn.Module):
    """The loss between projected hidden states and features, with the projector that it trains.

    Source: Yu et al. 2025, "Representation alignment for generation", equation 8, and their code:
    three linears with SiLU between them, and the negative cosine as the similarity.
    """

    def __init__(self, hidden: int, width: int, features: int, weight: float, depth: int) -> None:
        """Draw a fresh projector.

        Args:
            hidden: width of the hidden states.
            width: width of the projector.
            features: width of the features.
            weight: factor of the loss.
            depth: number of blocks after which the hidden state is aligned.
        """
        super().__init__()
        self.weight, self.depth = weight, depth
        self.projector = nn.Sequential(
            nn.Linear(hidden, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, features),
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Return the weighted mean of the negative cosines, computed in at least float32.

        Args:
            hidden: [b, N, D] hidden states.
            features: [b, N, z] features of the same images, any float dtype.

        Returns:
            [].
        """
        projected = self.projector(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        cosines = F.cosine_similarity(projected.to(wide), features.to(wide), dim=-1)
        return -self.weight * cosines.mean()


def make_alignment(
    config: DiTConfig, recipe: Recipe, source: Source, features: Features | None
) -> Alignment | None:
    """Return the alignment of a run; None for a run without one.

    Raises:
        ValueError: recipe, features, model and images do not fit each other.
    """
    if features is None:
        if recipe.align_weight:
            got = f"align_weight={recipe.align_weight} needs them, got none"
            raise ValueError(f"features: expected those of the images, since {got}")
        return None
    if not recipe.align_weight:
        raise ValueError("align_weight: expected above 0, since there are features, got 0")
    if recipe.align_depth > config.n_layers:
        expected = f"at most the model's {config.n_layers} blocks"
        raise ValueError(f"align_depth: expected {expected}, got {recipe.align_depth}")
    rows, tokens, width = features.shape
    images, variants = len(source), variants_of(source)
    if rows != images * variants:
        expected = f"{images * variants} rows, one an image"
        if variants > 1:
            expected += f", and after the {images} images' those of their mirror images"
        raise ValueError(f"features: expected {expected}, got {rows} ({features.path})")
    if tokens != config.n_tokens:
        expected = f"{config.n_tokens} tokens an image, as the model has"
        raise ValueError(f"features: expected {expected}, got {tokens} ({features.path})")
    return Alignment(
        config.hidden, recipe.align_width, width, recipe.align_weight, recipe.align_depth
    )


def describe_features(features: Features | None) -> dict[str, Any] | None:
    """Return what a run's file keeps of its features."""
    return None if features is None else {"file": str(features.path), **features.identity}


def reopen_features(kept: Any, given: Features | None, new_data: bool) -> Features | None:
    """Return the features of a run that goes on.

    Args:
        kept: what the run's file has of them, as `describe_features` returns it, or None.
        given: the features, where they may have moved; None opens them from where they were.
        new_data: whether they may differ, as those of other images do.

    Raises:
        ValueError: they have moved or changed.
    """
    if kept is None:
        if given is not None:
            raise ValueError("features: expected none, since the run was started without, got some")
        return None
    features = Features(kept["file"]) if given is None else given
    same = {**features.identity, "file": None} == {**kept, "file": None}
    if not same and not (new_data and given is not None):
        raise ValueError(
            f"features: the run was started on others than {features.path} holds; to go on with "
            "other images and their features, say so (--new-data)"
        )
    return features
