"""The video encoder against the official golden vectors (spec/miles.md 9.4), timm and the definition."""

from functools import partial

import numpy as np
import pytest
import torch
from golden import GOLDEN, LAST_TOKEN, SECOND, fill, golden_encoder

from miles_fast.config import VideoEncoderConfig
from miles_fast.kernels.divided_attention import divided_attention_reference
from miles_fast.models import video_encoder
from miles_fast.models.attention import divided_attention
from miles_fast.models.image_weights import load_image_weights
from miles_fast.models.video_encoder import SpaceTimeTransformer

ORDER = ("norm1", "attn", "timeattn", "norm2", "mlp", "norm3")


def test_fill_is_the_specs():
    np.testing.assert_allclose(fill((3,), 0), [0.23028517, 0.21085111, 0.39529029], atol=2e-8)
    np.testing.assert_allclose(fill((3,), 1000), [0.26495058, -0.27775865, 0.01395522], atol=2e-8)


def test_names_and_sizes_are_the_published_ones():
    state = SpaceTimeTransformer(VideoEncoderConfig()).state_dict()
    assert len(state) == 223
    assert sum(tensor.numel() for tensor in state.values()) == 114_168_576
    assert list(state)[:5] == [
        "cls_token",
        "pos_embed",
        "temporal_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    assert list(dict.fromkeys(name.split(".")[2] for name in state if name.startswith("blocks.0."))) == list(
        ORDER
    )


@pytest.mark.parametrize("num_frames", [4, 2, 1])
@pytest.mark.parametrize(
    "backend,dtype,tolerance",
    [
        ("sdpa", torch.float64, 1e-6),
        ("sdpa", torch.float32, 2e-5),
        ("eager", torch.float32, 2e-5),
        ("reference", torch.float32, 2e-5),
    ],
)
@torch.inference_mode()
def test_golden_vectors(backend, dtype, tolerance, num_frames):
    video = (4 * fill((2, num_frames, 3, 224, 224), 1000)).to(dtype)
    tokens = golden_encoder(backend, dtype)(video)
    first, norm, total = GOLDEN[num_frames]
    np.testing.assert_allclose(tokens[0, 0, :6], first, atol=tolerance)
    np.testing.assert_allclose(tokens[1, 0, :3], SECOND[num_frames], atol=tolerance)
    np.testing.assert_allclose(tokens[0, -1, :3], LAST_TOKEN[num_frames], atol=tolerance)
    assert abs(tokens[:, 0].norm().item() - norm) < 50 * tolerance
    assert abs(tokens.sum().item() - total) < (1e-4 if dtype == torch.float64 else 0.5)


@torch.inference_mode()
def test_golden_vectors_of_the_reference_in_float64():
    tokens = golden_encoder("reference", torch.float64)(4 * fill((2, 2, 3, 224, 224), 1000))
    np.testing.assert_allclose(tokens[0, 0, :6], GOLDEN[2][0], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("num_frames", [4, 2, 1])
@pytest.mark.parametrize(
    "backend,dtype,tolerance",
    [
        ("sdpa", torch.float64, 1e-6),
        ("sdpa", torch.float32, 2e-5),
        ("triton", torch.float32, 2e-5),
        ("reference", torch.float32, 2e-5),
    ],
)
@torch.inference_mode()
def test_golden_vectors_on_the_gpu(backend, dtype, tolerance, num_frames, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    video = (4 * fill((2, num_frames, 3, 224, 224), 1000)).to("cuda", dtype)
    tokens = golden_encoder(backend, dtype).cuda()(video).cpu()
    np.testing.assert_allclose(tokens[0, 0, :6], GOLDEN[num_frames][0], atol=tolerance)
    np.testing.assert_allclose(tokens[0, -1, :3], LAST_TOKEN[num_frames], atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("backend", ["sdpa", "triton", "flash"])
def test_bf16_backends_on_the_gpu(backend, axis):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    qkv = torch.randn(2, 785, 3, 12, 64, dtype=torch.float64, device="cuda", requires_grad=True)
    exact = divided_attention_reference(qkv, 4, axis)
    half = qkv.detach().bfloat16().requires_grad_()
    plain = qkv.detach().bfloat16().requires_grad_()
    ours, reference = divided_attention(half, 4, axis, backend), divided_attention_reference(plain, 4, axis)
    assert (ours - exact).norm() <= 2 * (reference - exact).norm()
    weight = torch.randn_like(exact)
    grads = [
        torch.autograd.grad((o.double() * weight).sum(), x)[0]
        for o, x in ((exact, qkv), (ours, half), (reference, plain))
    ]
    assert (grads[1] - grads[0]).norm() <= 2 * (grads[2] - grads[0]).norm()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("num_frames,positions", [(1, 4), (3, 5), (16, 2)])
def test_backends_equal_the_definition_with_gradients(backend, axis, num_frames, positions):
    qkv = torch.randn(2, 1 + num_frames * positions, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    ours = divided_attention(qkv, num_frames, axis, backend)
    reference = divided_attention_reference(qkv, num_frames, axis)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    (one,) = torch.autograd.grad((ours * weight).sum(), qkv)
    (two,) = torch.autograd.grad((reference * weight).sum(), qkv)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


TINY = VideoEncoderConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2)


@pytest.mark.parametrize("init", ["identity", "zeros"])
def test_one_frame_equals_the_image_transformer_at_the_start(init):
    from miles_fast.models.torchvision_cpu import repair_torchvision

    repair_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    ).eval()
    config = VideoEncoderConfig(
        image_size=32, patch_size=8, width=24, depth=2, heads=2, num_frames=4, temporal_init=init
    )
    encoder = SpaceTimeTransformer(config).eval()
    load_image_weights(encoder, vit.state_dict(), "vit")
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(image[:, None]), vit.forward_features(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init,trains", [("identity", True), ("zeros", False)])
def test_temporal_queries_train_only_with_the_identity_start(init, trains):
    config = VideoEncoderConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2, temporal_init=init)
    torch.manual_seed(0)
    encoder = SpaceTimeTransformer(config)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(torch.randn(2, 4, 3, 32, 32))[:, 0].pow(2).sum().backward()
        optimizer.step()
    gradient = encoder.blocks[0].timeattn.qkv.weight.grad[: 2 * 24]
    assert (gradient.abs().max() > 0) == trains


def test_more_frames_than_temporal_rows_are_interpolated():
    encoder = SpaceTimeTransformer(TINY)
    torch.nn.init.normal_(encoder.temporal_embed)
    table = encoder.temporal_embed[0]
    torch.testing.assert_close(encoder.temporal_table(3), table[:3])
    eight = encoder.temporal_table(8)
    torch.testing.assert_close(eight[0], table[0])
    torch.testing.assert_close(eight[2], 0.25 * table[0] + 0.75 * table[1])
    assert encoder(torch.randn(1, 8, 3, 32, 32)).shape == (1, 1 + 8 * 16, 24)


def test_masked_patches_do_not_see_their_pixels_and_rows_are_picked():
    encoder = SpaceTimeTransformer(TINY).eval()
    token = torch.randn(1, 1, 24)
    masked = torch.zeros(1, 32, dtype=torch.bool)
    masked[0, [3, 19]] = True
    video = torch.randn(1, 2, 3, 32, 32)
    other = video.clone()
    other[0, 0, :, :8, 24:32] = 7.0  # patch 3 of frame 0
    with torch.inference_mode():
        one = encoder(video, masked_BN=masked, mask_token=token)
        two = encoder(other, masked_BN=masked, mask_token=token)
        picked = encoder(video, masked_BN=masked, mask_token=token, rows_BM=torch.tensor([[0, 4, 20]]))
        pair = partial(encoder, video, masked_BN=masked, mask_token=token, with_unmasked=True)
        both, listed = pair(), pair(rows_BM=torch.tensor([[4, 20, 33]]))
        plain = encoder(video)
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    torch.testing.assert_close(picked[0], one[0, [0, 4, 20]], atol=1e-6, rtol=0)
    torch.testing.assert_close(both, torch.cat([one, plain]), atol=1e-5, rtol=0)
    torch.testing.assert_close(listed[0, :2], one[0, [4, 20]], atol=1e-5, rtol=0)
    torch.testing.assert_close(listed[0, 2], plain[0, 0], atol=1e-5, rtol=0)
    assert (plain - one).abs().max() > 1e-3


@pytest.mark.parametrize("summed_behind", [False, True])
@pytest.mark.parametrize("rows", [None, [[0, 4, 20], [1, 2, 9]]])
def test_biases_get_the_same_gradient_in_parts(monkeypatch, rows, summed_behind):
    """Of qkv's, queries' from attention, values' from the output's, which what follows may have summed."""
    torch.manual_seed(0)
    encoder = SpaceTimeTransformer(TINY).double()
    for name, parameter in encoder.named_parameters():
        if "timeattn" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    video = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    rows = None if rows is None else torch.tensor(rows)
    weight = torch.randn_like(encoder(video, rows_BM=rows))
    found = []
    for parted in (False, True):
        monkeypatch.setattr(video_encoder, "takes_bias", lambda *_, parted=parted: parted)
        monkeypatch.setattr(video_encoder, "takes_biases", lambda *_, parted=parted: parted and summed_behind)
        loss = (encoder(video, rows_BM=rows) * weight).sum()
        names, parameters = zip(*encoder.named_parameters(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    whole, parts = found
    for name, gradient in whole.items():
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(parts[name], gradient, atol=1e-11, rtol=1e-9, msg=message)
    for attention in ("attn", "timeattn"):
        queries, keys, values = parts[f"blocks.0.{attention}.qkv.bias"].chunk(3)
        assert queries.abs().max() > 1e-4 and values.abs().max() > 1e-4 and not keys.any()


def test_image_weights_that_do_not_fit_are_named():
    encoder = SpaceTimeTransformer(TINY)
    weights = {k: v for k, v in encoder.state_dict().items() if "timeattn" not in k and "norm3" not in k}
    weights.pop("temporal_embed")
    weights["norm.weight"] = torch.zeros(5)
    weights.pop("blocks.1.mlp.fc1.bias")
    with pytest.raises(ValueError, match=r"missing blocks.1.mlp.fc1.bias; norm.weight is \(5,\)"):
        load_image_weights(encoder, weights, "broken.safetensors")


def test_dropped_patches_leave_no_trace_and_none_dropped_is_the_whole_clip():
    config = VideoEncoderConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2, num_frames=3)
    encoder = SpaceTimeTransformer(config).double()
    torch.nn.init.normal_(encoder.temporal_embed)
    for block in encoder.blocks:  # at its start the temporal branch is the identity
        torch.nn.init.normal_(block.timeattn.proj.weight, std=0.2)
    video = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    everything = torch.arange(48).expand(2, 48)
    torch.testing.assert_close(encoder(video, visible_BK=everything), encoder(video))
    positions = torch.tensor([[0, 5, 6, 11], [1, 2, 7, 15]])
    visible = torch.cat([positions + 16 * frame for frame in range(3)], dim=1)
    tokens = encoder(video, visible_BK=visible)
    assert tokens.shape == (2, 13, 16)
    (gradient,) = torch.autograd.grad(tokens.square().sum(), video)
    touched = gradient.abs().sum(2).unfold(2, 8, 8).unfold(3, 8, 8).sum((-1, -2)).flatten(1) > 0
    expected = torch.zeros(2, 48, dtype=torch.bool).scatter(1, visible, True)
    assert torch.equal(touched, expected)
    # A visible patch attends by its place: the same patches in another order of names are the same tokens.
    swapped = encoder(video.flip(0), visible_BK=visible.flip(0)).flip(0)
    torch.testing.assert_close(swapped, tokens)


def test_asked_for_backends_say_what_is_missing():
    with pytest.raises(ValueError, match="backend 'fast'"):
        divided_attention(torch.randn(1, 5, 3, 1, 4), 2, "time", "fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="flash"):
            SpaceTimeTransformer(TINY, "flash")
