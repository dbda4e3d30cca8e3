"""The modulation of every step of a sampling loop, computed before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.model import DiT


class ModulationTables:
    """What `model.modulation` gives at each step of a loop, for the labels of a batch.

    In sampling all images share the timestep, so that modulation depends on (step, label) alone:
    it is computed for the distinct labels only, for many steps in one matrix product a layer, and
    as many steps at a time as a bound of memory allows.

    A model without SiLU before its modulation linears splits exactly,
    `W (e_t + e_y) + b = (W e_t + b) + W e_y`: a row for each step and one for each label are all
    there is to compute.
    """

    def __init__(
        self,
        model: DiT,
        timesteps: Sequence[int],
        labels: Sequence[int] | None,
        max_bytes: int,
    ) -> None:
        """Plan the tables; the first chunk of steps is computed when it is asked for.

        Args:
            model: its weights must stay as they are while the tables are in use.
            timesteps: one for each step of the loop, in order.
            labels: one for each row of the batch; None for a batch without labels.
            max_bytes: bound of the tables, the widest product that fills them included.

        Raises:
            ValueError: the tables of a single step exceed the bound.
        """
        self._model = model
        weight = model.final_mod.weight
        distinct = [] if labels is None else sorted(set(labels))
        position = {label: i for i, label in enumerate(distinct)}
        rows = [0] if labels is None else [position[label] for label in labels]
        self._row = torch.tensor(rows, device=weight.device)
        self._labels = torch.tensor(distinct, device=weight.device) if distinct else None
        self._timesteps = torch.tensor(timesteps, device=weight.device)
        self._width = sum(layer.out_features for layer in model.modulation_layers)
        self._split = model.cfg.modulation_act == "none"

        # While a table is filled, one layer's product stands beside it.
        row_bytes = (self._width + 6 * model.cfg.hidden) * weight.element_size()
        label_rows = max(1, len(distinct))
        fixed = (label_rows if self._split else 0) * row_bytes
        step_bytes = (1 if self._split else label_rows) * row_bytes
        self._chunk = min((max_bytes - fixed) // step_bytes, len(timesteps))
        if self._chunk < 1:
            raise ValueError(
                f"table_bytes: one step of {label_rows} distinct labels takes "
                f"{fixed + step_bytes} bytes, got {max_bytes}"
            )
        self._first = 0
        self._storage: Tensor | None = None
        self._steps: Tensor | None = None  # [steps of a chunk, labels or 1, width]
        self._by_label = self._label_table() if self._split else None  # [labels, width]

    @property
    def nbytes(self) -> int:
        """Bytes the tables take now."""
        tables = [t for t in (self._storage, self._by_label) if t is not None]
        return sum(t.numel() * t.element_size() for t in tables)

    def rows(self, k: int, count: int) -> Tensor:
        """The modulation at step k of the batch's first `count` rows: [count, width]."""
        if self._steps is None or not 0 <= k - self._first < len(self._steps):
            self._fill(k)
        assert self._steps is not None
        by_label = self._steps[k - self._first]  # [labels or 1, width]
        if self._by_label is not None:
            by_label = by_label + self._by_label
        row = self._row[:count] if self._labels is not None else self._row.expand(count)
        return by_label.index_select(0, row)

    def _fill(self, k: int) -> None:
        """Compute the steps from k on, as many as fit, where the last chunk was."""
        t = self._timesteps[k : k + self._chunk]
        if self._split:
            c, labels = self._model.time_conditioning(t), 1
        else:
            labels = 1 if self._labels is None else len(self._labels)
            y = None if self._labels is None else self._labels.repeat(len(t))
            c = self._model.conditioning(t.repeat_interleave(labels), y)
        if self._storage is None:
            self._storage = c.new_empty(self._chunk, labels, self._width)
        self._first, self._steps = k, self._storage[: len(t)]
        out = self._steps.view(len(c), self._width)
        sizes = [layer.out_features for layer in self._model.modulation_layers]
        for layer, columns in zip(
            self._model.modulation_layers, out.split(sizes, dim=-1), strict=True
        ):
            columns.copy_(layer(c))

    def _label_table(self) -> Tensor | None:
        e_y = self._model.label_conditioning(self._labels)
        if e_y is None:
            return None
        layers = self._model.modulation_layers
        return torch.cat([F.linear(e_y, layer.weight) for layer in layers], dim=-1)
