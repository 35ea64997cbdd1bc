import math

import pytest
import torch

from miles_fast.kernels import cases, token_cases
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.feature_regression import (
    NORMALIZATIONS,
    feature_regression,
    feature_regression_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = (feature_regression, feature_regression_reference)


def _features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _index(*rows):
    return torch.tensor(rows, device=DEVICE)


@pytest.mark.parametrize("case", token_cases.FEATURE_REGRESSION_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, feature_regression, feature_regression_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", token_cases.FEATURE_REGRESSION_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, feature_regression, feature_regression_reference, "cuda") == []


@pytest.mark.parametrize("op", OPS)
def test_values_by_hand(op):
    prediction = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], device=DEVICE)
    target = torch.tensor([[[9.0, 9.0], [10.0, 0.0], [0.0, 1.0]]], device=DEVICE)
    # Rows: cos((3, 4), (10, 0)) = 0.6 and cos((0, 2), (0, 1)) = 1.
    l2 = op(prediction, target, target_index_BM=_index([1, 2]))
    assert float(l2) == pytest.approx((2 - 2 * 0.6) / 2)
    plain = op(prediction, target, target_index_BM=_index([1, 2]), normalization="none")
    assert float(plain) == pytest.approx(((49 + 16) / 2 + 1 / 2) / 2)
    # With two columns LayerNorm is the sign of the difference: (-1, 1) against (1, -1) and (-1, 1) against
    # itself.
    layernorm = op(prediction, target, target_index_BM=_index([1, 2]), normalization="layernorm")
    assert float(layernorm) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_l2_is_two_minus_two_cosines(op):
    prediction, target = _features(2, 3, 16), _features(2, 3, 16, seed=1)
    cosine = torch.nn.functional.cosine_similarity(prediction, target, dim=-1)
    assert float(op(prediction, target)) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reference_passes_gradcheck(normalization):
    prediction = _features(2, 4, 5, dtype=torch.float64).requires_grad_()
    target = _features(2, 3, 5, seed=1, dtype=torch.float64)
    index, target_index = _index([3, 1], [0, 2]), _index([2, 0], [1, 0])

    def loss(x):
        return feature_regression(
            x, target, target_index_BM=target_index, prediction_index_BM=index, normalization=normalization
        )

    assert torch.autograd.gradcheck(loss, prediction)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_stops_at_the_target_and_is_zero_off_the_index(op, normalization):
    prediction, target = _features(2, 6, 8).requires_grad_(), _features(2, 6, 8, seed=1).requires_grad_()
    index = _index([5, 0], [1, 2])
    with cases.unwritten_memory_is_nan():
        op(
            prediction, target, target_index_BM=index, prediction_index_BM=index, normalization=normalization
        ).backward()
    assert target.grad is None
    touched = prediction.grad.abs().sum(dim=-1) > 0
    assert touched.tolist() == [
        [True, False, False, False, False, True],
        [False, True, True, False, False, False],
    ]
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_asked_for_when_only_the_target_wants_one(op):
    loss = op(_features(1, 2, 8), _features(1, 2, 8, seed=1).requires_grad_())
    assert not loss.requires_grad


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_features_have_no_loss_and_no_gradient(normalization):
    target = _features(2, 3, 16)
    prediction = target.clone().requires_grad_()
    loss = feature_regression(prediction, target, normalization=normalization)
    loss.backward()
    # Not exactly zero: a GPU contracts u - v into a fused multiply-add, unrounded on one side.
    assert float(loss.detach()) < 1e-12
    assert float(prediction.grad.abs().max()) < 1e-6


def test_target_may_repeat_and_prediction_index_may_not():
    prediction, target = _features(1, 3, 8), _features(1, 3, 8, seed=1)
    twice = _index([1, 1, 0])
    assert math.isfinite(float(feature_regression(prediction, target, target_index_BM=twice)))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="prediction_index_BM names a token twice"):
            feature_regression(prediction, target, prediction_index_BM=twice)


def test_reads_views_of_wider_rows_through_their_own_strides():
    # Row strides 20 and 13 for rows of 8: neither the width nor each other's.
    wide_prediction, wide_target = _features(2, 4, 20), _features(2, 5, 13, seed=1)
    index = _index([3, 1], [0, 2])

    def loss_and_gradient(op, copied):
        leaf = wide_prediction.clone().requires_grad_()
        prediction, target = leaf[..., 4:12], wide_target[..., 2:10]
        if copied:
            prediction, target = prediction.contiguous(), target.contiguous()
        loss = op(prediction, target, prediction_index_BM=index, target_index_BM=index + 1)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    viewed = loss_and_gradient(feature_regression, copied=False)
    expected = loss_and_gradient(feature_regression_reference, copied=True)
    torch.testing.assert_close(viewed, expected, rtol=1e-5, atol=1e-6)


def test_scales_with_the_gradient_from_above():
    prediction, target = _features(2, 3, 16), _features(2, 3, 16, seed=1)

    def gradient(factor):
        leaf = prediction.clone().requires_grad_()
        (factor * feature_regression(leaf, target)).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(-3.0), -3.0 * gradient(1.0), rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter")
@pytest.mark.parametrize("indexed", (False, True))
def test_registered_op_is_sound(indexed):
    prediction, target = _features(2, 4, 8).requires_grad_(), _features(2, 4, 8, seed=1)
    index = _index([3, 1], [0, 2]) if indexed else None
    torch.library.opcheck(
        torch.ops.miles_fast.feature_regression.default, (prediction, target, index, index, "l2")
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend, dtype):
    prediction = _features(2, 5, 8, dtype=dtype).requires_grad_()
    target, index = _features(2, 5, 8, seed=1, dtype=dtype), _index([3, 1], [0, 2])

    def loss(prediction, target, index):
        return feature_regression(
            prediction * 2, target[:, 1:], target_index_BM=index, prediction_index_BM=index + 1
        )

    value = torch.compile(loss, backend=backend, fullgraph=True)(prediction, target, index)
    expected = loss(prediction, target, index)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    compiled_gradient, gradient = (torch.autograd.grad(x, prediction)[0] for x in (value, expected))
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ("prediction_index_BM", "target_index_BM"))
def test_index_out_of_range_raises_on_the_cpu(name):
    with pytest.raises(IndexError, match=name):
        feature_regression(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), **{name: torch.tensor([[0, 2]])})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("prediction_index_BM", "target_index_BM"))
def test_index_out_of_range_is_a_nan_loss_on_a_gpu(name):
    loss = feature_regression(_features(1, 2, 8), _features(1, 2, 8), **{name: _index([0, 2])})
    assert loss.isnan()


@pytest.mark.parametrize(
    ("prediction", "target", "options", "message"),
    (
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), {"normalization": "cosine"}, "choose one of l2"),
        (torch.zeros(2, 8), torch.zeros(2, 3, 8), {}, "prediction_BMD must be"),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8, dtype=torch.int64), {}, "target must be"),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 4), {}, "clips or widths differ"),
        (torch.zeros(2, 3, 8), torch.zeros(1, 3, 8), {}, "clips or widths differ"),
        (torch.zeros(2, 3, 8), torch.zeros(2, 4, 8), {}, "pass the index of the longer one"),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8, device="meta"), {}, "target on meta"),
        (torch.zeros(2, 0, 8), torch.zeros(2, 0, 8), {}, "no rows to compare"),
        (
            torch.zeros(2, 3, 8),
            torch.zeros(2, 3, 8),
            {"target_index_BM": torch.zeros(2, 3)},
            "target_index_BM must be int64",
        ),
    ),
)
def test_says_what_is_wrong_with_its_inputs(prediction, target, options, message):
    with pytest.raises(ValueError, match=message):
        feature_regression(prediction, target, **options)
