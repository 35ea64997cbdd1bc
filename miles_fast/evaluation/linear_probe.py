"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.2  # of the training features, to choose the penalty


def fit_probe(features_ND: Tensor, labels_N: Tensor, num_classes: int, penalty: float) -> Tensor:
    """Weights and bias (K, D + 1) of the regression with `penalty / 2 * |weights|^2`, by L-BFGS in float64.

    The minimum is unique, so that start and machine do not matter; the bias is not penalised.
    """
    inputs = torch.cat([features_ND.double(), features_ND.new_ones(len(features_ND), 1).double()], dim=1)
    weights = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weights.T, labels_N) + penalty / 2 * weights[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def probe(
    train_ND: Tensor, train_labels_N: Tensor, test_MD: Tensor, num_classes: int
) -> tuple[Tensor, float]:
    """Scores (M, K) of test features by a probe fitted to the training ones, and the penalty chosen.

    Features are standardised by the training set's mean and deviation; the penalty is the one that is best on
    a fifth of the training set, and the probe is then fitted to all of it. Raises ValueError for a training
    set of one class.
    """
    if len(train_labels_N.unique()) < 2:
        raise ValueError("the training videos are all of one class; a probe needs at least two")
    mean, deviation = train_ND.mean(0), train_ND.std(0).clamp(min=1e-6)
    train, test = (train_ND - mean) / deviation, (test_MD - mean) / deviation
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out, fitted = order[: max(1, round(HELD_OUT * len(train)))], order[round(HELD_OUT * len(train)) :]

    def error(penalty: float) -> float:
        weights = fit_probe(train[fitted], train_labels_N[fitted], num_classes, penalty)
        return float(F.cross_entropy(scores(train[held_out], weights), train_labels_N[held_out]))

    penalty = min(PENALTIES, key=error)
    return scores(test, fit_probe(train, train_labels_N, num_classes, penalty)), penalty


def scores(features_ND: Tensor, weights: Tensor) -> Tensor:
    """Class scores (N, K) of features by `fit_probe`'s weights."""
    return features_ND.double() @ weights[:, :-1].T + weights[:, -1]
