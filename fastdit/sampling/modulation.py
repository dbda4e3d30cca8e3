"""The modulation of a sampling loop's steps, computed for many steps at once.

In sampling all images share the timestep, so that modulation depends on (step, label) alone. It is
computed for the distinct labels only, for many steps in one matrix product a layer.

A model without an activation before its modulation linears splits exactly,
`W (e_t + e_y) + b = (W e_t + b) + W e_y`: one row for each step and one for each label are all that
there is to compute.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.blocks import Conditioned
from fastdit.model import DiT
from fastdit.ops.trajectory import Modulation

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def time_tensor(
    times: Sequence[int] | Sequence[float],
    device: torch.device,
    fractional: torch.dtype = torch.float32,
) -> Tensor:
    """Return times as a tensor: int64, or the dtype for fractions where they are floats."""
    floats = any(isinstance(t, float) for t in times)
    return torch.tensor(times, dtype=fractional if floats else torch.int64, device=device)


class Projection(ABC):
    """Makes rows of modulation from conditioning; the model's weights must not change meanwhile.

    Attributes:
        model: the model.
        split: whether a modulation is the sum of a timestep's row and a label's row.
        row_bytes: memory of a row of a table, with what is needed beside it to fill it.
        labels: what the labels are, in words.
    """

    model: nn.Module
    split: bool
    row_bytes: int
    labels = "labels"

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are made."""

    @abstractmethod
    def by_step(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the rows of timesteps t [S]: [S, 1, width], or unless split [S, R, width]."""

    @abstractmethod
    def by_label(self, labels: Tensor | None) -> Tensor | None:
        """Return the labels' rows `W e_y`, [R, width], or None where nothing is added."""


class LayerProjection(Projection):
    """Calls a DiT's own layers one by one, whatever they are, such as linears with adapters."""

    def __init__(self, model: DiT, dtype: torch.dtype | None = None) -> None:
        """Take a model, and the dtype that its layers return; None is the model's."""
        self.model: DiT = model
        cfg = model.cfg
        self.split = cfg.modulation_act == "none"
        self._columns = [cfg.block_parts * cfg.hidden] * cfg.n_layers + [2 * cfg.hidden]
        # The class embedding, of which context tokens are made.
        self._context = [cfg.hidden] if cfg.context_tokens else []
        self._dtype = dtype or model.pos_embed.dtype
        # One layer's output stands beside the table while it is copied there, and beside both the
        # conditioning, before and after its SiLU, which counts where there is one for each block.
        beside = self._columns[0] + 2 * model.cfg.hidden * (len(model.embedders()) - 1)
        width = sum(self._columns + self._context)
        self.row_bytes = (width + beside) * self._dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    def _time(self, t: Tensor) -> Tensor:
        """Return the timesteps' part of the conditioning: t [S] -> [S, D], or [L, S, D].

        Where each of L blocks embeds for itself, conditioning has a first dim of L here and below.
        """
        return self.model.time_conditioning(t)

    def _label(self, labels: Tensor | None) -> Tensor | None:
        """Return the labels' part of the conditioning: [R, D], or None where nothing is added."""
        e_y = self.model.label_conditioning(labels)
        return e_y[None] if e_y is not None and e_y.dim() == 1 else e_y  # the null class alone

    def by_step(self, t: Tensor, labels: Tensor | None) -> Tensor:
        c, e_y = self._time(t).unsqueeze(-2), None
        if not self.split:
            e_y = self._label(labels)
            c = F.silu(c if e_y is None else c + e_y.unsqueeze(-3))
        steps, rows = c.shape[-3:-1]
        e_y = e_y.repeat(steps, 1) if e_y is not None and self._context else None
        return self._project(c.flatten(-3, -2), e_y).view(steps, rows, -1)

    def by_label(self, labels: Tensor | None) -> Tensor | None:
        e_y = self._label(labels) if self.split else None
        return None if e_y is None else self._project(e_y, e_y, bias=False)

    def _parts(self, c: Tensor, bias: bool) -> Iterator[Tensor]:
        """Yield what each layer makes of c, without its bias unless `bias`."""
        if bias:
            yield from self.model.modulation_parts(c)
            return
        # For zeros a layer returns its bias, including an adapter's.
        biases = self.model.modulation_parts(torch.zeros_like(c[..., :1, :]))
        for part, of_zeros in zip(self.model.modulation_parts(c), biases, strict=True):
            yield part - of_zeros

    def _project(self, c: Tensor, e_y: Tensor | None, bias: bool = True) -> Tensor:
        """Return the modulation of c [R, D], with the layers' biases or without: [R, width].

        e_y, [R, D] or None for zeros, is the class embedding that a model with context tokens has
        beside it.
        """
        columns = self._columns + self._context
        table = c.new_empty(c.shape[-2], sum(columns), dtype=self._dtype)
        of_label = [] if not self._context else [e_y if e_y is not None else torch.zeros(())]
        parts = itertools.chain(self._parts(c, bias), of_label)
        for part, own in zip(parts, table.split(columns, -1), strict=True):
            own.copy_(part)
        return table


class PlainProjection(LayerProjection):
    """Applies the weights of plain linears by a function of one's own, such as `F.linear`."""

    def __init__(self, model: DiT, linear: Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, dtype)
        self._linear = linear

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights on which modulation depends."""
        model = self.model
        modules = [*(owner.t_embed for owner in model.embedders()), *model.modulation_layers()]
        if model.cfg.use_class_cond:
            modules += [owner.y_embed for owner in model.embedders()]
        return [p for module in modules for p in module.parameters()]

    def _time(self, t: Tensor) -> Tensor:
        embedding = self.model.time_embedding(t)

        def embed(owner: Conditioned) -> Tensor:
            h = embedding
            for layer in owner.t_embed:
                if isinstance(layer, nn.Linear):
                    h = self._linear(h, layer.weight, layer.bias)
                else:
                    h = layer(h)
            return h

        return self.model.by_embedders(embed)

    def _parts(self, c: Tensor, bias: bool) -> Iterator[Tensor]:
        layers = self.model.modulation_layers()
        for layer, own in zip(layers, self.model.conditioning_by_layer(c), strict=True):
            yield self._linear(own, layer.weight, layer.bias if bias else None)


class Tables:
    """The modulation of a batch at every step of a loop, with all rows at once."""

    def __init__(self, by_step: Tensor, by_label: Tensor | None, rows: Tensor) -> None:
        """Take the tables of S steps, as `Modulation` has them, and each image's row.

        Args:
            by_step: [S, 1 or R, width].
            by_label: [R, width], or None.
            rows: [B] int64, or [] where all images share one row.
        """
        self._by_step, self._by_label, self._rows = by_step, by_label, rows

    def steps(self, k: int, most: int, count: int) -> Modulation:
        """Return the modulation of the batch's first `count` rows from step k on.

        It holds at most `most` steps, views that are good until the next call.
        """
        rows = self._rows[:count] if self._rows.dim() else self._rows.expand(count)
        return Modulation(self._from(k)[:most], self._by_label, rows)

    def rows(self, k: int, count: int, out: Tensor | None = None) -> Tensor:
        """Return the modulation of the first `count` rows at step k, in `out` if it is given.

        Returns:
            [count, width].
        """
        by_step, by_label, rows = self.steps(k, 1, count)
        if by_label is None:
            return torch.index_select(by_step[0], 0, rows, out=out)
        return torch.index_select(by_label, 0, rows, out=out).add_(by_step[0])

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self._by_step.nbytes + (0 if self._by_label is None else self._by_label.nbytes)

    def _from(self, k: int) -> Tensor:
        return self._by_step[k:]


class ChunkedTables(Tables):
    """The same, computed in chunks of as many steps as a bound of memory allows."""

    def __init__(
        self,
        projection: Projection,
        timesteps: Sequence[int] | Sequence[float],
        labels: Sequence[int] | None,
        max_bytes: int,
    ) -> None:
        """Plan for a batch; a chunk of steps is computed when one of them is asked for.

        Args:
            projection: makes the rows.
            timesteps: one for each step of the loop, in order.
            labels: one for each row of the batch; None for a batch without labels.
            max_bytes: bound of the tables and of what is needed to fill them. The rows that a
                step picks, and the conditioning itself, are not counted.

        Raises:
            ValueError: the tables of a single step exceed the bound.
        """
        device = projection.device
        distinct = sorted(set(labels or ()))
        label_rows = max(1, len(distinct))
        fixed = label_rows * projection.row_bytes if projection.split else 0
        step_bytes = (1 if projection.split else label_rows) * projection.row_bytes
        self._chunk = min((max_bytes - fixed) // step_bytes, len(timesteps))
        if self._chunk < 1:
            raise ValueError(
                f"table_bytes: one step of {label_rows} distinct {projection.labels} takes "
                f"{fixed + step_bytes} bytes, got {max_bytes}"
            )
        self._projection, self._first = projection, 0
        self._timesteps = time_tensor(timesteps, device)
        self._labels = torch.tensor(distinct, device=device) if distinct else None
        nothing = torch.empty(0, device=device)
        super().__init__(
            nothing, projection.by_label(self._labels), _rows(labels, distinct, device)
        )

    def _from(self, k: int) -> Tensor:
        if not 0 <= k - self._first < len(self._by_step):
            self._fill(k)
        return self._by_step[k - self._first :]

    def _fill(self, k: int) -> None:
        self._by_step = self._by_step[:0].clone()  # frees the last chunk before the next is made
        t = self._timesteps[k : k + self._chunk]
        self._by_step, self._first = self._projection.by_step(t, self._labels), k


class TableStore:
    """Makes each batch's tables, and keeps the rows that may serve the next batch too.

    Of a split model it keeps the rows of all steps, and those of all labels if these are no more
    than the steps, or else of the last batch's labels; nothing if they exceed the bound of memory.
    """

    def __init__(
        self,
        projection: LayerProjection,
        timesteps: Sequence[int] | Sequence[float],
        max_bytes: int,
    ) -> None:
        """Keep rows while the model's weights stay; arguments as `ChunkedTables` has them."""
        self._projection, self._timesteps, self._max_bytes = projection, timesteps, max_bytes
        self._by_step: Tensor | None = None
        self._by_label: Tensor | None = None
        self._distinct: list[int] | None = None  # the labels of _by_label

    def serve(self, labels: Sequence[int] | None) -> Tables:
        """Return the tables of a batch; labels as in `ChunkedTables`."""
        distinct = self._labels_to_keep() if labels else []
        distinct = distinct or sorted(set(labels or ()))
        rows = len(self._timesteps) + max(1, len(distinct))
        if not self._projection.split or rows * self._projection.row_bytes > self._max_bytes:
            self._by_step = self._by_label = self._distinct = None
            return ChunkedTables(self._projection, self._timesteps, labels, self._max_bytes)
        device = self._projection.device
        if distinct != self._distinct:
            self._by_label = self._distinct = None  # freed before the new rows are made
            wanted = torch.tensor(distinct, device=device) if distinct else None
            self._by_label, self._distinct = self._projection.by_label(wanted), distinct
        if self._by_step is None:
            t = time_tensor(self._timesteps, device)
            self._by_step = self._projection.by_step(t, None)
        return Tables(self._by_step, self._by_label, _rows(labels, distinct, device))

    def _labels_to_keep(self) -> list[int]:
        """Return all labels of the model, or none where that would be too many."""
        count, steps = self._projection.model.cfg.class_rows, len(self._timesteps)
        fits = (count + steps) * self._projection.row_bytes <= self._max_bytes
        return list(range(count)) if fits and count <= steps else []


def _rows(labels: Sequence[int] | None, distinct: list[int], device: torch.device) -> Tensor:
    """Return each label's row among the distinct ones: [B] int64, or [] without labels."""
    if labels is None:
        return torch.tensor(0, device=device)
    position = {label: i for i, label in enumerate(distinct)}
    return torch.tensor([position[label] for label in labels], device=device)
