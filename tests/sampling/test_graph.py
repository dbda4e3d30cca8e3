"""The graph execution: its bookkeeping on any machine, real captures and their costs on a GPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, functional
from fastdit.ops import dispatch
from fastdit.sampling import executions, graphs, steps
from fastdit.sampling.modulation import Tables
from fastdit.sampling.predictors import DiTPredictor
from fastdit.testing import randomize, relative_error

STEPS = 12
CFG = DiTConfig(hidden=32, n_layers=2, n_heads=2, null_class=True, modulation_act="silu")
GUIDANCE = Guidance(3.0, interval=(3, 8))


def make_model(device="cpu"):
    model = fastdit.DiT.from_config(CFG)
    randomize(model)
    return model.to(device)


def make_scheduler():
    return DiffusionScheduler(STEPS, schedule="cosine")


class FakeGraph:
    """Stands for a captured graph on the CPU: runs `advance_in_place` on tensors of its own."""

    def __init__(self, predictor, state, inputs, guidance):
        self.arguments = predictor, state, inputs, guidance

    def replay(self):
        steps.advance_in_place(*self.arguments)


@pytest.fixture
def graphs_without_cuda(monkeypatch):
    """Replace captures by fakes, and return the list of their row counts."""
    captured = []

    def capture(self, predictor, state, inputs, guidance):
        captured.append(len(inputs.conditioning))
        state, inputs = graphs.own_tensors(state, inputs)
        graph = FakeGraph(predictor, state, inputs, guidance)
        return graphs._Captured(graph, state, inputs)

    monkeypatch.setattr(graphs.Graphed, "_capture", capture)
    graph = executions.EXECUTIONS["graph"]
    anywhere = graph._replace(obstacle=lambda subject: None)
    monkeypatch.setitem(executions.EXECUTIONS, "graph", anywhere)
    return captured


def test_a_replayed_step_reads_and_writes_its_own_tensors(graphs_without_cuda):
    """A step is captured once for each number of images and rows; later values are copied in."""
    model, scheduler = make_model(), make_scheduler()
    sampler = Sampler(model, scheduler, guidance=GUIDANCE, execution="graph")
    eager = Sampler(model, scheduler, guidance=GUIDANCE, execution="eager")
    first = sampler([1, 2, 3], seed=5)
    kept = first.clone()
    assert relative_error(first, eager([1, 2, 3], seed=5)) < 1e-5
    for labels, seed in (([4, 5, 6], 8), ([4], 9), ([7, 8, 9], 5)):
        images = sampler(labels, seed=seed)
        assert relative_error(images, eager(labels, seed=seed)) < 1e-5
    assert torch.equal(first, kept)
    assert graphs_without_cuda == [3, 6, 1, 2]
    z = torch.randn(STEPS + 1, 3, *CFG.sample_shape)
    x_T, noise = z[0], z[1:]
    images = sampler([1, 2, 3], x_T=x_T, noise=noise)
    assert relative_error(images, eager([1, 2, 3], x_T=x_T, noise=noise)) < 1e-5
    assert graphs_without_cuda[4:] == [3, 6]  # graphs that read noise instead of making it


def test_texts_of_one_padded_length_share_a_graph(graphs_without_cuda, monkeypatch):
    """A text is loaded into the graph's own buffers once a call, and not once a step."""
    options = dict(img_size=4, hidden=8, n_layers=1, n_heads=2, text_width=8, text_tokens=16)
    model, loads, load = fastdit.PixArt(**options), [], graphs._load
    randomize(model)
    scheduler = make_scheduler()
    sampler = Sampler(model, scheduler, guidance=GUIDANCE, execution="graph")
    eager = Sampler(model, scheduler, guidance=GUIDANCE, execution="eager")
    monkeypatch.setattr(graphs, "_load", lambda own, new: loads.append(len(new)) or load(own, new))
    for lengths in ([3, 7], [8, 2], [3, 16], [3, 7]):
        loads.clear()
        prompts = [torch.randn(n, 8) for n in lengths]
        given = dict(prompt_embeds=prompts, negative_prompt_embeds=prompts[:1], seed=3)
        images = sampler(**given)
        # Seeds, coefficients, text, lengths and positions, of a guided and an unguided graph.
        assert loads.count(5) == 2
        assert relative_error(images, eager(**given)) < 1e-5
    assert graphs_without_cuda == [2, 4, 2, 4]


def test_the_least_recently_used_graph_is_dropped_with_a_warning(
    graphs_without_cuda, monkeypatch, recwarn
):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    sampler = Sampler(make_model(), make_scheduler(), execution="graph")
    for batch in (1, 2, 3, 4, 1):
        sampler([0] * batch)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="more than 4 kinds of batches") as warned:
        sampler([0] * 5)  # replaces the graph for two
    assert warned[0].filename == __file__
    sampler([0])
    assert graphs_without_cuda == [1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="more than 4 kinds of batches"):
        sampler([0, 0])
    assert graphs_without_cuda == [1, 2, 3, 4, 5, 2]


def test_a_graph_sampler_refuses_a_model_that_was_cast(graphs_without_cuda):
    model = make_model()
    sampler = Sampler(model, make_scheduler(), execution="graph")
    sampler([0])
    model.bfloat16()
    with pytest.raises(ValueError, match="model: expected torch.float32 on cpu.*make a new Samp"):
        sampler([0])


def test_a_graph_belongs_to_one_autocast_dtype(graphs_without_cuda):
    """Entering and leaving autocast neither fails nor captures a graph again."""
    sampler = Sampler(make_model(), make_scheduler(), execution="graph")
    plain = sampler([0])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = sampler([0])
    assert torch.equal(sampler([0]), plain) and not torch.equal(narrow, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler([0]), narrow)
    assert graphs_without_cuda == [1, 1]


def test_a_graph_made_in_inference_mode_runs_outside(graphs_without_cuda):
    sampler = Sampler(make_model(), make_scheduler(), execution="graph")
    with torch.inference_mode():
        inside = sampler([3])
    assert torch.equal(sampler([3]), inside)


@pytest.mark.gpu
def test_auto_is_graph_on_a_gpu():
    assert Sampler(make_model("cuda"), make_scheduler()).execution_for() == "graph"


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [False, True], ids=["seeds", "noise"])
def test_the_loop_never_waits_for_the_device(noise):
    """Here the loop refills its tables, and the interval changes the number of rows."""
    sampler = Sampler(make_model("cuda"), make_scheduler(), guidance=GUIDANCE, table_bytes=2**15)
    options = {}
    if noise:
        options["noise"] = torch.randn(STEPS, 2, *CFG.sample_shape)
    expected = sampler([1, 2], **options)

    def watch(k, x0):
        torch.cuda.set_sync_debug_mode("error" if k < STEPS - 1 else "default")

    try:
        images = sampler([1, 2], progress=watch, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images, expected)


@pytest.mark.gpu
def test_graphs_of_all_batch_sizes_share_their_memory():
    """A smaller batch's graph adds its own state and inputs, but no other memory pool."""
    sampler = Sampler(make_model("cuda"), make_scheduler())

    def reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    sampler([0] * 256)
    before = reserved()
    for batch in (255, 254, 253):
        sampler([0] * batch)
    state = 3 * 256 * 3 * 16 * 16 * 4 + 256 * (6 * 2 + 2) * 32 * 4
    assert reserved() - before <= 3 * 2 * state + 3 * 2**21


@pytest.mark.gpu
def test_a_graph_outlives_other_graphs_and_their_freed_memory(monkeypatch):
    """Its workspace and pool stay valid while graphs are dropped and freed memory is poisoned."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = make_model("cuda")
    sampler = Sampler(model, make_scheduler())
    eager = Sampler(model, make_scheduler(), execution="eager")
    with pytest.warns(UserWarning, match="more than 2 kinds"):
        for batch in (64, 32, 48):
            sampler([0] * batch)
    torch._dynamo.reset()
    other = torch.compile(torch.nn.Linear(64, 64).cuda(), mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            other(torch.randn(8, 64, device="cuda"))
    torch.cuda.empty_cache()
    poison = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(256)]
    for batch in (32, 48):
        assert relative_error(sampler([0] * batch), eager([0] * batch)) < 1e-5
    assert all(p.isnan().all() for p in poison)


@pytest.mark.gpu
def test_a_failed_capture_leaves_a_sampler_that_works(monkeypatch):
    model = make_model("cuda")
    sampler = Sampler(model, make_scheduler())
    denoise, calls = fastdit.DiT.denoise, []

    def failing(self, tokens, modulation):
        calls.append(0)
        if len(calls) == 2:  # the first is the warm-up
            raise RuntimeError("in a capture")
        return denoise(self, tokens, modulation)

    with monkeypatch.context() as patch:
        patch.setattr(fastdit.DiT, "denoise", failing)
        with pytest.raises(RuntimeError, match="in a capture"):
            sampler([0])
    eager = Sampler(model, make_scheduler(), execution="eager")
    assert relative_error(sampler([0]), eager([0])) < 1e-5
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


# Ops that launch no kernel: allocations and views.
VIEWS = {
    "new_empty",
    "view",
    "t",
    "permute",
    "split",
    "expand",
    "_unsafe_view",
    "slice",
    "select",
    "unsqueeze",
}


class Nodes(TorchDispatchMode):
    """Counts kernel launches: one for each op that is neither an allocation nor a view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def nodes_of_a_step(monkeypatch, cfg, dtype, guidance):
    """Count the nodes of one step's capture for two images by op, on tensors without data."""
    monkeypatch.setattr(dispatch, "_triton_on", lambda *_: None)
    monkeypatch.setattr(functional.mlp, "fuses_gelu", lambda *_: True)
    B, rows = 2, 4 if guidance else 2
    with torch.device("meta"), torch.no_grad():
        predictor = DiTPredictor(fastdit.DiT.from_config(cfg), dtype, copies=True)
        x = torch.empty(B, cfg.img_size**2, cfg.in_channels)
        state = steps.State(x, torch.empty_like(x), torch.empty((), dtype=torch.int64))
        width = (6 * cfg.n_layers + 2) * cfg.hidden
        inputs = steps.Inputs(
            torch.empty(rows, width, dtype=dtype),
            None,
            torch.empty(B, 2, dtype=torch.int64),
            torch.empty(50, 10),
        )
        with Nodes() as nodes:
            steps.advance_in_place(predictor, state, inputs, guidance)
    return nodes.counts


def test_a_captured_step_holds_few_nodes(monkeypatch):
    """A layer has four products, attention, two LayerNorm passes and, if it is exact, a GELU."""
    xl = fastdit.PRESETS["DiT-XL/2"]
    counts = nodes_of_a_step(monkeypatch, xl, torch.bfloat16, Guidance(4.0, channels=3))
    assert counts.pop("_addmm_activation") == xl.n_layers
    assert counts == {
        "_to_copy": 1,  # twice the tokens, in the model's dtype
        "addmm": 3 * xl.n_layers + 2,
        "add": 1,  # positions
        "layer_norm_modulate": 1,
        "gated_residual_layer_norm_modulate": 2 * xl.n_layers,
        "attention": xl.n_layers,
        "sampler_update_out": 1,
        "add_": 1,  # the step's number
    }
    toy = nodes_of_a_step(monkeypatch, fastdit.PRESETS["toy"], torch.float32, None)
    assert toy.total() == 4 * (4 + 1 + 2 + 1) + 6


def test_a_steps_modulation_is_gathered_into_its_graphs_input(graphs_without_cuda, monkeypatch):
    """From the second step on, rows are gathered into the tensor that the graph reads."""
    gathered, rows_of = [], Tables.rows

    def watch(self, k, rows, out=None):
        gathered.append(out is not None)
        return rows_of(self, k, rows, out)

    monkeypatch.setattr(Tables, "rows", watch)
    sampler = Sampler(make_model(), make_scheduler(), execution="graph")
    sampler([1, 2, 3])
    assert gathered == [False] + [True] * (STEPS - 1)
    sampler([1, 2, 3])
    assert all(gathered[STEPS:])
