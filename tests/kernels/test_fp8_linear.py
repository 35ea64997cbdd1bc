"""The fp8 product against float64, its gradients against F.linear's, and what is not finite."""

import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels.dispatch import quack_for
from miles_fast.kernels.fp8_linear import fp8_linear, fp8_linear_reference, quantized_rows, scaled_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUACK = quack_for(torch.device(DEVICE))
needs_quack = pytest.mark.skipif(not QUACK, reason="needs a Hopper GPU and quack-kernels")
HALF = torch.bfloat16
MANY = dict(K=192, N=384, rows=(8201,))  # quack's, where it is
LAYERS = {"qkv": (768, 2304), "fc1": (768, 3072), "fc2": (3072, 768), "narrow": (16, 32)}


def leaves(K, N, rows=(3, 67), dtype=HALF, device=DEVICE):
    generator = torch.Generator().manual_seed(K + N)
    drawn = [torch.randn(*shape, generator=generator) for shape in ((*rows, K), (N, K), (N,))]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def eights(x, weight):
    return *quantized_rows(x.detach().flatten(0, -2)), *quantized_rows(weight.detach())


def error(found, exact):
    """Largest over the tokens: length of the error by length of the token."""
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@pytest.mark.parametrize("K, N", LAYERS.values(), ids=LAYERS)
def test_is_as_far_from_the_exact_product_as_8_bits_are(K, N):
    x, weight, _ = leaves(K, N)
    exact = F.linear(x.double(), weight.double())
    mean = (fp8_linear(x, weight).double() - exact).norm() / exact.norm()
    # Four significant bits: rounding moves a number by 2.6 % (at most 6.2 %), a product of two by 3.7 %.
    assert 0.03 < mean < 0.04 and error(fp8_linear(x, weight), exact) < (0.05 if K > 16 else 0.1)


def test_an_outlier_coarsens_its_own_row_only():
    x, weight, bias = leaves(64, 32, rows=(5,))
    far = x.detach().clone()
    far[2] *= 1e6
    far[4] /= 1e6
    narrow = weight.detach() * torch.logspace(-6, 6, 32, device=DEVICE, dtype=HALF)[:, None]
    exact = F.linear(far.double(), narrow.double())
    found = fp8_linear(far, narrow).double()
    # By element, for rows and columns differ by 1e12: each within its own, whichever scale it belongs to.
    size = far.double().norm(dim=-1)[:, None] * narrow.double().norm(dim=-1)
    assert ((found - exact).abs() / size).max() < 0.02
    others = [0, 1, 3]
    assert torch.equal(fp8_linear(far, weight, bias)[others], fp8_linear(x, weight, bias)[others])


def test_rows_reach_the_largest_number_and_keep_their_own_scale():
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0], [3e-3, 1e-3, -4e-3, 2e-3]], device=DEVICE)
    eight, scale = quantized_rows(x)
    assert eight.float().abs().amax(-1).tolist() == [448, 448]
    torch.testing.assert_close(scale[:, 0] * 448, torch.tensor([2.0, 4e-3], device=DEVICE))
    torch.testing.assert_close(eight.float() * scale, x, rtol=2**-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF] if DEVICE == "cpu" else [HALF])
def test_gradients_are_the_linear_layers_own(dtype):
    inputs = leaves(48, 80, dtype=dtype)
    d_out, residual = (torch.randn(3, 67, 80).to(DEVICE, dtype) for _ in range(2))
    inputs.append(residual.requires_grad_())
    outputs = fp8_linear(*inputs), F.linear(*inputs[:3]) + residual
    found, expected = (torch.autograd.grad(out, inputs, d_out) for out in outputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_is_added_to_a_residual(backend):
    inputs = [tensor.detach() for tensor in leaves(**MANY)]
    (M,), N = MANY["rows"], MANY["N"]
    drawn = torch.randn(N, M + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    misaligned = drawn.flatten()[1 : 1 + M * N].view(M, N)
    for residual in (drawn[:, 1:].T, drawn.T[1:].contiguous(), misaligned):
        expected = fp8_linear_reference(*(tensor.double() for tensor in inputs)) + residual.double()
        assert error(fp8_linear(*inputs, residual), expected) < 1e-2


def test_frozen_weights_get_no_gradient():
    x, weight, bias = leaves(32, 16)
    out = fp8_linear(x, weight.detach(), bias.detach())
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand_as(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", [dict(K=32, N=16, rows=(6,)), MANY], ids=["few", "many"])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(sizes, backend):
    x, weight, bias = (tensor.detach() for tensor in leaves(**sizes))
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0, float("inf"), float("nan"), -float("inf")
    out = fp8_linear(x, weight, bias)
    assert torch.equal(out[0], bias)
    assert out[1:4].isfinite().sum() == 0 and out[4:].isfinite().all()
    weight[4, 0], weight[9] = float("nan"), 0
    out = fp8_linear(x[4:], weight, bias)
    assert out[:, 4].isnan().all() and torch.equal(out[:, 9], bias[9].expand(len(out)))
    assert out[:, [0, 1, 5]].isfinite().all()


def test_torchs_product_takes_the_same_numbers_and_scales():
    x, weight, bias = (tensor.detach() for tensor in leaves(96, 48, rows=(37,)))
    (x8, scale_x), (w8, scale_w) = quantized_rows(x), quantized_rows(weight)
    torchs = torch._scaled_mm(x8, w8.t(), scale_x, scale_w.t(), bias=bias, out_dtype=HALF)
    torch.testing.assert_close(torchs, fp8_linear_reference(x, weight, bias), rtol=1.6e-2, atol=5e-2)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend):
    inputs = leaves(32, 64, rows=(2, 5))
    norm = torch.nn.LayerNorm(32, device=DEVICE, dtype=HALF)

    def layer(x, weight, bias):
        return fp8_linear(norm(x), weight, bias)

    ops = (torch.compile(layer, backend=backend, fullgraph=True), layer)
    results = [torch.autograd.grad(op(*inputs).square().sum(), inputs) for op in ops]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(ops[0](*inputs), layer(*inputs))


@needs_quack
def test_quack_takes_wide_products_of_many_rows_and_a_bias(monkeypatch):
    taken = []

    def watch(x8, *others):
        taken.append(tuple(x8.shape))
        return computed(x8, *others)

    computed = QUACK.scaled_product
    monkeypatch.setattr(QUACK, "scaled_product", watch)
    fp8_linear(*leaves(**MANY))
    fp8_linear(*leaves(**MANY)[:2])
    fp8_linear(*leaves(**MANY | dict(rows=(100,))))
    fp8_linear(*leaves(**MANY | dict(N=208)))
    assert taken == [(8201, 192)]
    monkeypatch.setattr("miles_fast.kernels.dispatch._QUACK", False)
    fp8_linear(*leaves(**MANY))
    assert len(taken) == 1


@needs_quack
def test_takes_tensors_that_lie_anywhere():
    """DeepSpeed's flat buffers hold weights behind others of any size."""
    x, weight, bias = (tensor.detach() for tensor in leaves(**MANY))
    residual = torch.randn_like(F.linear(x, weight))
    tensors = *eights(x, weight), bias, residual
    moved = [tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor) for tensor in tensors]
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    assert torch.equal(scaled_product(*tensors, HALF), scaled_product(*moved, HALF))


@pytest.mark.parametrize("sizes", [dict(K=32, N=16, rows=(6,)), MANY], ids=["few", "many"])
def test_registered_op_is_sound(sizes, backend):
    x, weight, bias = leaves(**sizes)
    residual = F.linear(x, weight).detach()
    for more in ((bias.detach(), None), (None, None), (bias.detach(), residual)):
        inputs = (*eights(x, weight), *more, HALF)
        # Not its schema: torch cannot multiply 8-bit floats, which that check does to change them.
        op = torch.ops.miles_fast.scaled_product.default
        torch.library.opcheck(op, inputs, test_utils="test_faketensor")


def test_products_are_counted():
    """Of what is only estimated, a memory budget would choose to compute the products again."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for op in (fp8_linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            op(*leaves(32, 64)).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("K, N", LAYERS.values(), ids=LAYERS)
def test_a_gpus_product_is_that_of_the_reference(K, N, backend):
    inputs = leaves(K, N, rows=(11, 785))
    with torch.no_grad():
        expected = fp8_linear_reference(*(tensor.double() for tensor in inputs))
        # The output is rounded to bf16, and the tensor cores add with fewer bits than float32 has.
        assert error(fp8_linear(*inputs), expected) < 1e-2
        compiled = torch.compile(fp8_linear, fullgraph=True)
        assert error(compiled(*inputs), expected) < 1e-2


@pytest.mark.gpu
def test_a_gpus_compiled_cast_passes_on_what_is_not_finite():
    x, weight, bias = (tensor.detach() for tensor in leaves(768, 48, rows=(6,)))
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0, float("inf"), float("nan"), -float("inf")
    out = torch.compile(fp8_linear, fullgraph=True)(x, weight, bias)
    assert torch.equal(out[0], bias)
    assert out[1:4].isfinite().sum() == 0 and out[4:].isfinite().all()


@pytest.mark.gpu
def test_a_gpu_takes_bf16_only():
    with pytest.raises(ValueError, match="take bfloat16 on a GPU, got torch.float32"):
        fp8_linear(*leaves(16, 16, dtype=torch.float32))
