import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels import mlp as module
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.mlp import mlp, mlp_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = INTERPRETED or (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
needs_kernel = pytest.mark.skipif(not FUSED, reason="needs a Hopper GPU or Triton's interpreter")


def leaves(M=130, K=72, D=264, dtype=torch.float16, device=DEVICE):
    torch.manual_seed(0)
    shapes = ((M, K), (D, K), (D,), (K, D), (K,))
    return [torch.randn(*shape, device=device, dtype=dtype) / 4 for shape in shapes]


@pytest.mark.parametrize("case", layer_cases.MLP_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case, backend):
    assert cases.violations(case, mlp, mlp_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", layer_cases.MLP_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case, backend):
    assert cases.violations(case, mlp, mlp_reference, "cuda") == []


@needs_kernel
def test_the_slope_is_stored_for_backward_alone(monkeypatch, backend):
    kept = []
    launch = module.linear_gelu
    monkeypatch.setattr(module, "linear_gelu", lambda *args: kept.append(args[-1]) or launch(*args))
    x, *others = leaves()
    with torch.no_grad():
        lean = mlp(x, *others)
    out = mlp(x.requires_grad_(), *others)
    assert kept == [False, True]
    tolerance = 1e-3 if backend == "quack" else 0  # whose tiles are others
    torch.testing.assert_close(out, lean, rtol=tolerance, atol=tolerance)
    assert not launch(x, *others[:2], False)[1].numel()


@pytest.mark.parametrize(
    "shape", [dict(K=68), dict(D=260), dict(M=100), dict(D=248), dict(K=56), dict(dtype=torch.float32)]
)
def test_takes_what_the_kernel_does_not(monkeypatch, shape):
    monkeypatch.setattr(module, "linear_gelu", None)
    inputs = [leaf.requires_grad_() for leaf in leaves(**shape)]
    found, expected = mlp(*inputs), mlp_reference(*inputs)
    tolerance = dict(rtol=1e-5, atol=1e-5) if found.dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad(out.square().mean(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("sizes,dtype", [((3, 5, 6, 10), torch.float32), ((2, 65, 72, 264), torch.float16)])
def test_is_two_linear_layers_around_a_gelu(sizes, dtype):
    B, N, K, D = sizes
    first, second = (torch.nn.Linear(*widths).to(DEVICE, dtype) for widths in ((K, D), (D, K)))
    x = torch.randn(B, N, K, device=DEVICE, dtype=dtype, requires_grad=True)
    inputs = (x, first.weight, first.bias, second.weight, second.bias)
    weight = torch.randn_like(x)
    tolerance = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    found, expected = mlp(*inputs), second(F.gelu(first(x)))
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


def test_the_second_bias_needs_no_gradient(backend):
    """residual_norm gives it, in training."""
    x, *others, bias = (leaf.requires_grad_() for leaf in leaves())
    alone = torch.autograd.grad(mlp(x, *others, bias.detach()).sum(), (x, *others))
    beside = torch.autograd.grad(mlp(x, *others, bias).sum(), (x, *others))
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


def test_frozen_layers_cost_nothing_and_change_no_other_gradient(backend):
    x, first, first_bias, second, second_bias = leaves()
    x.requires_grad_()
    alone = torch.autograd.grad(mlp(x, first, first_bias, second, second_bias).sum(), x)
    trained = [leaf.requires_grad_() for leaf in (first, first_bias, second, second_bias)]
    assert torch.equal(alone[0], torch.autograd.grad(mlp(x, *trained).sum(), x)[0])
    second_alone = torch.autograd.grad(mlp(x.detach(), *leaves()[1:3], second, second_bias).sum(), second)
    assert second_alone[0].shape == second.shape


def test_is_added_to_a_residual(backend):
    inputs = [leaf.requires_grad_() for leaf in (*leaves(), torch.randn_like(leaves()[0]))]
    outputs = mlp(*inputs), mlp(*inputs[:-1]) + inputs[-1]
    torch.testing.assert_close(*outputs, rtol=2e-3, atol=2e-3)
    d_out = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, d_out) for out in outputs))


def test_takes_clips_of_tokens_by_stride():
    x, *others = leaves()
    by_stride = x.view(2, 65, 72).transpose(0, 1)
    expected = mlp_reference(by_stride, *others)
    torch.testing.assert_close(mlp(by_stride, *others), expected, rtol=2e-2, atol=2e-3)


def test_takes_weights_that_lie_anywhere(backend):
    """DeepSpeed's flat buffers hold them behind others of any size."""
    x, *others = leaves()
    flat = [torch.cat([leaf.new_zeros(1), leaf.flatten()])[1:].view_as(leaf) for leaf in others]
    assert all(leaf.data_ptr() % 16 for leaf in flat)
    if FUSED:
        assert torch.equal(*(module.linear_gelu(x, *weights[:2], True)[0] for weights in (others, flat)))
    results = []
    for weights in (others, flat):
        inputs = [leaf.detach().requires_grad_() for leaf in (x, *weights)]
        results.append([out := mlp(*inputs), *torch.autograd.grad(out.sum(), inputs)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)  # cuBLAS has other kernels for such weights


@needs_kernel
def test_what_is_not_finite_stays_so(backend):
    x, *others = leaves()
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    inputs = [leaf.requires_grad_() for leaf in (x, *others)]
    out = mlp(*inputs)
    assert out[:2].isfinite().sum() == 0 and out[2:].isfinite().all()
    d_x, _, d_bias, *_ = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert d_x[:2].isfinite().sum() == 0 and d_x[2:].isfinite().all() and not d_bias.isfinite().any()


@needs_kernel
def test_registered_ops_are_sound(backend):
    x, first, bias, second, _ = leaves()
    for keep in (False, True):
        torch.library.opcheck(torch.ops.miles_fast.linear_gelu.default, (x, first, bias, keep))
    _, slope = module.linear_gelu(x, first, bias, True)
    torch.library.opcheck(torch.ops.miles_fast.product_slope.default, (x, second, slope))


@needs_kernel
def test_the_slope_is_gelus(backend):
    x, first, bias, *_ = leaves()
    hidden = F.linear(x.double(), first.double(), bias.double()).requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(hidden).sum(), hidden)
    _, slope = module.linear_gelu(x, first, bias, True)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_residual_has_the_dtype_of_x():
    x, *others = leaves(M=6)
    with pytest.raises(ValueError, match="the dtype of x, torch.float16, got a bias and torch.float32"):
        mlp(x, *others, x.float())


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
def test_traces_as_one_graph(compiler, backend):
    inputs = [leaf.requires_grad_() for leaf in leaves()]
    ops = (torch.compile(mlp, backend=compiler, fullgraph=True), mlp)
    results = [torch.autograd.grad(op(*inputs).float().square().mean(), inputs) for op in ops]
    torch.testing.assert_close(*results)


def test_products_are_counted(backend):
    """Of what is only estimated, a memory budget would choose to compute the products again."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [leaf.requires_grad_() for leaf in leaves()]
    with FlopCounterMode(display=False) as fused:
        mlp(*inputs).float().sum().backward()
    with FlopCounterMode(display=False) as plain:
        mlp_reference(*inputs).float().sum().backward()
    assert fused.get_total_flops() == plain.get_total_flops() > 0
