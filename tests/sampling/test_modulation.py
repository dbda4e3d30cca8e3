"""Precomputed modulation: it is the model's, for distinct rows only, within a memory bound."""

import pytest
import torch

import fastdit
from fastdit import DiTConfig
from fastdit.sampling.modulation import (
    ChunkedTables,
    LayerProjection,
    PlainProjection,
    TableStore,
)
from fastdit.testing import randomize, relative_error

SMALL = dict(hidden=16, n_layers=2, n_heads=2)
CONFIGS = {
    "split": DiTConfig(**SMALL),
    "split-null": DiTConfig(**SMALL, null_class=True),
    "silu": DiTConfig(**SMALL, modulation_act="silu"),
    "silu-null": DiTConfig(**SMALL, modulation_act="silu", null_class=True),
    "unconditional": DiTConfig(**SMALL, use_class_cond=False),
    "block": DiTConfig(**SMALL, embedders="block"),
    "block-null": DiTConfig(**SMALL, embedders="block", null_class=True),
    "block-silu-null": DiTConfig(
        **SMALL, embedders="block", null_class=True, modulation_act="silu"
    ),
    "block-unconditional": DiTConfig(**SMALL, embedders="block", use_class_cond=False),
}
TIMESTEPS = [900, 500, 499, 7, 0]
WIDTH = (6 * 2 + 2) * 16
LAST = 2 * 16  # outputs of the final layer's modulation


def make(cfg, dtype=torch.float64):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model.to(dtype)


def make_tables(model, labels, bound=2**20, timesteps=TIMESTEPS):
    return ChunkedTables(LayerProjection(model), timesteps, labels, bound)


def row_bytes(labels=1, dtype=torch.float64):
    """Return the bytes of one step's rows and of the widest layer's output that makes them."""
    return labels * (WIDTH + 6 * 16) * dtype.itemsize


@torch.no_grad()
@pytest.mark.parametrize("labels", [None, [3, 1, 3, 0]], ids=["no-labels", "labels"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_the_models_modulation(name, labels):
    cfg = CONFIGS[name]
    if labels and not cfg.use_class_cond:
        labels = None
    model = make(cfg)
    tables = make_tables(model, labels)
    y = None if labels is None else torch.tensor(labels)
    for k, t in enumerate(TIMESTEPS):
        expected = model.modulation(torch.full((4,), t), y)
        assert relative_error(tables.rows(k, 4), expected) < 1e-12
        assert relative_error(tables.rows(k, 2), expected[:2]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["split", "silu"])
def test_denoising_with_tables_of_one_step_equals_a_forward(name):
    model = make(CONFIGS[name])
    x, t, y = torch.randn(4, 3, 16, 16).double(), torch.full((4,), 7), torch.tensor([3, 1, 3, 0])
    tokens = fastdit.functional.patchify(x, 4)
    out = model.denoise(tokens, make_tables(model, y.tolist(), timesteps=[7]).rows(0, 4))
    assert relative_error(fastdit.functional.unpatchify(out, 4), model(x, t, y)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "labels"), [("split", 3), ("silu", 3), ("silu-null", 1)])
def test_tables_stay_within_their_bound_and_stay_correct(name, labels, steps):
    """A bound for `steps` steps makes chunks of that length; the last one may be shorter."""
    model, wanted = make(CONFIGS[name]), [3, 1, 3, 0] if labels == 3 else None
    y = None if wanted is None else torch.tensor(wanted)
    bound = row_bytes(labels) * steps
    if name == "split":
        bound = row_bytes(labels) + row_bytes() * steps
    tables = make_tables(model, wanted, bound)
    filled = []
    fill = tables._fill
    tables._fill = lambda k: filled.append(k) or fill(k)
    for k, t in enumerate(TIMESTEPS):
        expected = model.modulation(torch.full((4,), t), y)
        assert relative_error(tables.rows(k, 4), expected) < 1e-12
        assert 0 < tables.nbytes <= bound
    assert filled == list(range(0, 5, steps))
    assert relative_error(tables.rows(0, 4), model.modulation(torch.full((4,), 900), y)) < 1e-12


def test_a_bound_below_one_step_is_an_error():
    model = make(CONFIGS["silu"])
    make_tables(model, [1, 2], row_bytes(2))
    with pytest.raises(ValueError, match=r"table_bytes: one step of 2 distinct labels takes"):
        make_tables(model, [1, 2], row_bytes(2) - 1)
    model = make(CONFIGS["split"])
    with pytest.raises(ValueError, match=f"takes {row_bytes(3)} bytes, got 100"):
        make_tables(model, [1, 2, 2], 100)


@torch.no_grad()
def test_embedders_of_blocks_run_once_for_all_steps_and_distinct_labels():
    model, seen = make(CONFIGS["block-silu-null"]), []
    for block in model.blocks:
        for module in (block.t_embed, block.y_embed):
            module.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    tables = make_tables(model, [4, 9, 4, 4, 9, 9])
    for k in range(5):
        tables.rows(k, 6)
    assert seen == [5, 5, 2, 2]


@torch.no_grad()
@pytest.mark.parametrize(("name", "rows"), [("split", [2, 1, 5]), ("silu", [10])])
def test_only_distinct_rows_are_computed(name, rows):
    """Tables take 5 * 2 rows; split ones two rows of labels, one of zeros and five of steps."""
    model, seen = make(CONFIGS[name]), []
    model.final_mod.register_forward_hook(lambda layer, inputs, out: seen.append(len(out)))
    tables = make_tables(model, [4, 9, 4, 4, 9, 9])
    for k in range(5):
        tables.rows(k, 6)
    assert seen == rows
    assert tables.nbytes == (7 if name == "split" else 10) * WIDTH * 8


@torch.no_grad()
def test_tables_include_what_a_layer_subclass_adds():
    """An update beside a layer, such as a low-rank adapter's, counts in both tables."""

    class LowRank(torch.nn.Linear):
        def forward(self, c):
            return super().forward(c) + c[..., :1]

    model = make(CONFIGS["split"])
    layer = LowRank(16, 32).double()
    layer.load_state_dict(model.final_mod.state_dict())
    model.final_mod = layer
    y = torch.tensor([3, 1])
    tables = make_tables(model, y.tolist())
    expected = model.modulation(torch.full((2,), 500), y)
    assert relative_error(tables.rows(1, 2), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("bound", [2**20, row_bytes(4)], ids=["ample", "tight"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_store_serves_any_batch_within_its_bound(name, bound):
    model, cfg = make(CONFIGS[name]), CONFIGS[name]

    def linear(x, weight, bias):
        out = torch.nn.functional.linear(x, weight, bias)
        if len(weight) in (6 * 16, LAST):
            assert bytes_of(store) + bytes_of(tables) + out.nbytes <= bound
        return out

    def bytes_of(holder):
        held = getattr(holder, "_by_step", None), getattr(holder, "_by_label", None)
        return sum(t.nbytes for t in held if t is not None)

    store, tables = TableStore(PlainProjection(model, linear), TIMESTEPS, bound), None
    batches = [None, [3], [3, 1, 3], [0, 2], None, [9, 9, 9]] if cfg.use_class_cond else [None] * 2
    for labels in batches:
        rows = 3 if labels is None else len(labels)
        y = None if labels is None else torch.tensor(labels)
        tables = store.serve(labels)
        for k, t in enumerate(TIMESTEPS):
            expected = model.modulation(torch.full((rows,), t), y)
            assert relative_error(tables.rows(k, rows), expected) < 1e-12
            assert tables.nbytes <= bound
        tables = None


@torch.no_grad()
@pytest.mark.parametrize(("classes", "seen"), [(3, [5, 3]), (9, [5, 1, 2])])
def test_steps_and_few_labels_are_computed_once_for_all_batches(classes, seen):
    """All labels' rows are computed at once if there are no more labels than steps, here five."""
    model, rows = make(DiTConfig(**SMALL, num_classes=classes)), []

    def linear(x, weight, bias):
        if len(weight) == LAST:
            rows.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    store = TableStore(PlainProjection(model, linear), TIMESTEPS, 2**20)
    for labels in ([1], [2, 0], [0, 2, 2]):
        store.serve(labels).rows(0, len(labels))
    assert sorted(rows) == sorted(seen)


@torch.no_grad()
def test_rows_of_labels_that_could_not_be_made_are_made_again():
    """An interrupt, or memory that ran out, must not leave a store that takes none for made."""
    model, failing = make(CONFIGS["split"]), []

    def linear(x, weight, bias):
        if failing and len(weight) == LAST:
            raise MemoryError
        return torch.nn.functional.linear(x, weight, bias)

    store = TableStore(PlainProjection(model, linear), TIMESTEPS, 20 * row_bytes())
    expected = store.serve([5]).rows(1, 1)
    failing.append(True)
    with pytest.raises(MemoryError):
        store.serve([7])
    failing.clear()
    assert torch.equal(store.serve([5]).rows(1, 1), expected)


@torch.no_grad()
def test_tables_of_a_16_bit_model_count_the_dtype_that_its_linears_return():
    model = make(CONFIGS["split"]).bfloat16()

    def linear(x, weight, bias):
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), bias)

    bound = 20 * row_bytes(dtype=torch.float32)
    store = TableStore(PlainProjection(model, linear, torch.float32), TIMESTEPS, bound)
    by_step, by_label, _ = store.serve([1, 3]).steps(0, 5, 2)
    assert by_step.dtype == by_label.dtype == torch.float32
    assert by_step.nbytes + by_label.nbytes <= bound
