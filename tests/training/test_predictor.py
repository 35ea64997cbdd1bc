"""The predictor of view D: every masked patch is predicted from its place and from what is visible."""

import pytest
import torch
from tiny import tiny_tree

from miles_fast.config import ConfigError, PredictorConfig, VideoEncoderConfig
from miles_fast.config_tree import parse_config
from miles_fast.training.predictor import Predictor

ENCODER = VideoEncoderConfig(image_size=32, patch_size=8, width=24, depth=1, heads=2, num_frames=2)


def predictor():
    torch.manual_seed(0)
    made = Predictor(PredictorConfig(width=16, depth=2, heads=2), ENCODER, 2, 10).double()
    for block in made.blocks:
        torch.nn.init.normal_(block.timeattn.proj.weight, std=0.2)
    return made


def places(*positions):
    chosen = torch.tensor(positions)
    return torch.cat([chosen, chosen + 16], dim=1)


def test_predictions_depend_on_all_that_is_visible_and_on_their_place():
    model = predictor()
    masked = places([0, 3, 9], [2, 3, 15])
    visible = torch.tensor([[n for n in range(32) if n not in row] for row in masked.tolist()])
    tokens = torch.randn(2, 27, 24, dtype=torch.float64, requires_grad=True)
    out = model(tokens, visible, masked)
    assert out.shape == (2, 6, 10)
    (gradient,) = torch.autograd.grad(out[0].sum(), tokens)
    assert (gradient[0].abs().sum(-1) > 0).all() and not gradient[1].any()
    other = model(tokens, visible, masked[:, [1, 0, 2, 3, 4, 5]])
    torch.testing.assert_close(other[:, [1, 0, 2, 3, 4, 5]], out)
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-6


def test_every_parameter_learns():
    model = predictor()
    masked = places([0, 3], [2, 3])
    visible = torch.tensor([[n for n in range(32) if n not in row] for row in masked.tolist()])
    model(torch.randn(2, 29, 24, dtype=torch.float64), visible, masked).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_masks_that_differ_from_frame_to_frame_are_refused(tmp_path):
    tree = {**tiny_tree(tmp_path), "method": {"view": "D", "mask": {"kind": "frame_random"}}}
    with pytest.raises(ConfigError, match="view D drops patches.*mask.kind = frame_random"):
        parse_config(tree, "x.yaml")
