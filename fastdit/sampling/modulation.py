"""The modulation of every step of a sampling loop, computed before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.diffusion import timestep_embedding
from fastdit.model import DiT
from fastdit.reference import Modulation

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ModulationTables:
    """What `model.modulation` gives at each step of a loop, for the labels of a batch.

    In sampling all images share the timestep, so that modulation depends on (step, label) alone:
    it is computed for the distinct labels only (where tables stay for other batches, for all labels
    if these are few), for many steps in one matrix product a layer, and as many steps at a time as
    a bound of memory allows.

    A model without SiLU before its modulation linears splits exactly,
    `W (e_t + e_y) + b = (W e_t + b) + W e_y`: a row for each step and one for each label are all
    there is to compute, and serve other batches too, as long as the weights stay.
    """

    def __init__(
        self,
        model: DiT,
        timesteps: Sequence[int],
        max_bytes: int,
        linear: Linear | None = None,
    ) -> None:
        """Tables without a batch: `serve` plans for one.

        Args:
            model: its weights must stay as they are while the tables are in use.
            timesteps: one for each step of the loop, in order.
            max_bytes: bound of the tables and of the product that fills them; the rows that a
                step picks, and the conditioning itself, are not counted.
            linear: applies weights to rows, as `F.linear`, in the place of the model's own layers,
                which must be plain linears: those of modulation are joined in a copy, so that a
                small model's tables are not mostly the calling of its layers.
        """
        self._model, self._max_bytes, self._linear = model, max_bytes, linear
        cfg, self._device = model.cfg, model.pos_embed.device
        self._timesteps = torch.tensor(timesteps, device=self._device)
        self._columns = [6 * cfg.hidden] * cfg.n_layers + [2 * cfg.hidden]
        self._joined = None if linear is None else _joined_weights(model)
        self.split = cfg.modulation_act == "none"  # the table of steps is the same for all labels
        # While a table is filled layer by layer, one layer's product stands beside it.
        width = sum(self._columns) + (self._columns[0] if linear is None else 0)
        self._row_bytes = width * model.pos_embed.element_size()
        self._all_labels = self._labels_worth_a_table(len(timesteps))
        self._distinct: list[int] | None = None  # the labels that have rows
        self._labels: Tensor | None = None  # the same, unless there are none
        self._chunk, self._first = 0, 0  # how many steps, and the first of those there are
        self._storage: Tensor | None = None
        self._steps: Tensor | None = None  # [steps of a chunk, labels or 1, width]
        self._by_label: Tensor | None = None  # [labels, width]

    def serve(self, labels: Sequence[int] | None) -> ModulationTables:
        """Plan for a batch; a chunk of its steps is computed when it is asked for.

        Args:
            labels: one for each row of the batch; None for a batch without labels.

        Raises:
            ValueError: the tables of a single step exceed the bound.
        """
        distinct = [] if labels is None else self._all_labels or sorted(set(labels))
        position = {label: i for i, label in enumerate(distinct)}
        rows = [0] if labels is None else [position[label] for label in labels]
        self._row = torch.tensor(rows, device=self._device)

        row_bytes, label_rows = self._row_bytes, max(1, len(distinct))
        fixed = label_rows * row_bytes if self.split else 0
        step_bytes = row_bytes if self.split else label_rows * row_bytes
        chunk = min((self._max_bytes - fixed) // step_bytes, len(self._timesteps))
        if chunk < 1:
            raise ValueError(
                f"table_bytes: one step of {label_rows} distinct labels takes "
                f"{fixed + step_bytes} bytes, got {self._max_bytes}"
            )
        self.release()
        if distinct != self._distinct:
            self._distinct, self._by_label = distinct, None
            self._labels = torch.tensor(distinct, device=self._device) if distinct else None
        if chunk != self._chunk:
            self._chunk, self._storage, self._steps = chunk, None, None
        if self.split and self._by_label is None:
            self._by_label = self._label_table()
        return self

    def _labels_worth_a_table(self, n_steps: int) -> list[int]:
        """All of a model's, where their rows are no more than the steps' and stay for all batches.

        Made for one batch alone, only the rows it needs are made.
        """
        count = self._model.cfg.class_rows
        fits = (count + n_steps) * self._row_bytes <= self._max_bytes
        kept = self.split and self._linear is not None
        return list(range(count)) if kept and fits and count <= n_steps else []

    def release(self) -> None:
        """Keep no more than may serve other batches too."""
        if not self.split:
            self._storage = self._steps = None

    @property
    def nbytes(self) -> int:
        """Bytes the tables take now."""
        tables = [t for t in (self._storage, self._by_label) if t is not None]
        return sum(t.numel() * t.element_size() for t in tables)

    def rows(self, k: int, rows: int, out: Tensor | None = None) -> Tensor:
        """The modulation at step k of the batch's first rows: [rows, width], in `out` if given."""
        by_step, by_label, row = self.steps(k, 1, rows)
        if by_label is None:
            return torch.index_select(by_step[0], 0, row, out=out)
        return torch.index_select(by_label, 0, row, out=out).add_(by_step[0])

    def steps(self, k: int, most: int, count: int) -> Modulation:
        """At steps k, k + 1, ..., for the first `count` rows: at most so many steps as are asked.

        There are fewer where the bound of memory ends. Views, good until the next call.
        """
        if self._steps is None or not 0 <= k - self._first < len(self._steps):
            self._steps, self._first = self._chunk_from(k), k
        row = self._row[:count] if self._labels is not None else self._row.expand(count)
        start = k - self._first
        return Modulation(self._steps[start : start + most], self._by_label, row)

    def _chunk_from(self, k: int) -> Tensor:
        """The steps from k on, as many as fit, where the last chunk was."""
        t, labels = self._timesteps[k : k + self._chunk], self._labels
        if self.split:
            c, per_step = self._time_conditioning(t), 1
        else:
            of_label = self._model.label_conditioning(labels)  # [labels, D], [D] or None
            c = self._time_conditioning(t)[:, None]
            c = F.silu(c if of_label is None else c + of_label)
            c, per_step = c.flatten(0, 1), c.shape[1]
        if self._joined is not None:
            self._storage = self._steps = None
            self._storage = self._apply(c, *self._joined).view(len(t), per_step, -1)
            return self._storage
        if self._storage is None:
            self._storage = c.new_empty(self._chunk, per_step, sum(self._columns))
        steps = self._storage[: len(t)]
        self._project(c, steps.view(len(c), -1))
        return steps

    def _time_conditioning(self, t: Tensor) -> Tensor:
        """[S, D]"""
        if self._linear is None:
            return self._model.time_conditioning(t)
        first, act, last = self._model.t_embed
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        freq_shift = self._model.cfg.t_freq_shift
        embedding = timestep_embedding(t, first.in_features, freq_shift=freq_shift)
        hidden = act(self._apply(embedding.to(first.weight.dtype), first.weight, first.bias))
        return self._apply(hidden, last.weight, last.bias)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self._linear is not None
        return self._linear(x, weight, bias)

    def _label_table(self) -> Tensor | None:
        """`W e_y`, as what the layers give beyond their bias."""
        e_y = self._model.label_conditioning(self._labels)
        if e_y is None:
            return None
        e_y = e_y.view(-1, e_y.shape[-1])  # the null row alone is [D]
        if self._joined is not None:
            return self._apply(e_y, self._joined[0], None)
        table = e_y.new_empty(len(e_y), sum(self._columns))
        self._project(e_y, table)
        for part, columns in self._parts(torch.zeros_like(e_y[:1]), table):
            columns.sub_(part)
        return table

    def _project(self, c: Tensor, out: Tensor) -> None:
        """All layers' modulation of c [R, D], side by side into out [R, width]."""
        for part, columns in self._parts(c, out):
            columns.copy_(part)

    def _parts(self, c: Tensor, table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's modulation of c, and the columns that it has in a table."""
        return zip(self._model.modulation_parts(c), table.split(self._columns, dim=-1), strict=True)


def _joined_weights(model: DiT) -> tuple[Tensor, Tensor]:
    """All modulation layers as one: weight [width, D] and bias [width]."""
    layers = [*(block.adaLN_modulation for block in model.blocks), model.final_mod]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return weight, torch.cat([layer.bias.detach() for layer in layers])
