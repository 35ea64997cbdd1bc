"""Mixtures: exact proportions, today's alternation for equal weights, the same answer at any step."""

import itertools
import time

import pytest
from data import malicious
from data.dealing import config_of, same, take
from tiny import write_data

from miles_fast.data.demo_corpus import Recipe, build_demo_corpus
from miles_fast.data.mixture import Mixture
from miles_fast.data.order import Share, draw_at

WEIGHTS = [(1,), (1, 1), (3, 1), (0.1, 0.2, 0.7), (5, 1, 1, 1, 1, 1), (0.5, 2.25, 1e-3), (1.1, 7, 3.3, 0.01)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_proportions_are_exact_within_a_step(weights):
    mixture, served = Mixture(weights), [0] * len(weights)
    for step in range(5000):
        source, turn = mixture.serve(step)
        assert turn == served[source]
        served[source] += 1
        for count, weight in zip(served, weights, strict=True):
            assert abs(count - (step + 1) * weight / sum(weights)) < 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_weights_alternate(count):
    for weight in (1, 0.3):
        mixture = Mixture([weight] * count)
        assert [mixture.serve(step) for step in range(50)] == [(s % count, s // count) for s in range(50)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_step_asked_first_gives_the_same(weights):
    whole = Mixture(weights)
    expected = [whole.serve(step) for step in range(3000)]
    for step in (0, 1, 17, 999, 2999):
        assert Mixture(weights).serve(step) == expected[step]


def test_a_late_step_is_found_quickly():
    start = time.process_time()
    mixture = Mixture([0.4, 0.6])
    source, turn = mixture.serve(10**12)
    assert turn in (4 * 10**11, 6 * 10**11) and source in (0, 1)
    assert Mixture([1.234567, 2.345678]).serve(300_000)[1] > 0  # a long period
    assert time.process_time() - start < 5


def test_a_step_holds_the_same_samples_for_any_number_of_ranks():
    sizes, weights = (40, 25, 7), (3, 1, 0.5)
    steps = []
    for ranks in (1, 2, 3):
        mixture = Mixture(weights)
        shares = [Share(batch=6 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
        steps.append([])
        for step in range(60):
            source, turn = mixture.serve(step)
            places = itertools.chain(*(share.places(turn, 0) for share in shares))
            steps[-1].append((source, sorted(draw_at(sizes[source], source, p).sample for p in places)))
    assert steps[0] == steps[1] == steps[2]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A config of frames, single images and videos, weights 2 : 1 : 0.5."""
    root = tmp_path_factory.mktemp("mixture")
    write_data(root, 20)
    malicious.good(root / "images.tar", *(f"image{i}" for i in range(7)))
    corpus = build_demo_corpus(root / "demo", Recipe(num_train=5, num_heldout=1), workers=1)
    shards = (root / "train/*.tar", root / "images.tar", *corpus.train_tars)
    sources = [{"shards": [str(s)], "weight": w} for s, w in zip(shards, (2, 1, 0.5), strict=True)]
    return config_of(root, sources)


def test_a_mixture_resumes_with_the_same_batches(mixed):
    whole = take(mixed, 0, 111)
    kinds = ["image" if "image" in b.keys[0] else "frames" if len(b.keys[0]) == 4 else "video" for b in whole]
    assert [kinds[:105].count(kind) for kind in ("frames", "image", "video")] == [60, 30, 15]
    for first, count in ((11, 100), (1, 6), (94, 6)):
        expected = whole[first : first + count]
        assert all(map(same, expected, take(mixed, first, count)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_deal_a_mixture_as_one_does(mixed, ranks):
    joined = [batch.keys for batch in take(mixed, 0, 7, batch=6)]
    parts = [take(mixed, 0, 7, batch=6 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [sum((batch.keys for batch in step), ()) for step in zip(*parts, strict=True)] == joined
