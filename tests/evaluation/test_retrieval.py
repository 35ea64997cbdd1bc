"""Retrieval metrics by hand, ties, chance."""

import pytest
import torch

from miles_fast.evaluation.retrieval import chance, ranking


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.4, 0.2]])
    result = ranking(similarity)  # ranks 1, 2, 3
    assert (result.r1, result.r5, result.median_rank, result.mean_rank) == (pytest.approx(1 / 3), 1, 2, 2)
    back = ranking(similarity.T)  # columns: 0.9 of .9 .8 .3 -> 1; 0.5 -> 1; 0.2 of .2 .1 .2 -> a tie: 1.5
    assert back.r1 == pytest.approx(2 / 3) and back.mean_rank == pytest.approx(3.5 / 3)


def test_a_constant_model_scores_chance_not_one():
    result, guess = ranking(torch.zeros(101, 101)), chance(101)
    assert result.r1 == 0 and result.median_rank == guess.median_rank == 51


def test_a_model_of_nan_is_no_perfect_one():
    with pytest.raises(ValueError, match="similarities are not finite"):
        ranking(torch.full((5, 5), torch.nan))


def test_a_perfect_model():
    result = ranking(torch.eye(20))
    assert (result.r1, result.median_rank) == (1, 1)


def test_chance_is_what_random_scores_give():
    torch.manual_seed(0)
    result, guess = ranking(torch.rand(2000, 2000)), chance(2000)
    assert result.r10 == pytest.approx(guess.r10, abs=0.004)
    assert result.median_rank == pytest.approx(guess.median_rank, rel=0.05)
