"""What models with the newer options of blocks promise beyond the parity of tests/test_model.py."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, flops, reference
from fastdit.functional import rope_table
from fastdit.noise import normal
from fastdit.testing import check_against_oracle, randomize, relative_error

LIGHTNING = DiTConfig(
    img_size=8,
    patch_size=2,
    in_channels=4,
    hidden=24,
    n_layers=2,
    n_heads=2,
    num_classes=5,
    null_class=True,
    modulation_act="silu",
    norm="rms",
    modulation_shift=False,
    qk_norm="rms",
    rope=True,
    mlp="swiglu",
)
JIT = replace(
    LIGHTNING,
    n_layers=3,
    modulation_shift=True,
    patch_bottleneck=3,
    context_tokens=3,
    context_start=1,
)
SPLIT = replace(JIT, modulation_act="none", context_start=None)
CONFIGS = {"lightning": LIGHTNING, "jit": JIT, "split": SPLIT}
by_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
SCHEDULER = DiffusionScheduler(8, schedule="cosine")


def make_model(cfg):
    torch.manual_seed(0)
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model


@pytest.mark.parametrize(("after", "tokens"), [(1, 16), (2, 19), (3, 19)])
def test_the_hidden_state_is_the_stream_after_some_blocks(after, tokens):
    model = make_model(JIT).double()
    plain = reference.DiT.from_config(JIT).double()
    plain.load_state_dict(model.state_dict())
    seen = []
    plain.blocks[after - 1].register_forward_hook(lambda module, given, out: seen.append(out))
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([1, 7]), torch.tensor([0, 4])
    expected = plain(x, t, y)
    out, hidden = model(x, t, y, hidden_after=after)
    assert seen[0].shape[1] == tokens and hidden.shape == (2, 16, 24)
    assert relative_error(hidden, seen[0][:, -16:]) < 1e-12
    assert relative_error(out, expected) < 1e-12


@pytest.mark.parametrize("wrong", [0, 4, "2"])
def test_a_hidden_state_after_no_block_is_refused(wrong):
    with pytest.raises(ValueError, match="hidden_after: expected from 1 to n_layers=3, got"):
        make_model(JIT)(torch.zeros(1, 4, 8, 8), torch.zeros(1), hidden_after=wrong)


def test_the_rotary_table_follows_the_model_and_stays_in_float32():
    model = make_model(JIT)
    table = rope_table(12, (4, 4), context=3)
    assert "rope" not in model.state_dict() and torch.equal(model.rope, table)
    with torch.device("meta"):
        empty = fastdit.DiT.from_config(JIT)
    assert empty.rope.is_meta
    filled = copy.deepcopy(empty)
    filled.load_state_dict(model.state_dict(), assign=True)
    empty.to_empty(device="cpu")
    copied = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (model.bfloat16(), *copied, empty, filled):
        assert torch.equal(other.rope, table)


def test_context_tokens_do_not_turn_and_patches_turn_by_row_and_column():
    cos, sin = rope_table(12, (2, 3), context=2)
    assert cos.shape == (8, 6) and (cos[:2] == 1).all() and not sin[:2].any()
    frequencies = 10000.0 ** -(torch.arange(3) / 3)
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angles = torch.cat([row * frequencies, column * frequencies])
        torch.testing.assert_close(cos[2 + token], angles.cos())
        torch.testing.assert_close(sin[2 + token], angles.sin())


@pytest.mark.parametrize(
    ("cfg", "execution", "scale"),
    [
        (LIGHTNING, "eager", None),
        (LIGHTNING, "eager", 2.0),
        (JIT, "eager", None),
        (JIT, "eager", 2.0),
        (SPLIT, "eager", None),
        (SPLIT, "eager", 2.0),
        (replace(JIT, n_layers=2), "compile", 2.0),
    ],
    ids="lightning lightning-guided jit jit-guided split split-guided jit-compiled".split(),
)
def test_each_execution_meets_the_error_rule_against_the_plain_loop(cfg, execution, scale):
    model, guidance = make_model(cfg), scale and Guidance(scale)
    labels = torch.tensor([0, 4, 2, 0] * 4)
    seeds = torch.stack([torch.full((16,), 3), torch.arange(16)], dim=1)
    z = normal(seeds, torch.arange(9), 4 * 64).view(9, 16, 16, 2, 2, 4)
    z = torch.einsum("sbnpqc->sbcnpq", z).unflatten(3, (4, 4)).transpose(4, 5)
    z = z.reshape(9, 16, 4, 8, 8)  # the seeds' noise counts the pixels of tokens

    def loop(dtype):
        plain = reference.DiT.from_config(cfg).to(dtype)
        plain.load_state_dict(model.state_dict())
        x_T, noise = z[0].to(dtype), z[1:].to(dtype)
        return reference.sample(plain, SCHEDULER, x_T, labels, noise, guidance)

    images = Sampler(model, SCHEDULER, guidance=guidance, execution=execution)(labels, seed=3)
    check_against_oracle(images, loop(torch.float32), loop(torch.float64))


@by_config
def test_an_image_depends_on_its_seed_alone(cfg):
    sampler = Sampler(make_model(cfg), SCHEDULER, execution="eager")
    together = sampler([1, 3, 3], seeds=[5, 6, 7])
    assert relative_error(sampler([3], seeds=[6])[0], together[1]) < 1e-5
    shuffled = sampler([3, 1], seeds=[7, 5])
    assert relative_error(shuffled, together[[2, 0]]) < 1e-5


def test_a_bfloat16_copy_is_near_the_model():
    model = make_model(JIT)
    near = Sampler(model, SCHEDULER, dtype=torch.bfloat16, execution="eager")([1, 2])
    assert 1e-4 < relative_error(near, Sampler(model, SCHEDULER, execution="eager")([1, 2])) < 0.1


def test_checkpointing_changes_no_gradient():
    model, x = make_model(JIT), torch.randn(2, 4, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        for block in model.blocks:
            block.checkpointing = checkpointing
        model.zero_grad()
        model(x, torch.tensor([1, 2]), torch.tensor([0, 4])).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_a_swiglu_has_the_flop_of_the_mlp_that_it_replaces():
    plain = DiTConfig(hidden=48, n_layers=2, n_heads=4)
    gated = replace(plain, mlp="swiglu")
    assert gated.mlp_hidden == 128 and flops.flop(gated, 3) == flops.flop(plain, 3)
    narrow = replace(plain, patch_bottleneck=5)
    tokens = 16 * 3
    change = 2 * tokens * (48 * 5 + 5 * 48 - 48 * 48)
    assert flops.flop(narrow, 3) - flops.flop(plain, 3) == change


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": True, "hidden": 24}, "rope: needs a head dim that 4 divides, got 6"),
        ({"context_tokens": 2, "use_class_cond": False}, "context_tokens: expected None where"),
        ({"context_tokens": 2, "embedders": "block"}, "context_tokens: expected None where"),
        ({"context_tokens": 2, "context_start": 4}, "context_start: expected fewer than"),
        ({"context_start": 1}, "context_start: expected fewer than n_layers=4 and context_tokens"),
        ({"norm": "batch"}, "norm: expected one of layer, rms; got 'batch'"),
        ({"patch_bottleneck": 0}, "patch_bottleneck: expected a positive integer, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**options)
