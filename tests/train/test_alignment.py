"""REPA's alignment: its loss, what is trained with it, and which features fit a run."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import DiTConfig
from fastdit.data.features import Features
from fastdit.testing import randomize
from fastdit.train.alignment import Alignment
from fastdit.train.loading import BatchLoader, draw_variants
from fastdit.train.objective import Objective, random_key
from fastdit.train.recipe import RECIPES, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.sources import FeaturedBatch, ImageBatch, Shapes
from fastdit.train.trainer import Trainer

CONFIG = DiTConfig(hidden=8, n_layers=2, n_heads=2, null_class=True)  # 16 tokens
FLOW = replace(
    RECIPES["flow"],
    steps=4,
    batch_size=8,
    warmup=1,
    align_weight=0.5,
    align_depth=1,
    align_width=12,
)


def array(images=32, tokens=16, dtype=np.float16):
    generator = np.random.default_rng(0)
    return generator.standard_normal((images, tokens, 6)).astype(dtype)


@pytest.fixture
def features(tmp_path):
    np.save(tmp_path / "features.npy", array())
    return Features(tmp_path / "features.npy")


def trainer(features, out=None, recipe=FLOW, **options):
    return Trainer(CONFIG, recipe, Shapes(2), out, features=features, **options)


def state(trained):
    return {name: t.clone() for name, t in trained._tensors().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_is_the_weighted_mean_of_the_negative_cosines():
    alignment = Alignment(8, 12, 6, 0.7, 1).double()
    hidden, features = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 6).half()
    first, second, third = (p for p in alignment.projector if hasattr(p, "weight"))
    h = hidden
    for layer in (first, second):
        h = h @ layer.weight.T + layer.bias
        h = h / (1 + (-h).exp())
    projected, target = h @ third.weight.T + third.bias, features.double()
    products = (projected * target).sum(-1)
    cosines = products / (projected.square().sum(-1) * target.square().sum(-1)).sqrt()
    assert cosines.shape == (3, 5)
    assert alignment(hidden, features).item() == pytest.approx(-0.7 * cosines.mean().item())
    assert (first.out_features, second.out_features, third.out_features) == (12, 12, 6)


@pytest.mark.parametrize("recipe", [FLOW, replace(Recipe(), align_depth=1)], ids=["flow", "ddpm"])
def test_a_runs_loss_is_the_sum_of_both_and_trains_the_blocks_before(recipe):
    model = fastdit.DiT.from_config(CONFIG)
    randomize(model)
    alignment = Alignment(8, 12, 6, 0.7, 1)
    process, z = recipe.process(), torch.randn(8, 16, 6)
    plain = Objective(model, CONFIG, process, 0)
    own = Objective(model, CONFIG, process, 0, alignment=alignment)
    images, numbers = Shapes(1).take(torch.arange(8)), torch.arange(8)
    batch = own.draw(images, numbers)
    t = batch.t if recipe.path is None else process.scaled(batch.t)
    _, hidden = model(batch.x_t, t, batch.labels, hidden_after=1)
    of_alignment, of_model = alignment(hidden, z), plain(images, numbers)
    loss = own(FeaturedBatch(*images, z), numbers)
    assert loss.item() == pytest.approx((of_alignment + of_model).item(), rel=1e-6)
    (loss - of_model).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    of_last = [name for name in grads if name.startswith(("blocks.1.", "final_"))]
    assert all(grads[name].abs().max() < 1e-6 for name in of_last)
    assert all(g.abs().max() > 1e-6 for n, g in grads.items() if n.startswith("blocks.0.mlp"))
    assert all(p.grad.abs().max() > 1e-6 for p in alignment.parameters())


def test_the_projector_is_trained_and_kept_with_the_run_but_not_with_the_model(features, tmp_path):
    aligned, plain = trainer(features, tmp_path / "run"), trainer(None, recipe=_without(FLOW))
    assert same(aligned.model.state_dict(), plain.model.state_dict()), "the model is drawn first"
    before = state(aligned)
    aligned.run()
    names = {f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    after = state(aligned)
    assert {name for name in after if name.startswith("projector")} == names
    assert not any(torch.equal(after[name], before[name]) for name in names)
    saved = RunFolder(tmp_path / "run").newest()
    moments = {f"optimizer.{name}.exp_avg" for name in names}
    assert names | moments <= saved.tensors.keys()
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert model.keys() == plain.model.state_dict().keys()
    assert fastdit.load(tmp_path / "run").diffusion == FLOW.process().options
    assert saved.header["features"]["file"] == str(features.path)


def _without(recipe):
    return replace(recipe, align_weight=0.0)


def test_an_aligned_run_resumes_bit_for_bit(features, tmp_path):
    whole = trainer(features)
    losses = whole.run().losses
    stopped = trainer(features, tmp_path, save_every=2, keep=9)
    stopped.run()
    (tmp_path / "checkpoints" / "step-00000004.safetensors").unlink()
    resumed = Trainer.resume(RunFolder(tmp_path).newest(), tmp_path)
    assert resumed.step == 2
    assert torch.equal(resumed.run().losses, losses)
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize(
    "options",
    [{"accumulate": 2}, {"compile": "block", "checkpointing": True}, {"precision": "bfloat16"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_loss_does_not_depend_on_how_it_is_computed(features, options):
    torch._dynamo.reset()
    expected = trainer(features).run().losses
    losses = trainer(features, runtime=Runtime(**options)).run().losses
    rel = 0.02 if "precision" in options else 1e-5
    torch.testing.assert_close(losses, expected, rtol=rel, atol=rel)


def test_a_compiled_loss_takes_flows_and_features(features):
    """The whole loss with its draws, as `--compile whole` does."""
    torch._dynamo.reset()
    recipe = replace(FLOW, time_draw="logit-normal", time_shift=0.5, direction_loss=1.0)
    expected = trainer(features, recipe=recipe).run().losses
    losses = trainer(features, recipe=recipe, runtime=Runtime(compile="whole")).run().losses
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


class Rows:
    """Ten images with mirror images, which are their rows' numbers."""

    sample_shape, label_names, identity, variants = (1, 1, 1), ("any",), {"kind": "rows"}, 2

    def __len__(self):
        return 10

    def take(self, rows):
        return ImageBatch(rows.float()[:, None, None, None], None, torch.zeros_like(rows))


def test_each_batch_has_the_features_of_its_images_and_of_their_mirror_images(tmp_path):
    recipe = Recipe(steps=20, batch_size=4)
    np.save(tmp_path / "f.npy", np.arange(20, dtype=np.float32)[:, None, None])
    loader = BatchLoader(Rows(), recipe, Runtime(), features=Features(tmp_path / "f.npy"))
    batches = [loader.load(step)[0] for step in range(20)]
    assert all(torch.equal(b.features.flatten(), b.mean.flatten()) for b in batches)
    drawn = draw_variants(random_key(recipe.seed, "variants"), range(80), 2)
    seen = torch.cat([b.features.flatten() for b in batches]).long() // 10
    assert torch.equal(seen, drawn) and len(seen.unique()) == 2


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (31, 16), "features: expected 32 rows, one an image, got 31 "),
        ({}, (32, 15), "features: expected 16 tokens an image, as the model has, got 15 "),
        ({}, None, "features: expected those of the images, since align_weight=0.5 needs them"),
        ({"align_weight": 0}, (32, 16), "align_weight: expected above 0, since there are features"),
        ({"align_depth": 3}, (32, 16), "align_depth: expected at most the model's 2 blocks, got 3"),
    ],
)
def test_features_that_do_not_fit_are_refused(changes, shape, message, tmp_path):
    features = None
    if shape:
        np.save(tmp_path / "f.npy", array(*shape))
        features = Features(tmp_path / "f.npy")
    with pytest.raises(ValueError) as error:
        trainer(features, recipe=replace(FLOW, **changes))
    assert str(error.value).startswith(message)


def test_mirror_images_need_features_of_their_own(features):
    class Mirrored(Shapes):
        variants = 2

    expected = "expected 64 rows, one an image, and after the 32 images' those of their mirror"
    with pytest.raises(ValueError, match=f"^features: {expected} images, got 32"):
        Trainer(CONFIG, FLOW, Mirrored(2), features=features)


def test_a_run_goes_on_with_its_own_features(features, tmp_path):
    out = tmp_path / "run"
    trainer(features, out).run()
    saved = RunFolder(out).newest()
    moved = tmp_path / "moved.npy"
    features.path.rename(moved)
    with pytest.raises(ValueError, match="^features: expected a .npy or .safetensors file of one"):
        Trainer.resume(saved, out)
    assert Trainer.resume(saved, out, features=Features(moved)).step == 4
    np.save(tmp_path / "other.npy", array() + 1)
    other = Features(tmp_path / "other.npy")
    with pytest.raises(ValueError, match="^features: the run was started on others than .*other.n"):
        Trainer.resume(saved, out, features=other)
    new = dict(source=Shapes(2, seed=1), new_data=True, changes={"steps": 5})
    assert Trainer.resume(saved, out, features=other, **new).run().finished
    for changes, message in (
        ({"align_weight": 0.0}, "align_weight: the run was started with 0.5, got 0.0; an alignmen"),
        ({"align_depth": 2}, "align_depth: the run was started with 1, got 2; its projector has"),
        ({"path": "gvp"}, "path: the run was started with linear, got gvp; its weights have learn"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Trainer.resume(saved, out, features=Features(moved), changes=changes)
    rate = Trainer.resume(
        saved, out, features=Features(moved), changes={"align_weight": 0.1, "steps": 5}
    )
    assert rate.alignment.weight == 0.1


def test_a_run_that_began_without_alignment_takes_no_features(features, tmp_path):
    trainer(None, tmp_path / "run", _without(FLOW)).run()
    saved = RunFolder(tmp_path / "run").newest()
    assert saved.header["features"] is None
    with pytest.raises(ValueError, match="^features: expected none, since the run was started"):
        Trainer.resume(saved, tmp_path / "run", features=features)


TWO = """
import sys, torch
from dataclasses import replace
from fastdit.data.features import Features
from fastdit.train.distributed import processes
from fastdit.train.runtime import Runtime
sys.path.insert(0, sys.argv[1])
from test_alignment import CONFIG, FLOW, Shapes, Trainer
with processes() as world:
    for strategy in ("ddp", "fsdp"):
        runtime = Runtime(world=world, strategy=strategy, accumulate=2)
        own = Trainer(CONFIG, FLOW, Shapes(2), f"{sys.argv[2]}/{strategy}", runtime,
                      features=Features(sys.argv[3]))
        own.run()
    world.wait()
"""


def test_two_processes_have_the_losses_and_the_projector_of_one(features, tmp_path):
    alone = trainer(features, tmp_path / "alone")
    alone.run()
    (tmp_path / "two.py").write_text(TWO)
    launcher = "-W ignore -m torch.distributed.run --standalone --nproc-per-node 2".split()
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, *launcher, tmp_path / "two.py", here, tmp_path, features.path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = RunFolder(tmp_path / "alone").newest().tensors
    for strategy in ("ddp", "fsdp"):
        tensors = RunFolder(tmp_path / strategy).newest().tensors
        assert tensors.keys() == expected.keys()
        torch.testing.assert_close(tensors["history"], expected["history"], rtol=1e-4, atol=1e-5)
        for name in (name for name in expected if name.startswith(("projector.", "model."))):
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=1e-5)
