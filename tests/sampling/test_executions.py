"""Every execution makes the images of the reference loop."""

import functools
import threading
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, reference
from fastdit.noise import normal
from fastdit.ops.trajectory import kernel_shape
from fastdit.sampling import steps
from fastdit.solvers import SOLVERS
from fastdit.testing import check_against_oracle, randomize, relative_error

STEPS = 12
TOY = DiTConfig(hidden=32, n_layers=2, n_heads=2)
PUBLISHED = DiTConfig(
    in_channels=4,
    hidden=32,
    n_layers=2,
    n_heads=2,
    num_classes=10,
    null_class=True,
    modulation_act="silu",
    gelu="tanh",
    ln_eps=1e-6,
    pos_embed="sincos",
    t_embed_width=64,
    t_embed_act="silu",
    learn_sigma=True,
)
NULL = DiTConfig(hidden=32, n_layers=2, n_heads=2, null_class=True)
EXECUTIONS = [
    "eager",
    "compile",
    pytest.param("graph", marks=pytest.mark.gpu),
    "trajectory",
]
by_execution = pytest.mark.parametrize("execution", EXECUTIONS)
by_stepwise_execution = pytest.mark.parametrize("execution", EXECUTIONS[:-1])
CASES = {
    "seed": (TOY, None),
    "null-class": (NULL, Guidance(3.0)),
    "published": (PUBLISHED, None),
    "published-guided": (PUBLISHED, Guidance(3.0, channels=3)),
    "published-interval": (PUBLISHED, Guidance(3.0, interval=(3, 8))),
}


def device_of(execution):
    on_gpu = torch.cuda.is_available() and execution != "trajectory"
    return "cuda" if execution == "graph" or on_gpu else "cpu"


def skip_unless_supported(execution, dtype):
    """Skip bfloat16 for the C++ loop where the CPU has no instructions for it."""
    if execution == "trajectory" and dtype == torch.bfloat16:
        if not torch.cpu.get_capabilities().get("avx512_bf16"):
            pytest.skip("needs AVX512-BF16")


def make_model(cfg=TOY, device="cpu"):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model.to(device)


def make_scheduler():
    return DiffusionScheduler(STEPS, schedule="cosine")


def recorded(batch, cfg, evaluations=STEPS):
    shape = evaluations + 1, batch, *cfg.sample_shape
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return z[0], z[1:]


class PlainModel(nn.Module):
    """The reference model in a dtype; its input and output have the dtype of the loop's state."""

    def __init__(self, cfg, dtype, device):
        super().__init__()
        self.inner = reference.DiT.from_config(cfg)
        randomize(self.inner)
        self.inner.to(device, dtype)

    def forward(self, x, t, y):
        dtype = self.inner.pos_embed.dtype
        return self.inner(x.to(dtype), t, y).to(torch.promote_types(dtype, torch.float32))


def plain_loop(model, table, x, labels, noise, guidance):
    """Sample with any solver by the reference's update, one row of the table after another."""
    x0, coefficients = torch.zeros_like(x), table.coefficients.to(x.device)
    for k, t in enumerate(table.timesteps):
        t_B = torch.full((len(x),), t, device=x.device)
        out, now = model(x, t_B, labels), guidance
        if guidance and guidance.active(t):
            out = torch.cat([out, model(x, t_B, None)])
        else:
            now = None
        step = torch.tensor(k, device=x.device)
        x, x0 = reference.sampler_update(
            x, out, coefficients, step, x0, noise=noise[k], guidance=now
        )
    return x


@by_execution
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "heun"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("cfg", "guidance"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_every_execution_obeys_the_error_rule(cfg, guidance, dtype, solver, execution):
    """Compare with a plain loop in float64 on the same noise; for "ddpm" it is the paper's."""
    skip_unless_supported(execution, dtype)
    device, scheduler = device_of(execution), make_scheduler()
    table = SOLVERS[solver].table(scheduler)
    labels = torch.tensor([3, 0, 9, 3, 5, 1, 2], device=device)
    x_T, noise = recorded(7, cfg, len(table.timesteps))
    x_T, noise = x_T.to(device), noise.to(device)

    def loop(dtype):
        model = PlainModel(cfg, dtype, device)
        state = torch.promote_types(dtype, torch.float32)
        given = x_T.to(state), labels, noise.to(state), guidance
        if solver == "ddpm":
            return reference.sample(model, scheduler, *given)
        return plain_loop(model, table, *given)

    sampler = Sampler(
        make_model(cfg, device),
        scheduler,
        solver,
        guidance=guidance,
        dtype=dtype,
        execution=execution,
    )
    images = sampler(labels, x_T=x_T, noise=noise)
    assert images.dtype == torch.float32
    check_against_oracle(images, loop(dtype), loop(torch.float64))


@by_execution
@torch.no_grad()
def test_every_execution_runs_embedders_of_blocks(execution):
    cfg = replace(PUBLISHED, embedders="block")
    device, guidance, scheduler = device_of(execution), Guidance(3.0, channels=3), make_scheduler()
    labels = torch.tensor([3, 0, 9, 3, 5, 1, 2], device=device)
    x_T, noise = (z.to(device) for z in recorded(7, cfg))
    plain, exact = (
        reference.sample(
            PlainModel(cfg, dtype, device),
            scheduler,
            x_T.to(dtype),
            labels,
            noise.to(dtype),
            guidance,
        )
        for dtype in (torch.float32, torch.float64)
    )
    sampler = Sampler(make_model(cfg, device), scheduler, guidance=guidance, execution=execution)
    check_against_oracle(sampler(labels, x_T=x_T, noise=noise), plain, exact)


@by_execution
@pytest.mark.parametrize(
    ("cfg", "guidance"), [CASES["seed"], CASES["published-interval"]], ids=["seed", "interval"]
)
def test_an_image_does_not_depend_on_batch_order_or_execution(cfg, guidance, execution):
    device = device_of(execution)
    model, scheduler = make_model(cfg, device), make_scheduler()
    sampler = Sampler(model, scheduler, guidance=guidance, execution=execution)
    labels, keys = [0, 5, 9, 7, 3, 3, 7], [2**40, 1, 2, 3, 4, 5, 0]
    together = sampler(labels, seeds=keys)
    assert relative_error(sampler(labels[::-1], seeds=keys[::-1]).flip(0), together) < 1e-5
    for i in (0, 4):
        alone = sampler(labels[i : i + 1], seeds=keys[i : i + 1])
        assert relative_error(alone[0], together[i]) < 1e-5
    eager = Sampler(model, scheduler, guidance=guidance, execution="eager")
    assert relative_error(together, eager(labels, seeds=keys)) < 1e-5
    assert relative_error(together[4], together[5]) > 0.1  # the same label, two seeds


@pytest.mark.parametrize("execution", ["eager", "trajectory"])
@pytest.mark.parametrize("img_size", [(8, 32), (32, 8)], ids=str)
@torch.no_grad()
def test_images_of_any_shape_are_those_of_the_plain_loop(img_size, execution):
    cfg, guidance = replace(NULL, img_size=img_size), Guidance(2.0)
    device, scheduler = device_of(execution), DiffusionScheduler(3, schedule="cosine")
    sampler = Sampler(make_model(cfg, device), scheduler, guidance=guidance, execution=execution)
    labels, predicted = torch.tensor([3, 0]), []
    x_T, noise = recorded(2, cfg, 3)
    images = sampler(labels, x_T=x_T, noise=noise, progress=lambda k, x0: predicted.append(x0))
    assert images.shape == predicted[0].shape == (2, 3, *img_size)
    plain = PlainModel(cfg, torch.float64, "cpu")
    exact = reference.sample(plain, scheduler, x_T.double(), labels, noise.double(), guidance)
    assert relative_error(images, exact) < 1e-5


@by_execution
@torch.no_grad()
def test_the_noise_of_a_seed_is_counted_in_the_tokens_of_any_grid(execution):
    cfg = DiTConfig(img_size=(8, 32), hidden=8, n_layers=1, n_heads=2)
    device, scheduler = device_of(execution), DiffusionScheduler(2, schedule="cosine")
    sampler = Sampler(make_model(cfg, device), scheduler, execution=execution)
    labels = torch.tensor([3, 0])
    z = normal(torch.tensor([[7, 0], [7, 1]]), torch.arange(3), 3 * 8 * 32).double()
    z = z.view(3, 2, 2, 8, 4, 4, 3).permute(0, 1, 6, 2, 4, 3, 5).reshape(3, 2, 3, 8, 32)
    plain = PlainModel(cfg, torch.float64, "cpu")
    exact = reference.sample(plain, scheduler, z[0], labels, z[1:])
    assert relative_error(sampler(labels, seed=7), exact) < 1e-5


def test_kernels_see_tokens_and_not_the_grid():
    """A model of 2 x 8 patches can be sampled by each kernel that takes one of 4 x 4."""
    wide, square = DiTConfig(img_size=(8, 32)), DiTConfig(img_size=16)
    assert kernel_shape(wide) == kernel_shape(square)


def test_compile_makes_two_graphs_for_all_steps_batches_and_samplers(monkeypatch):
    """One graph is for a single image, one for more; no step and no other sampler recompiles."""
    COMPILED.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(steps, "_compiled_advance", functools.cache(counted_advance))
    for seed in (0, 1):
        model = make_model()
        randomize(model, seed)
        sampler = Sampler(model, make_scheduler(), execution="compile")
        for labels in ([3], [1, 2], [4, 5, 6], [7], [1] * 8):
            assert sampler(labels).isfinite().all()
        sampler([1, 2], x_T=torch.randn(2, *TOY.sample_shape, requires_grad=True))
        assert len(COMPILED) == 2
    for T in (5, 9):
        Sampler(model, DiffusionScheduler(T), execution="compile")([1, 2])
    assert len(COMPILED) == 2


def test_compile_survives_changes_of_the_number_of_threads(monkeypatch):
    """PyTorch guards graphs on the number, and gives up after eight recompilations."""
    torch._dynamo.reset()
    monkeypatch.setattr(steps, "_compiled_advance", functools.cache(counted_advance))
    sampler, threads = Sampler(make_model(), make_scheduler(), execution="compile"), []
    images, before = sampler([1, 2], seed=3), torch.get_num_threads()
    try:
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10):
            torch.set_num_threads(n)
            threads.append(sampler([1, 2], seed=3))
    finally:
        torch.set_num_threads(before)
    assert all(relative_error(other, images) < 1e-5 for other in threads)


def test_compile_serves_any_guidance_scale_after_the_second(monkeypatch):
    COMPILED.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(steps, "_compiled_advance", functools.cache(counted_advance))
    model, counts = make_model(PUBLISHED), []
    for scale in (1.5, 2.0, 3.0, 4.0, 7.5):
        guidance = Guidance(scale, interval=(3, 8))
        sampler = Sampler(model, make_scheduler(), guidance=guidance, execution="compile")
        eager = Sampler(model, make_scheduler(), guidance=guidance, execution="eager")
        for labels in ([1, 2], [3]):
            assert relative_error(sampler(labels), eager(labels)) < 1e-5
        counts.append(len(COMPILED))
    # Four graphs: guided or not, one image or more. The second scale recompiles the guided two.
    assert counts == [4, 6, 6, 6, 6]


COMPILED: list[int] = []


def counted_advance(*kind):
    """Compile a step for each kind, as the package does, but with a backend that only counts."""

    def count(graph, inputs):
        COMPILED.append(len(inputs))
        return graph.forward

    own = types.FunctionType(steps.advance.__code__.replace(), steps.advance.__globals__)
    return torch.compile(own, backend=count, fullgraph=True)


@by_execution
def test_two_samplers_in_two_threads_do_not_disturb_one_another(execution):
    def make(seed, cfg, guidance):
        model = make_model(cfg, device_of(execution))
        randomize(model, seed)
        return Sampler(model, make_scheduler(), guidance=guidance, execution=execution)

    def both():
        return make(0, TOY, None), make(1, PUBLISHED, Guidance(2.0, interval=(2, 9)))

    alone = [sampler([1, 2, 3], seed=i) for i, sampler in enumerate(both())]
    together: list = [[], []]
    start = threading.Barrier(2)

    def work(i, sampler):
        start.wait()
        for _ in range(4):
            together[i].append(sampler([1, 2, 3], seed=i))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(both())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 4
        assert all(torch.equal(result, expected) for result in results)


def test_one_sampler_in_two_threads_takes_turns():
    sampler = Sampler(make_model(), make_scheduler(), dtype=torch.bfloat16)
    alone = [sampler([1, 2], seed=i) for i in range(2)]
    results = [None, None]

    def work(i):
        results[i] = sampler([1, 2], seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, alone))


@by_stepwise_execution
def test_a_progress_function_gets_each_step_and_the_predicted_image(execution):
    device = device_of(execution)
    model, scheduler = make_model(device=device), make_scheduler()
    sampler, seen = Sampler(model, scheduler, execution=execution), []
    images = sampler([1, 2], seed=3, progress=lambda k, x0: seen.append((k, x0)))
    assert torch.equal(images, sampler([1, 2], seed=3))
    assert [k for k, _ in seen] == list(range(STEPS))
    assert all(x0.shape == images.shape for _, x0 in seen)
    # At t = 0 no noise is added, and the posterior's mean is the predicted image.
    assert relative_error(seen[-1][1], images) < 1e-5
    assert relative_error(seen[0][1], images) > 0.01


@by_stepwise_execution
def test_a_sampler_first_called_in_inference_mode_works_outside(execution):
    sampler = Sampler(
        make_model(device=device_of(execution)),
        make_scheduler(),
        dtype=torch.bfloat16,
        execution=execution,
    )
    with torch.inference_mode():
        inside = sampler([3, 1])
    assert torch.equal(sampler([3, 1]), inside)


def test_calling_a_sampler_within_its_own_call_is_an_error_not_a_deadlock():
    sampler = Sampler(make_model(), make_scheduler())
    with pytest.raises(RuntimeError, match="progress: a sampler cannot sample within its own call"):
        sampler([0], progress=lambda k, x0: sampler([0]))
    assert sampler([0]).isfinite().all()


def test_graph_needs_cuda():
    with pytest.raises(ValueError, match="execution: 'graph' needs a model on CUDA, got one on"):
        Sampler(make_model(), make_scheduler(), execution="graph")


@pytest.mark.parametrize("patch_size", [1, 4])
def test_images_and_progress_own_their_memory(patch_size):
    """The next step overwrites a graph's tensors, so none of them may be returned."""
    model = make_model(DiTConfig(img_size=4, patch_size=patch_size, in_channels=1, n_layers=1))
    sampler, kept = Sampler(model, make_scheduler()), []
    engine_images = sampler([1], progress=lambda k, x0: kept.append(x0))
    pointers = {x0.untyped_storage().data_ptr() for x0 in [*kept, engine_images]}
    assert len(pointers) == STEPS + 1
