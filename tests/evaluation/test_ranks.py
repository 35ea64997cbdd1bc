"""Ranks against an independent computation, and ties made by hand."""

import numpy as np
import pytest
import torch

from miles_fast.evaluation.benchmark import multiple_choice, retrieval, templates
from miles_fast.evaluation.protocol import Split
from miles_fast.evaluation.ranks import ROWS, best_ranks, dual_softmax
from miles_fast.evaluation.retrieval import ranking


def sorted_ranks(similarity, query_labels, gallery_labels):
    """The mean place of the best answer among the items it ties with, by sorting; in numpy."""
    ranks = []
    for row, label in zip(similarity, query_labels, strict=True):
        own = np.array(gallery_labels) == label
        best = row[own].max()
        places = np.sort(np.append(row[~own], best))[::-1]
        ranks.append(1 + np.flatnonzero(places == best).mean())
    return np.array(ranks)


def test_ranks_are_those_of_sorting_with_ties_and_several_answers():
    random = np.random.default_rng(0)
    similarity = random.integers(0, 6, (ROWS + 77, 40)).astype(np.float32)  # full of ties
    gallery = np.append(np.arange(12), random.integers(0, 12, 28))
    queries = random.integers(0, 12, len(similarity))
    ranks = best_ranks(*map(torch.from_numpy, (similarity, queries, gallery)))
    np.testing.assert_allclose(ranks, sorted_ranks(similarity, queries, gallery))


def test_ties_by_hand():
    one = torch.tensor([[0.5, 0.5, 0.1, 0.5]])
    assert best_ranks(one, torch.tensor([0]), torch.arange(4)).tolist() == [2.0]  # 1 + two equal / 2
    assert best_ranks(one, torch.tensor([2]), torch.arange(4)).tolist() == [4.0]
    # Items 0 and 1 both answer: they do not tie with each other, only with item 3.
    assert best_ranks(one, torch.tensor([7]), torch.tensor([7, 7, 1, 2])).tolist() == [1.5]


def test_one_answer_each_is_the_retrieval_of_shards():
    similarity = torch.randint(0, 5, (30, 30)).float()
    ranks = best_ranks(similarity, torch.arange(30), torch.arange(30))
    assert ranking(similarity).mean_rank == pytest.approx(float(ranks.mean()))
    assert ranking(similarity).r5 == float((ranks <= 5).double().mean())


def test_a_query_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="query 1 .label 9. has no answer"):
        best_ranks(torch.zeros(2, 3), torch.tensor([0, 9]), torch.arange(3))


def test_a_model_that_gives_nan_is_not_perfect_but_refused():
    with pytest.raises(ValueError, match="not finite"):
        best_ranks(torch.full((2, 2), torch.nan), torch.arange(2), torch.arange(2))


def test_every_caption_is_a_query_and_a_video_has_its_best_caption():
    split = Split(videos=["a", "b"], captions=[["x", "y"], ["z"]])
    videos = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # y is nearer to b, its video is a
    figures, chance = retrieval(texts, videos, split)
    assert figures["text to video"]["R@1"] == pytest.approx(2 / 3)
    assert figures["video to text"] == {"R@1": 1, "R@5": 1, "R@10": 1, "MedR": 1, "MeanR": 1}
    assert (chance["R@1"], chance["R@5"]) == (0.5, 1.0)


def test_a_constant_model_is_never_right():
    same = torch.ones(12, 3)
    split = Split(
        videos=list("abcdefghijkl"), captions=[["x"]] * 12, labels=[*range(4)] * 3, classes=list("abcd")
    )
    assert retrieval(same, same, split)[0]["text to video"]["MedR"] == 6.5
    assert retrieval(same, same, split)[0]["text to video"]["R@5"] == 0
    figures, _ = templates(same[:4], same, split)
    assert figures["video to template"]["top-1"] == 0 and figures["template to video"]["MeanR"] == 5.5
    options = Split(videos=["a", "b"], captions=[["x", "y"], ["z", "w"]], labels=[0, 1])
    assert multiple_choice(same[:4], same[:2], options)[0]["multiple choice"]["top-1"] == 0


def test_multiple_choice_by_hand():
    split = Split(videos=["a", "b"], captions=[["x", "y", "z"], ["u", "v"]], labels=[1, 0])
    texts = torch.tensor([[0.1], [0.9], [0.3], [0.2], [0.7]])
    figures, chance = multiple_choice(texts, torch.ones(2, 1), split)
    assert figures["multiple choice"]["top-1"] == 0.5 and chance["top-1"] == pytest.approx(
        (1 / 3 + 1 / 2) / 2
    )


def test_dual_softmax_in_numpy():
    similarity = torch.randn(5, 4, dtype=torch.float64) / 10
    raised = np.exp(similarity.numpy() / 0.01)
    expected = similarity.numpy() * raised / raised.sum(0, keepdims=True)
    np.testing.assert_allclose(dual_softmax(similarity), expected)
