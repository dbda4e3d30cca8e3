"""The graph execution: its bookkeeping anywhere, captures and what they cost on a GPU."""

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, execution
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
    """What a captured graph does, on the CPU: `advance`, from and to the same tensors."""

    def __init__(self, predictor, state, inputs, guidance):
        self.arguments = predictor, state, inputs, guidance

    def replay(self):
        for own, new in zip(self.arguments[1], execution.advance(*self.arguments), strict=True):
            own.copy_(new)


@pytest.fixture
def graphs_without_cuda(monkeypatch):
    """Captures counted by batch size; all else of the graph execution is the real one."""
    captured = []

    def capture(self, predictor, state, inputs, guidance):
        captured.append(len(inputs.conditioning))
        state = execution.State(*map(execution._clone, state))
        inputs = execution.Inputs(*map(execution._clone, inputs))
        graph = FakeGraph(predictor, state, inputs, guidance)
        return execution._Captured(graph, state, inputs)

    monkeypatch.setattr(execution.Graphed, "_capture", capture)
    monkeypatch.setattr(Sampler, "_choose", lambda self, name: name)
    return captured


def without_cuda(sampler):
    """A sampler of the graph execution for a model on the CPU."""
    sampler.execution = "compile"
    engine = sampler._current_engine()
    engine._step = execution.Graphed(max_graphs=4)
    return sampler


def test_a_replayed_step_reads_and_writes_its_own_tensors(graphs_without_cuda):
    """Captured once for a batch size and a set of active rows, loaded with what is new."""
    model, scheduler = make_model(), make_scheduler()
    sampler = without_cuda(Sampler(model, scheduler, guidance=GUIDANCE, execution="graph"))
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
    assert graphs_without_cuda[4:] == [3, 6]  # brought noise is read, not made


def test_graphs_are_dropped_when_others_come_and_captured_again_with_a_warning(
    graphs_without_cuda,
):
    sampler = without_cuda(Sampler(make_model(), make_scheduler(), execution="graph"))
    for batch in (1, 2, 3, 4, 1, 5):  # the one of 2 is the one used longest ago
        sampler([0] * batch)
    assert graphs_without_cuda == [1, 2, 3, 4, 5]
    sampler([0])
    with pytest.warns(UserWarning, match="the graph for a batch of 2 is captured again, since 4 "):
        sampler([0, 0])
    assert graphs_without_cuda == [1, 2, 3, 4, 5, 2]


def test_a_graph_sampler_refuses_a_model_that_moved(graphs_without_cuda):
    model = make_model()
    sampler = Sampler(model, make_scheduler(), execution="graph")
    with pytest.raises(ValueError, match="model: expected one on CUDA.*got torch.float32 on cpu"):
        sampler([0])
    without_cuda(sampler)([0])
    sampler.execution = "graph"
    model.bfloat16()
    with pytest.raises(ValueError, match="model: expected torch.float32 on cpu.*make a new Samp"):
        sampler([0])


@pytest.mark.gpu
def test_auto_is_graph_on_a_gpu():
    assert Sampler(make_model("cuda"), make_scheduler()).execution == "graph"


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [False, True], ids=["seeds", "noise"])
def test_the_loop_never_waits_for_the_device(noise):
    """Tables are refilled in the loop here, and rows come and go with the interval."""
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
    """What a smaller batch's graph adds is its own state and inputs, not another pool."""
    sampler = Sampler(make_model("cuda"), make_scheduler())
    sampler([0] * 256)
    before = torch.cuda.memory_reserved()
    for batch in (255, 254, 253):
        sampler([0] * batch)
    state = 3 * 256 * 3 * 16 * 16 * 4 + 256 * (6 * 2 + 2) * 32 * 4
    assert torch.cuda.memory_reserved() - before <= 3 * 2 * state + 3 * 2**21
