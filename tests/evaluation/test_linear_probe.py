"""The linear probe: at the minimum of its objective, right where classes part, at chance elsewhere."""

import pytest
import torch

from miles_fast.evaluation.linear_probe import fit_probe, probe, scores


def test_the_fit_is_the_minimum():
    torch.manual_seed(0)
    features, labels, penalty = torch.randn(60, 5), torch.randint(0, 3, (60,)), 0.01
    weights = fit_probe(features, labels, 3, penalty)
    # The gradient by hand: (softmax - one-hot)^T inputs / N + penalty * weights, without the bias.
    error = scores(features, weights).softmax(1) - torch.nn.functional.one_hot(labels, 3)
    inputs = torch.cat([features, torch.ones(60, 1)], dim=1).double()
    gradient = error.T @ inputs / 60
    gradient[:, :-1] += penalty * weights[:, :-1]
    assert gradient.abs().max() < 1e-6 and weights.abs().max() > 0.1


def test_classes_that_part_are_found_whatever_the_scale_and_noise_is_chance():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    centres = torch.randn(3, 4)
    scale = torch.tensor([1e3, 1, 1e-3, 1])
    train, test = ((centres[labels] + 0.1 * torch.randn(60, 4)) * scale for _ in range(2))
    found, _ = probe(train, labels, test, 3)
    assert (found.argmax(1) == labels).all()
    found, penalty = probe(torch.randn(60, 4), labels, torch.randn(2000, 4), 3)
    assert abs(float((found.argmax(1) == torch.arange(3).repeat(667)[:2000]).double().mean()) - 1 / 3) < 0.06
    assert penalty == 0.1  # nothing to learn: the strongest


def test_training_videos_of_one_class_are_refused():
    with pytest.raises(ValueError, match="all of one class"):
        probe(torch.randn(5, 2), torch.zeros(5, dtype=torch.long), torch.randn(5, 2), 3)
