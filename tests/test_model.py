"""fastdit.DiT equals the reference: it has the same parameters, outputs and gradients."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import fastdit.data
from fastdit import PRESETS, DiTConfig, reference
from fastdit.noise import normal
from fastdit.testing import check_against_oracle, randomize, relative_error

DATA = Path(__file__).parent / "golden"

PUBLISHED_SMALL = replace(
    PRESETS["DiT-S/2"], img_size=8, hidden=32, n_layers=2, n_heads=2, num_classes=10
)
LIGHTNING_SMALL = replace(
    PUBLISHED_SMALL,
    img_size=(3, 4),
    patch_size=1,
    in_channels=16,
    hidden=24,  # a SwiGLU 64 wide, and heads of 12
    learn_sigma=False,
    norm="rms",
    mlp="swiglu",
    rope=True,
    qk_norm="rms",
)
JIT_SMALL = replace(
    LIGHTNING_SMALL,
    img_size=16,
    patch_size=4,
    in_channels=3,
    n_layers=3,
    patch_bottleneck=5,
    context_tokens=3,
    context_start=1,
)
CONFIGS = {
    "toy": DiTConfig(),
    "odd-hidden": DiTConfig(hidden=63, n_heads=3, n_layers=2),
    "patch2-img8-gray": DiTConfig(img_size=8, patch_size=2, in_channels=1, n_layers=2),
    "one-token-one-head": DiTConfig(img_size=4, patch_size=4, n_heads=1, n_layers=1),
    "uncond": DiTConfig(use_class_cond=False, n_layers=2),
    "silu-modulation": DiTConfig(modulation_act="silu", n_layers=2),
    "tanh-gelu": DiTConfig(gelu="tanh", n_layers=2),
    "sincos": DiTConfig(pos_embed="sincos", n_layers=2),
    "null-class": DiTConfig(null_class=True, n_layers=2),
    "t-width-257-silu": DiTConfig(t_embed_width=257, t_embed_act="silu", n_layers=2),
    "learn-sigma": DiTConfig(learn_sigma=True, n_layers=2),
    "published": PUBLISHED_SMALL,
    "wide-published": replace(PUBLISHED_SMALL, img_size=(4, 16)),  # 2 x 8 patches
    "high": DiTConfig(img_size=(12, 8), n_layers=1),
    "block-embedders": DiTConfig(embedders="block", hidden=32, n_layers=2, n_heads=2),
    "published-block": replace(PUBLISHED_SMALL, embedders="block"),
    "lightning": LIGHTNING_SMALL,
    "no-shift": replace(LIGHTNING_SMALL, norm="layer", modulation_shift=False, qk_norm="none"),
    # With positions, since a bias of the keys alone changes no weight of attention.
    "qk-norm": replace(PUBLISHED_SMALL, qk_norm="layer", qk_norm_eps=1e-5, rope=True),
    "jit": JIT_SMALL,
    "jit-split": replace(JIT_SMALL, modulation_act="none", null_class=False, context_start=None),
}
by_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


def make_pair(cfg, dtype=torch.float64):
    plain = reference.DiT.from_config(cfg)
    randomize(plain)
    model = fastdit.DiT.from_config(cfg)
    model.load_state_dict(plain.state_dict(), strict=True)
    return plain.to(dtype), model.to(dtype)


def make_inputs(cfg, batch=3, dtype=torch.float64):
    x = torch.randn(batch, *cfg.sample_shape, dtype=dtype)
    t = torch.randint(1000, (batch,))
    y = torch.randint(cfg.num_classes, (batch,)) if cfg.use_class_cond else None
    return x, t, y


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_default_has_the_published_parameters():
    model = fastdit.DiT()
    assert sum(p.numel() for p in model.parameters()) == 323_696
    assert len(model.state_dict()) == 52
    block = [f"attn.{a}.{b}" for a in ("qkv", "proj") for b in ("weight", "bias")]
    block += [f"mlp.{i}.{b}" for i in (0, 2) for b in ("weight", "bias")]
    block += [f"adaLN_modulation.{b}" for b in ("weight", "bias")]
    expected = {f"blocks.{i}.{name}" for i in range(4) for name in block}
    expected |= {"pos_embed", "y_embed.weight"}
    for layer in ("patch_embed.proj", "t_embed.0", "t_embed.2", "final_mod", "final_linear"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(model.state_dict()) == expected


def test_the_constructor_is_a_drop_in_replacement():
    names = list(inspect.signature(fastdit.DiT).parameters)
    assert names[:8] == [
        "img_size",
        "patch_size",
        "in_channels",
        "hidden",
        "n_layers",
        "n_heads",
        "num_classes",
        "use_class_cond",
    ]
    assert fastdit.DiT(8, 2, 1, 32, 1, 2, 5, False).cfg.use_class_cond is False


@by_config
def test_state_dicts_are_interchangeable(cfg):
    plain, model = reference.DiT.from_config(cfg), fastdit.DiT.from_config(cfg)
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)


@by_config
def test_a_fresh_model_returns_zeros(cfg):
    x, t, y = make_inputs(cfg, dtype=torch.float32)
    out = fastdit.DiT.from_config(cfg)(x, t, y)
    assert out.shape == (3, cfg.out_channels, *cfg.sample_shape[1:])
    assert not out.any()


@by_config
@pytest.mark.parametrize("labelled", [True, False], ids=["y", "no-y"])
def test_float64_forward_and_gradients_equal_the_reference(cfg, labelled):
    plain, model = make_pair(cfg)
    x, t, y = make_inputs(cfg)
    if not labelled:
        y = None
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [m(i, t, y) for m, i in zip((plain, model), inputs, strict=True)]
    assert relative_error(outs[1], outs[0]) < 1e-12
    upstream = torch.randn_like(outs[0])
    for out in outs:
        out.backward(upstream)
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-12
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        if a.grad is None:
            unused = not a.requires_grad or (name.endswith("y_embed.weight") and y is None)
            assert unused and b.grad is None, name
        else:
            assert a.grad.norm() > 0, name
            assert relative_error(b.grad, a.grad) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3], ids=["B1", "B3"])
@pytest.mark.parametrize(
    "cfg",
    [DiTConfig(img_size=32), DiTConfig(img_size=(16, 64), n_layers=1, pos_embed="sincos")],
    ids=["square", "wide"],
)
def test_low_precision_forward_meets_the_error_rule(cfg, dtype, batch):
    # 3 * 32 * 32 elements an image; two seeds make over 4096 at B1
    oracle_model, _ = make_pair(cfg)
    plain_model, model = make_pair(cfg, dtype)
    oracle, plain, actual = [], [], []
    for seed in range(2):
        torch.manual_seed(seed)
        x, t, y = make_inputs(cfg, batch)
        x = x.to(dtype)
        with torch.no_grad():
            oracle.append(oracle_model(x.double(), t, y))
            plain.append(plain_model(x, t, y))
            actual.append(model(x, t, y))
    check_against_oracle(torch.cat(actual), torch.cat(plain), torch.cat(oracle))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_gradients_meet_the_error_rule(dtype):
    """All gradients are judged as one vector, each divided by the oracle's norm of it."""
    oracle_model, _ = make_pair(DiTConfig())
    models = [oracle_model, *make_pair(DiTConfig(), dtype)]
    x, t, y = make_inputs(oracle_model.cfg)
    upstream = torch.randn(x.shape).to(dtype)
    for model in models:
        own = model.pos_embed.dtype
        model(x.to(dtype).to(own), t, y).backward(upstream.to(own))
    norms = [p.grad.norm() for p in oracle_model.parameters()]
    oracle, plain, actual = (
        torch.cat(
            [p.grad.double().flatten() / n for p, n in zip(m.parameters(), norms, strict=True)]
        )
        for m in models
    )
    check_against_oracle(actual, plain, oracle)


def test_no_label_means_the_null_row_where_there_is_one():
    _, model = make_pair(CONFIGS["null-class"])
    x, t, _ = make_inputs(model.cfg)
    null = torch.full((3,), model.cfg.num_classes)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.equal(model(x, t), model(x, t, torch.zeros(3, dtype=torch.int64)))


def test_no_label_means_no_class_term_where_there_is_no_null_row():
    _, model = make_pair(CONFIGS["toy"])
    x, t, _ = make_inputs(model.cfg)
    before = model(x, t)
    with torch.no_grad():
        model.y_embed.weight.mul_(-3)
    assert torch.equal(model(x, t), before)


@pytest.mark.parametrize("model_class", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_gives_an_empty_batch(model_class, dtype):
    model = model_class().to(dtype)
    x, t, y = make_inputs(model.cfg, 0, dtype)
    assert model(x, t, y).shape == (0, 3, 16, 16)


def test_every_sample_has_its_own_modulation():
    """Three images run together and alone, since at B = 1 a wrong row of modulation passes."""
    _, model = make_pair(DiTConfig(img_size=20, patch_size=4))
    x, t, y = make_inputs(model.cfg)
    together = model(x, t, y)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-12


def test_strided_inputs_need_no_copy_by_the_caller():
    _, model = make_pair(DiTConfig())
    x, t, y = make_inputs(model.cfg)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and not wide.is_contiguous()
    assert relative_error(model(strided, t, y), model(x, t, y)) < 1e-12
    assert relative_error(model(wide, t, y), model(x, t, y)) < 1e-12


@pytest.mark.parametrize("model_class", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"])
def test_forward_equals_the_published_code(model_class):
    """The golden output is by facebookresearch/DiT, whose (shift, scale, gate) rows we permute."""
    golden = load_file(DATA / "facebook_dit_tiny.safetensors")
    cfg = replace(PUBLISHED_SMALL, hidden=144)
    model = model_class.from_config(cfg)
    assert torch.equal(model.pos_embed, golden["model/pos_embed"])
    model.load_state_dict(from_facebook(golden), strict=True)
    with torch.no_grad():
        out = model(golden["forward/x"], golden["forward/t"], golden["forward/y"])
    assert relative_error(out, golden["forward/out"]) < 1e-5


def from_facebook(golden):
    renames = {
        "x_embedder.": "patch_embed.",
        "t_embedder.mlp.": "t_embed.",
        "y_embedder.embedding_table.": "y_embed.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.2.",
        "final_layer.adaLN_modulation.1.": "final_mod.",
        "final_layer.linear.": "final_linear.",
        "adaLN_modulation.1.": "adaLN_modulation.",
    }
    state = {}
    for name, tensor in golden.items():
        if not name.startswith("model/"):
            continue
        name = name.removeprefix("model/")
        if "adaLN_modulation" in name:
            rows = tensor.unflatten(0, (-1, 2 if "final" in name else 3, cfg_width(golden)))
            swapped = rows[:, [1, 0]] if "final" in name else rows[:, [1, 0, 2]]
            tensor = swapped.flatten(0, 2)
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = tensor
    return state


def cfg_width(golden):
    return golden["model/pos_embed"].shape[-1]


@pytest.mark.parametrize("model_class", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"])
def test_an_unconditional_model_ignores_labels(model_class):
    """The published training loop passes labels to every model."""
    model = model_class(use_class_cond=False, hidden=16, n_layers=1)
    randomize(model)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 5])
    assert torch.equal(model(x, t, torch.tensor([3, 99])), model(x, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_table_and_no_noise(dtype):
    """Only the weights of a new model follow torch.set_default_dtype."""

    def products():
        seeds = torch.tensor([[5, 0]])
        images, _ = fastdit.data.coloured_shapes(per_class=1)
        scheduler = fastdit.DiffusionScheduler(50, schedule="cosine")
        step = fastdit.timestep_embedding(torch.tensor([7]), 8)
        return normal(seeds, torch.tensor([1]), 64), images, scheduler.betas, step

    expected = products()
    torch.set_default_dtype(dtype)
    try:
        actual = products()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_xavier_init_draws_as_published():
    cfg = replace(PUBLISHED_SMALL, hidden=256)
    model = fastdit.DiT.from_config(cfg)
    qkv = model.blocks[0].attn.qkv
    assert not qkv.bias.any()
    assert qkv.weight.std().item() == pytest.approx((2 / (256 + 768)) ** 0.5, rel=0.02)
    assert qkv.weight.abs().max() <= (6 / (256 + 768)) ** 0.5
    for weight in (model.t_embed[0].weight, model.t_embed[2].weight, model.y_embed.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_forward_traces_as_one_graph_with_a_dynamic_batch():
    torch._dynamo.reset()
    _, model = make_pair(DiTConfig(n_layers=2), torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 9):
        x, t, y = make_inputs(model.cfg, batch, torch.float32)
        assert torch.equal(compiled(x, t, y), model(x, t, y))
    assert counter.frame_count == 1


@pytest.mark.parametrize("cfg", [PUBLISHED_SMALL, CONFIGS["published-block"]], ids=str)
def test_fresh_weights_are_the_references(cfg):
    drawn = []
    for model_class in (fastdit.DiT, reference.DiT):
        torch.manual_seed(3)
        drawn.append(model_class.from_config(cfg).state_dict())
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(t, drawn[1][name]) for name, t in drawn[0].items())


def test_each_block_has_embedders_of_its_own():
    """A change of one block's embedders changes its modulation and, of the first, the final one."""
    _, model = make_pair(CONFIGS["published-block"])
    assert not [name for name in model.state_dict() if name.startswith(("t_embed", "y_embed"))]
    _, t, y = make_inputs(model.cfg)
    width = 6 * model.cfg.hidden
    for owner, changed in ((0, [True, False, True]), (1, [False, True, False])):
        for embedder in (model.blocks[owner].t_embed[2].bias, model.blocks[owner].y_embed.weight):
            with torch.no_grad():
                before = model.modulation(t, y).split(width, dim=-1)
                embedder.add_(1)
                after = model.modulation(t, y).split(width, dim=-1)
            assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == changed


def test_the_check_of_labels_reads_no_values_that_are_not_there():
    """Exporting, tracing and mapping over labels all see labels without values."""
    _, model = make_pair(DiTConfig(n_layers=1), torch.float32)
    x, t, y = make_inputs(model.cfg, 2, torch.float32)
    expected = model(x, t, y)
    exported = torch.export.export(model, (x, t, y))
    assert torch.equal(exported.module()(x, t, y), expected)
    weights = dict(model.named_parameters())

    def call(weights, *given):
        return torch.func.functional_call(model, weights, given)

    traced = make_fx(call, tracing_mode="fake")(weights, x, t, y)
    assert torch.equal(traced(weights, x, t, y), expected)
    mapped = torch.vmap(lambda label: model.label_conditioning(label[None]))(y)
    assert torch.equal(mapped[:, 0], model.y_embed(y))
