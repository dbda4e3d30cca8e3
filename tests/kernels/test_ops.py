"""Properties of the Triton ops besides their numbers: tracing, autocast, gradients, launches."""

import copy

import pytest
import torch
from torch.library import opcheck

import fastdit
from fastdit import functional, reference
from fastdit.kernels import (
    adaln,
    adaln_configs,
    attention,
    attention_configs,
    common,
)
from fastdit.ops import definitions, norms
from fastdit.testing import check_against_oracle, randomize, relative_error


def inputs_of(op, device, B=2, N=5, D=48, requires_grad=False):
    if op is definitions.attention:
        tensors, last = [torch.randn(B, N, 3 * D)], 2
    else:
        x, y = torch.randn(2, B, N, D)
        gate, scale, shift = torch.randn(3, B, D).bfloat16()
        weight = [torch.randn(D)] if op in RMS else []
        tensors, last = [scale, shift, *weight], 1e-5
        tensors = [x, y, gate, *tensors] if op in GATED else [x, *tensors]
    return [*(t.to(device).requires_grad_(requires_grad) for t in tensors), last]


FORWARD = {
    "layer_norm_modulate": norms.layer_norm_modulate,
    "gated_residual_layer_norm_modulate": norms.gated_residual_layer_norm_modulate,
    "rms_norm_modulate": norms.rms_norm_modulate,
    "gated_residual_rms_norm_modulate": norms.gated_residual_rms_norm_modulate,
    "attention": definitions.attention,
}
RMS = {norms.rms_norm_modulate, norms.gated_residual_rms_norm_modulate}
GATED = {norms.gated_residual_layer_norm_modulate, norms.gated_residual_rms_norm_modulate}
by_op = pytest.mark.parametrize("op", FORWARD.values(), ids=FORWARD.keys())


@by_op
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck_is_clean(op, requires_grad, device):
    opcheck(op, inputs_of(op, device, requires_grad=requires_grad))


def test_opcheck_is_clean_for_the_backwards(device):
    x, scale, shift, eps = inputs_of(norms.layer_norm_modulate, device)
    h, mean, rstd = norms.layer_norm_modulate(x, scale, shift, eps)
    backwards = torch.ops.fastdit
    opcheck(backwards.layer_norm_modulate_backward.default, (h, x, scale, mean, rstd))
    gated = inputs_of(norms.gated_residual_layer_norm_modulate, device)
    r, h, mean, rstd = norms.gated_residual_layer_norm_modulate(*gated)
    for dr in (None, torch.randn_like(r)):
        arguments = (dr, h, r, *gated[1:4], mean, rstd)
        opcheck(backwards.gated_residual_layer_norm_modulate_backward.default, arguments)
    weight, shifted = torch.randn(x.shape[-1], device=device), False
    arguments = (h, x, scale, weight, rstd, shifted)
    opcheck(backwards.rms_norm_modulate_backward.default, arguments)
    arguments = (None, h, r, *gated[1:4], weight, rstd, shifted)
    opcheck(backwards.gated_residual_rms_norm_modulate_backward.default, arguments)
    qkv, n_heads = inputs_of(definitions.attention, device)
    out, lse = definitions.attention(qkv, n_heads)
    opcheck(backwards.attention_backward.default, (out, qkv, out, lse, n_heads))


@by_op
def test_a_second_derivative_is_refused(op, device):
    *tensors, last = inputs_of(op, device, requires_grad=True)
    out = op(*tensors, last)[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", [name for name in FORWARD if "gated" in name])
@pytest.mark.parametrize("used", ["residual", "modulated"])
def test_one_output_unused_has_the_gradients_of_the_other(used, op, device):
    *tensors, eps = inputs_of(FORWARD[op], device, requires_grad=True)
    index = ["residual", "modulated"].index(used)
    gradients = []
    for backend in ("triton", "reference"):
        outs = getattr(functional, op)(*tensors, eps, backend=backend)
        loss = outs[index].float().square().sum()
        gradients.append(torch.autograd.grad(loss, tensors, materialize_grads=True))
    for actual, plain in zip(*gradients, strict=True):
        assert torch.allclose(
            actual.float(), plain.float(), rtol=0.02, atol=0.02 * plain.abs().max()
        )


@by_op
def test_an_empty_batch_is_an_empty_result(op, device):
    *tensors, last = inputs_of(op, device, B=0, requires_grad=True)
    out = op(*tensors, last)[0]
    out.sum().backward()
    assert out.shape[0] == 0 and all(t.grad.shape == t.shape for t in tensors)


@pytest.fixture
def models(device):
    """Return fastdit's model and the plain one with the same weights."""
    plain = reference.DiT(img_size=8, hidden=32, n_layers=2, n_heads=2)
    randomize(plain)
    model = fastdit.DiT.from_config(plain.cfg)
    model.load_state_dict(plain.state_dict())
    return model.to(device), plain.to(device)


def batch(B, device):
    x, t, y = torch.randn(B, 3, 8, 8), torch.randint(1000, (B,)), torch.randint(16, (B,))
    return x.to(device), t.to(device), y.to(device)


def gradients(model, call, inputs):
    model.zero_grad()
    out = call(*inputs)
    out.to(torch.promote_types(out.dtype, torch.float32)).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_model_runs_the_kernels(models, device):
    model, _ = models
    with torch.profiler.profile() as profile:
        model(*batch(2, device))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastdit::layer_norm_modulate"] == 1
    assert calls["fastdit::gated_residual_layer_norm_modulate"] == 4
    assert calls["fastdit::attention"] == 2


def test_the_model_compiles_whole_with_a_dynamic_batch(models, device):
    model, plain = models
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B in (7, 2, 5):  # 3 would share a symbol with the channels
            inputs = batch(B, device)
            expected = gradients(plain, plain, inputs)
            assert relative_error(gradients(model, compiled, inputs), expected) < 1e-5
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for B in (7, 2, 5):
            inputs = batch(B, device)
            assert relative_error(compiled(*inputs), plain(*inputs)) < 1e-5


def test_inductor_compiles_the_model(models, device):
    model, plain = models
    inputs = batch(3, device)
    compiled = torch.compile(model, fullgraph=True)
    expected = gradients(plain, plain, inputs)
    assert relative_error(gradients(model, compiled, inputs), expected) < 1e-5


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_model_trains_under_autocast(models, dtype, compiled, device):
    """The gradients' error is below twice that of plain ops under autocast."""
    model, plain = models
    inputs = batch(3, device)
    exact = gradients(plain, plain, inputs)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast(device.type, dtype):
        assert model(*inputs).dtype == dtype
        expected = relative_error(gradients(plain, plain, inputs), exact)
        assert relative_error(gradients(model, call, inputs), exact) < 2 * expected


def test_attention_under_autocast_has_its_dtype(device):
    with torch.autocast(device.type, torch.bfloat16):
        out = functional.attention(torch.randn(2, 4, 48, device=device), 2, backend="triton")
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_models_gradients_obey_the_error_rule(models, dtype, checkpointing, compiled, device):
    """The oracle is float64; bfloat16 means autocast."""
    model, plain = models
    torch._dynamo.reset()
    for block in model.blocks:
        block.checkpointing = checkpointing
    inputs = batch(3, device)
    oracle = copy.deepcopy(plain).double()
    exact = gradients(oracle, oracle, (inputs[0].double(), *inputs[1:]))
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        expected = gradients(plain, plain, inputs)
        check_against_oracle(gradients(model, call, inputs), expected, exact)


def test_attention_of_one_token_is_its_value(device):
    qkv = torch.randn(3, 1, 96, device=device, requires_grad=True)
    out = functional.attention(qkv, 2, backend="triton")
    out.sum().backward()
    assert torch.equal(out, qkv[..., 64:])
    assert not qkv.grad[..., :64].any() and (qkv.grad[..., 64:] == 1).all()


ATTENTION_N = [1, 17, 40, 70]


@pytest.mark.parametrize("N", ATTENTION_N, ids="N{}".format)
def test_every_attention_configuration_computes_the_same(N, device):
    """The tuner may choose any of them, with one pass or with a running softmax."""
    arch = common.arch(device)
    qkv, dout = torch.randn(2, N, 3 * 2 * 40), torch.randn(2, N, 2 * 40)
    exact = qkv.double().requires_grad_()
    expected = reference.attention(exact, 2)
    expected.backward(dout.double())
    qkv, dout = qkv.to(device), dout.to(device)
    for config in attention_configs.attention_fwd_configs(N, torch.bfloat16, arch):
        out, lse = attention.attention_fwd(qkv, 2, config)
        assert relative_error(out, expected) < 1e-6, config
    for dq in attention_configs.attention_dq_bwd_configs(N, torch.bfloat16, arch):
        gradient = attention.attention_bwd(dout, qkv, out, lse, 2, dq=dq)
        assert relative_error(gradient, exact.grad) < 1e-6, dq
    for dkv in attention_configs.attention_dkv_bwd_configs(N, 40, torch.bfloat16, arch):
        gradient = attention.attention_bwd(dout, qkv, out, lse, 2, dkv=dkv)
        assert relative_error(gradient, exact.grad) < 1e-6, dkv


@pytest.mark.parametrize("D", [64, 72, 1152, 3000], ids="D{}".format)
def test_every_layer_norm_configuration_computes_the_same(D, device):
    x, y, dh = torch.randn(3, 2, 35, D)
    gate, scale, shift = torch.randn(3, 2, D)
    leaves = [t.double().requires_grad_() for t in (x, y, gate, scale, shift)]
    expected = reference.gated_residual_layer_norm_modulate(*leaves, 1e-5)
    expected[1].backward(dh.double())
    x, y, gate, scale, shift, dh = (t.to(device) for t in (x, y, gate, scale, shift, dh))
    for config in adaln_configs.norm_modulate_fwd_configs(D):
        r, h, *statistics = adaln.norm_modulate_fwd(x, scale, shift, 1e-5, None, (y, gate), config)
        assert max(map(relative_error, (r, h), expected)) < 1e-6, config
    for config in adaln_configs.norm_modulate_bwd_configs(D):
        residual = None, y, gate
        *got, _ = adaln.norm_modulate_bwd(dh, r, scale, statistics, None, residual, True, config)
        for actual, leaf in zip(got, leaves, strict=True):
            assert relative_error(actual, leaf.grad) < 1e-6, config


def test_a_first_tile_of_keys_without_weight_is_finite(contracted, device):
    """When all keys so far score -inf, a running softmax must not compute -inf - -inf."""
    qkv = torch.ones(1, 300, 3, device=device)
    qkv[0, :, 0] = 1e25
    qkv[0, :128, 1] = -1e25
    qkv[0, :, 2] = torch.randn(300)
    actual = functional.attention(qkv, 1, backend="triton")
    assert relative_error(actual, reference.attention(qkv.double(), 1)) < 1e-5


@pytest.mark.parametrize("N", [24, 300], ids=["one-pass", "running"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12, 1e37], ids="{:.0e}".format)
def test_attention_is_right_for_scores_of_any_size(size, N, contracted, device):
    """Three keys in four have the greatest score, and the others a smaller one.

    A fused `score * c - maximum * c` is not 0 at the maximum but the rounding error of the second
    product. Beyond 2^31 its exponential is infinite, or 0 for all keys.
    """
    qkv = torch.randn(2, N, 3 * 16)
    qkv[..., :32] = 0
    qkv[..., 0] = 1.7
    qkv[..., 16] = torch.where(torch.arange(N) % 4 == 0, -0.3, 1.1) * size
    exact = reference.attention(qkv.double(), 1)
    assert relative_error(functional.attention(qkv.to(device), 1, backend="triton"), exact) < 1e-6


VIEWS = {
    "sequence-first": lambda qkv: qkv.transpose(0, 1).contiguous().transpose(0, 1),
    "overlapping": lambda qkv: torch.randn(2, 200).to(qkv).unfold(1, 72, 1)[:, :40],
    "one-row-expanded": lambda qkv: qkv[:, :1].expand_as(qkv),
    "one-image-expanded": lambda qkv: qkv[:1].expand_as(qkv),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_attention_reads_any_view(view, device):
    qkv = view(torch.randn(2, 40, 72, device=device))
    out, lse = attention.attention_fwd(qkv, 1)
    assert relative_error(out, reference.attention(qkv, 1)) < 1e-5
    plain = qkv.double().clone().requires_grad_()
    dout = torch.randn(2, 40, 24, device=device)
    reference.attention(plain, 1).backward(dout.double())
    assert relative_error(attention.attention_bwd(dout, qkv, out, lse, 1), plain.grad) < 1e-5


def test_any_width_has_launchable_configurations():
    for D in range(1, 20_000, 7):
        for configs in (
            adaln_configs.norm_modulate_fwd_configs,
            adaln_configs.norm_modulate_bwd_configs,
        ):
            for config in configs(D):
                warps, rows = config.num_warps, config.kwargs["ROWS"]
                assert warps in (1, 2, 4, 8, 16, 32) and rows == 1 << rows.bit_length() - 1


def test_a_step_that_is_not_in_the_table_gives_nan(device):
    x = torch.randn(2, 16, 4, device=device)
    table = torch.rand(3, 10, device=device)
    for step in (-1, 3):
        step = torch.tensor(step, device=device)
        out = functional.sampler_update(x, x, table, step, backend="triton")
        assert all(t.isnan().all() for t in out)


def test_one_token_under_autocast_has_its_dtype(device):
    with torch.autocast(device.type, torch.bfloat16):
        out = functional.attention(torch.randn(2, 1, 48, device=device), 2, backend="triton")
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck_is_clean_for_the_sampler_update(requires_grad, device):
    """The update has no gradient, so its results under training refuse to be differentiated."""
    x = torch.randn(2, 16, 4, device=device, requires_grad=requires_grad)
    model_out = torch.randn(4, 16, 8, device=device)
    table, step = torch.rand(3, 10, device=device), torch.tensor(1, device=device)
    seeds = torch.tensor([[7, 0], [7, 1]], device=device)
    arguments = (x, model_out, table, step, None, seeds, None, 4.0, 3)
    if not requires_grad:
        opcheck(definitions.sampler_update, arguments)
        return
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(definitions.sampler_update, arguments, test_utils=checks)
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        definitions.sampler_update(*arguments)[0].sum().backward()
