"""Contrast against the spec's golden value; the snapshot against a float64 recurrence."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from miles_fast.config import (
    ContrastConfig,
    MethodConfig,
    ModelConfig,
    RegressionConfig,
    SnapshotConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from miles_fast.models.dual_encoder import DualEncoder, unit
from miles_fast.models.flops import predictor_flops, training_flops, video_flops
from miles_fast.training.losses import contrastive_loss
from miles_fast.training.objective import Objective
from miles_fast.training.snapshot import Snapshot

TEXT = torch.tensor(
    [
        [-0.05, 0.1, 0.2, -0.3, 0.4, 0.1],
        [0.3, -0.2, 0.1, 0.1, -0.4, 0.2],
        [0.2, 0.2, -0.3, 0.1, 0.0, 0.5],
        [0.1, -0.5, 0.3, 0.2, 0.1, 0.0],
    ],
    dtype=torch.float64,
)


def test_contrast_is_the_golden_one():
    from models.test_video_encoder import fill

    text, video = fill((4, 6), 1), fill((4, 6), 2)
    assert abs((unit(text)[0] @ unit(video)[0]).item() - 0.520805806464) < 1e-10
    assert abs(contrastive_loss(text, video, ContrastConfig()).item() - 3.402987357384) < 1e-9


def test_contrast_of_orthogonal_pairs_and_chance():
    eye = torch.eye(4, dtype=torch.float64)
    expected = 2 * math.log(1 + 3 * math.exp(-20))
    assert abs(contrastive_loss(eye, eye, ContrastConfig()).item() - expected) < 1e-12
    same = torch.ones(4, 3, dtype=torch.float64)
    assert abs(contrastive_loss(same, same, ContrastConfig()).item() - 2 * math.log(4)) < 1e-12


def test_a_rank_scores_its_own_rows_against_all_and_the_mean_is_the_joined_loss(monkeypatch):
    from miles_fast.training import losses

    draw = torch.Generator().manual_seed(3)
    text, video = torch.randn(2, 12, 6, generator=draw, dtype=torch.float64)
    joined, scored, found = contrastive_loss(text, video, ContrastConfig()), [], []
    gathered = torch.stack([unit(text), unit(video)], dim=1)
    monkeypatch.setattr(losses, "start_gather", lambda _: lambda: gathered)
    monkeypatch.setattr(losses, "unit", lambda rows: scored.append(rows.shape) or unit(rows))
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda scores, own: scored.append(scores.shape) or cross_entropy(scores, own)
    )
    for own in range(4):
        monkeypatch.setattr(losses, "rank", lambda own=own: own)
        rows = slice(3 * own, 3 * own + 3)
        found.append(contrastive_loss(text[rows], video[rows], ContrastConfig()))
    assert set(scored) == {(3, 6), (3, 12)}
    torch.testing.assert_close(torch.stack(found).mean(), joined)


def test_grad_scale_changes_the_gradient_alone():
    values, gradients = [], []
    for scale in (1.0, 0.25):
        text = TEXT.clone().requires_grad_()
        loss = contrastive_loss(text, TEXT.flip(0), ContrastConfig(grad_scale=scale))
        loss.backward()
        values.append(loss.item())
        gradients.append(text.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    torch.testing.assert_close(gradients[0] * 0.25, gradients[1])


def student():
    video = VideoEncoderConfig(image_size=16, patch_size=8, width=8, depth=1, heads=2)
    text = TextEncoderConfig(tokenizer="none", width=8, depth=1, heads=2, hidden=8, max_positions=8)
    return DualEncoder(ModelConfig(video=video, text=text, embedding=4), 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshot_follows_the_float64_recurrence(dtype):
    torch.manual_seed(0)
    model = student()
    config = SnapshotConfig(momentum=0.9, final_momentum=1.0)
    snapshot = Snapshot(
        model, config, RegressionConfig(), total_steps=20, dtype=dtype, device=torch.device("cpu")
    )
    exact = {name: tensor.double() for name, tensor in snapshot.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in exact.items()}
    named = dict(
        nn.ModuleDict({"video_model": model.video_model, "vid_proj": model.vid_proj}).named_parameters()
    )
    for step in range(1, 21):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        snapshot.follow(model, step)
        snapshot.follow(model, step, moved=False)  # changes nothing
        momentum = 1 - 0.1 * (math.cos(math.pi * step / 20) + 1) / 2
        assert snapshot.momentum(step) == pytest.approx(momentum)
        exact = {
            name: momentum * old + (1 - momentum) * named[name].detach().double()
            for name, old in exact.items()
        }
    for name, tensor in snapshot.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), exact[name], atol=1e-6, rtol=0)
        assert (exact[name] - start[name]).abs().max() > 1e-3
    assert not any(p.requires_grad for p in snapshot._modules.parameters())


def test_snapshot_copies_and_freezes():
    torch.manual_seed(0)
    for update, every in (("copy", 2), ("frozen", 1)):
        model = student()
        snapshot = Snapshot(
            model,
            SnapshotConfig(update=update, every=every),
            RegressionConfig(),
            total_steps=4,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        first = snapshot.state_dict()["vid_proj.0.weight"].clone()
        with torch.no_grad():
            model.vid_proj[0].weight.add_(1.0)
        snapshot.follow(model, 1)
        assert torch.equal(snapshot.state_dict()["vid_proj.0.weight"], first)
        snapshot.follow(model, 2, moved=False)  # a copy that is due is not put off because a step was skipped
        expected = model.vid_proj[0].weight if update == "copy" else first
        assert torch.equal(snapshot.state_dict()["vid_proj.0.weight"], expected)


def test_targets_are_the_full_clips_masked_patches_projected_when_asked():
    model = student().eval()
    video = torch.randn(2, 2, 3, 16, 16)
    patches = model.video_model(video)[:, 1:]
    masked = torch.tensor([[0, 5, 7], [1, 2, patches.shape[1] - 1]])
    chosen = torch.stack([clip[rows] for clip, rows in zip(patches, masked, strict=True)])
    for feature, expected in (("final_norm", chosen), ("projected", model.vid_proj(chosen))):
        snapshot = Snapshot(
            model,
            SnapshotConfig(),
            RegressionConfig(feature=feature),
            total_steps=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        torch.testing.assert_close(snapshot.encode(video, masked), expected)


@pytest.mark.parametrize("view", ["A", "B"])
def test_contrast_and_regression_get_their_rows_of_their_pass(view):
    torch.manual_seed(0)
    objective = Objective(student(), MethodConfig(view=view), 2).eval()
    video = torch.randn(3, 2, 3, 16, 16)
    masked_BM = torch.stack([torch.randperm(8)[:3] for _ in video])
    masked_BN = torch.zeros(3, 8, dtype=torch.bool).scatter_(1, masked_BM, True)
    encoder = objective.model.video_model
    masked = encoder(video, masked_BN=masked_BN, mask_token=objective.mask_token)
    contrasted = masked if view == "A" else encoder(video)
    cls_BD, features_BMD = objective._encode_masked(video, masked_BM)
    torch.testing.assert_close(cls_BD, contrasted[:, 0])
    expected = torch.stack([clip[1 + rows] for clip, rows in zip(masked, masked_BM, strict=True)])
    torch.testing.assert_close(features_BMD, expected)


@pytest.mark.parametrize("view", ["A", "none"])
def test_the_statistics_are_called_while_rows_of_other_ranks_travel(monkeypatch, view):
    from miles_fast.training import losses

    objective, called = Objective(student(), MethodConfig(view=view), 2).eval(), []
    monkeypatch.setattr(
        losses, "start_gather", lambda rows: called.append("start") or (lambda: called.append("end") or rows)
    )
    compute = objective.statistics
    monkeypatch.setattr(objective, "statistics", lambda *rows: called.append("statistics") or compute(*rows))
    video, tokens = torch.randn(3, 2, 3, 16, 16), torch.ones(3, 4, dtype=torch.long)
    masks = (torch.tensor([[0, 5]] * 3), torch.randn(3, 2, 8)) if view == "A" else ()
    found = objective(video, tokens, tokens, *masks)
    assert called == ["start", *(["statistics"] if view == "A" else []), "end"]
    assert (found.regression > 0) == (found.target_cosine != 0) == (found.target_std > 0) == (view == "A")


def test_flops_are_the_specs():
    config = ModelConfig(text=TextEncoderConfig(tokenizer="none"))
    for frames, forward in ((1, 46.30), (4, 184.62), (8, 369.24), (16, 739.18)):
        assert sum(video_flops(config.video, frames)) / 1e9 == pytest.approx(forward, abs=0.006)
    for view, frames, total in (("none", 4, 561.1), ("A", 4, 745.8), ("B", 4, 1298.7), ("A", 1, 193.2)):
        method = MethodConfig(view=view)
        assert training_flops(config, method, frames, 32) / 1e9 == pytest.approx(total, abs=0.06)
    for clip, total in (("visible", 328.4), ("full", 881.3)):  # spec/miles.md 10.3, predictor not counted
        method = MethodConfig(view="D", mask={"ratio": 0.75}, contrast={"clip": clip})
        predictor = 3 * predictor_flops(config, method, 4)
        assert (training_flops(config, method, 4, 32) - predictor) / 1e9 == pytest.approx(total, abs=0.06)
        assert predictor / 1e9 == pytest.approx(3 * (7.408 + 0.474 + 0.015 + 0.463), abs=0.02)
