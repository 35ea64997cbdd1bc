"""The fp8 MLP against float64, its kernel against plain torch, the bound of its scales, its gradients."""

import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import fp8_mlp as module
from miles_fast.kernels.dispatch import INTERPRETED, quack_for
from miles_fast.kernels.fp8_linear import fp8_linear, quantized_rows
from miles_fast.kernels.fp8_mlp import fp8_mlp, fp8_mlp_reference, hidden_scales
from miles_fast.kernels.linear_gelu import scaled_linear_gelu, takes_scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUACK = quack_for(torch.device(DEVICE))
HALF = torch.bfloat16
FUSED = INTERPRETED or (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
needs_kernel = pytest.mark.skipif(not FUSED, reason="needs a Hopper GPU or Triton's interpreter")
SMALL = dict(K=48, D=80, rows=(3, 7))  # less than a tile: plain torch
TILED = dict(K=144, D=272, rows=(2, 65))
LEAVES = "x", "first", "first bias", "second", "second bias", "residual"


def leaves(K, D, rows, dtype=HALF, device=DEVICE):
    generator = torch.Generator().manual_seed(K + D)
    shapes = {(*rows, K): 1, (D, K): K**-0.5, (D,): 0.5, (K, D): D**-0.5, (K,): 0.5}
    drawn = [torch.randn(*shape, generator=generator) * size for shape, size in shapes.items()]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def with_residual(sizes, dtype=HALF):
    inputs = leaves(**sizes, dtype=dtype)
    drawn = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)) / 10
    return [*inputs, drawn.to(DEVICE, dtype).requires_grad_()]


def exact_mlp(x, first, first_bias, second, second_bias, residual=0):
    return F.linear(F.gelu(F.linear(x, first, first_bias)), second, second_bias) + residual


def error(found, exact):
    """Length of the whole error by the length of the output."""
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("sizes", [SMALL, TILED, dict(K=768, D=3072, rows=(3, 67))])
def test_is_as_far_from_the_exact_layers_as_8_bits_are(sizes):
    inputs = [leaf.detach() for leaf in leaves(**sizes)]
    exact = exact_mlp(*(leaf.double() for leaf in inputs))
    # Two layers of products that are 3.7 % off each.
    assert 0.03 < error(fp8_mlp_reference(*inputs), exact) < 0.05


@needs_kernel
def test_the_kernel_rounds_as_plain_torch_does(backend):
    x, first, bias, *_ = (leaf.detach() for leaf in leaves(**TILED))
    x = x.flatten(0, 1)
    (x8, scale_x), (first8, scale_first) = quantized_rows(x), quantized_rows(first)
    scale = hidden_scales(x, first, bias)
    scales = scale_x[:, 0], scale_first[:, 0], scale[:, 0]
    out8, slope, active = scaled_linear_gelu(x8, first8, bias, *scales, True)
    lean8, *nothing = scaled_linear_gelu(x8, first8, bias, *scales, False)
    assert not any(made.numel() for made in nothing)
    # A step of e4m3 is 2^-3 of a number at most, or 2^-9.
    step = dict(rtol=0.126, atol=2**-9)
    torch.testing.assert_close(
        lean8.float(), out8.float(), **(step if backend == "quack" else dict(rtol=0, atol=0))
    )
    hidden = (F.linear(x8.float() * scale_x, first8.float() * scale_first) + bias).requires_grad_()
    expected = F.gelu(hidden)
    (expected_slope,) = torch.autograd.grad(expected.sum(), hidden)
    expected = expected.detach()
    torch.testing.assert_close(active.float(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(slope.float(), expected_slope, rtol=2**-7, atol=1e-3)
    expected8 = (expected / scale).to(out8.dtype)
    # Triton's interpreter loses the carry of a mantissa that is rounded up: 1.97 becomes 1 instead of 2.
    torch.testing.assert_close(
        out8.float(), expected8.float(), **(step | dict(rtol=0.5) if INTERPRETED else step)
    )
    assert (out8.float() != expected8.float()).float().mean() < (0.05 if INTERPRETED else 0.02)


def test_no_number_overflows_its_bound_and_one_can_reach_it():
    """A token along a row of the weight is as long as Cauchy and Schwarz allow."""
    x, first, bias, second, second_bias = (leaf.detach() for leaf in leaves(**TILED))
    x[0, 0] = 50 * first[first.float().norm(dim=-1).argmax()]
    bias *= 0.01
    active = F.gelu(fp8_linear(x, first, bias)).float() / hidden_scales(x, first, bias)
    assert 360 < active[0, 0].max() < 448 and active.abs().max() == active[0, 0].max()
    assert fp8_mlp(x, first, bias, second, second_bias).isfinite().all()


def test_an_outlier_coarsens_its_own_token_only():
    x, *others = (leaf.detach() for leaf in leaves(**SMALL))
    far = x.clone()
    far[1, 2] *= 1e6
    rest = torch.ones(x.shape[:-1], dtype=torch.bool)
    rest[1, 2] = False
    assert torch.equal(fp8_mlp(far, *others)[rest], fp8_mlp(x, *others)[rest])


@pytest.mark.parametrize("sizes", [SMALL, TILED])
def test_gradients_are_those_of_the_layers_unrounded(sizes, backend):
    dtype = torch.float32 if DEVICE == "cpu" and sizes is SMALL else HALF
    inputs = with_residual(sizes, dtype)
    x, first, first_bias, second, second_bias, residual = inputs
    plain = F.linear(x, first, first_bias)
    straight = plain + (fp8_linear(x, first, first_bias) - plain).detach()
    outputs = fp8_mlp(*inputs), F.linear(F.gelu(straight), second, second_bias) + residual
    d_out = torch.randn_like(outputs[0])
    found, expected = (torch.autograd.grad(out, inputs, d_out) for out in outputs)
    for got, wanted in zip(found, expected, strict=True):
        assert error(got, wanted.double()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_keeps_gelu_and_its_slope_unrounded_for_backward():
    inputs, kept = leaves(**SMALL), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        fp8_mlp(*inputs)
    assert sum(tensor.shape == (21, 80) for tensor in kept) == 2
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in kept)


@pytest.mark.parametrize("history", [True, False])
def test_computes_the_slope_for_backward_alone(history):
    with torch.set_grad_enabled(history), torch.profiler.profile() as seen:
        fp8_mlp(*leaves(**SMALL))
    assert ("aten::gelu_backward" in {event.name for event in seen.events()}) == history


@pytest.mark.parametrize("sizes", [SMALL, TILED])
def test_is_added_to_a_residual(sizes, backend):
    inputs = [leaf.detach() for leaf in with_residual(sizes)]
    residual = inputs[-1]
    strided = residual.flatten(0, -2).t().contiguous().t().view_as(residual)
    expected = fp8_mlp(*inputs[:-1]).double() + residual.double()
    for one in (residual, strided):
        torch.testing.assert_close(fp8_mlp(*inputs[:-1], one).double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("sizes", [SMALL, TILED])
@pytest.mark.parametrize("trained,products", zip(LEAVES, (4, 4, 3, 3, 2, 2), strict=True))
def test_computes_the_gradients_that_are_needed(sizes, trained, products, backend):
    from torch.utils.flop_counter import FlopCounterMode

    inputs = with_residual(sizes)
    place = LEAVES.index(trained)
    beside = torch.autograd.grad(fp8_mlp(*inputs).float().square().sum(), inputs)[place]
    one = [leaf if at == place else leaf.detach() for at, leaf in enumerate(inputs)]
    with FlopCounterMode(display=False) as counter:
        (alone,) = torch.autograd.grad(fp8_mlp(*one).float().square().sum(), one[place])
    assert error(alone, beside.double()) < 1e-2
    tokens = inputs[0].shape[:-1].numel()
    assert counter.get_total_flops() == products * 2 * tokens * sizes["K"] * sizes["D"]


@pytest.mark.skipif(not QUACK, reason="needs a Hopper GPU and quack-kernels")
def test_quack_computes_every_product_that_is_in_8_bits_and_the_slopes(monkeypatch):
    taken = []
    for name in ("scaled_linear_gelu", "scaled_product", "product_slope"):
        computed = getattr(QUACK, name)
        watch = lambda *args, name=name, computed=computed: taken.append(name) or computed(*args)  # noqa: E731
        monkeypatch.setattr(QUACK, name, watch)
    inputs = with_residual(dict(K=192, D=384, rows=(8201,)))
    fp8_mlp(*inputs).sum().backward()
    assert taken == ["scaled_linear_gelu", "scaled_product", "product_slope"]
    monkeypatch.setattr("miles_fast.kernels.dispatch._QUACK", False)
    fp8_mlp(*inputs).sum().backward()
    assert len(taken) == 3


@pytest.mark.parametrize("sizes", [SMALL, TILED])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(sizes, backend):
    x, first, first_bias, second, second_bias = (leaf.detach() for leaf in leaves(**sizes))
    first_bias.zero_()
    x[0, 0], x[0, 1, 3], x[0, 2, 5] = 0, float("inf"), float("nan")
    out = fp8_mlp(x, first, first_bias, second, second_bias)
    assert torch.equal(out[0, 0], second_bias)
    assert out[0, 1:3].isfinite().sum() == 0 and out[1:].isfinite().all()


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("sizes", [SMALL, TILED])
def test_traces_as_one_graph(sizes, backend):
    inputs = leaves(**sizes)
    norm = torch.nn.LayerNorm(sizes["K"], device=DEVICE, dtype=HALF)

    def layer(x, *others):
        return fp8_mlp(norm(x), *others)

    ops = (torch.compile(layer, backend=backend, fullgraph=True), layer)
    results = [torch.autograd.grad(op(*inputs).square().sum(), inputs) for op in ops]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(ops[0](*inputs), layer(*inputs))


@needs_kernel
def test_registered_ops_are_sound(backend):
    x, first, bias, *_ = (leaf.detach() for leaf in leaves(**TILED))
    (x8, scale_x), (first8, scale_first) = quantized_rows(x.flatten(0, 1)), quantized_rows(first)
    scale = hidden_scales(x.flatten(0, 1), first, bias)
    assert takes_scaled(x, first) and not takes_scaled(x[:, :3], first)
    for keep in (False, True):
        inputs = (x8, first8, bias, scale_x[:, 0], scale_first[:, 0], scale[:, 0], keep)
        # Not its schema: torch cannot multiply 8-bit floats, which that check does to change them.
        torch.library.opcheck(
            torch.ops.miles_fast.scaled_linear_gelu.default, inputs, test_utils="test_faketensor"
        )


@pytest.mark.gpu
def test_a_gpus_layers_are_those_of_the_reference(backend):
    inputs = with_residual(dict(K=768, D=3072, rows=(11, 785)))
    assert takes_scaled(inputs[0], inputs[1])
    compiled = torch.compile(fp8_mlp, fullgraph=True)
    with torch.no_grad():
        *wide, residual = (leaf.double() for leaf in inputs)
        expected = fp8_mlp_reference(*wide) + residual
        # Numbers that lie between two of e4m3 fall to either side: a few in a hundred, by a step.
        assert error(fp8_mlp(*inputs), expected) < 1.5e-2 > error(compiled(*inputs), expected)
    outputs = fp8_mlp(*inputs), compiled(*inputs), exact_mlp(*inputs)
    d_out = torch.randn_like(outputs[0])
    found, again, exact = (torch.autograd.grad(out, inputs, d_out) for out in outputs)
    for got, same, wanted in zip(found, again, exact, strict=True):
        assert error(got, wanted.double()) < 0.08 and error(same, got.double()) < 1e-2


@pytest.mark.gpu
def test_a_gpu_takes_bf16_only():
    with pytest.raises(ValueError, match="take bfloat16 on a GPU, got torch.float32"):
        module.fp8_mlp(*leaves(**SMALL, dtype=torch.float32))
