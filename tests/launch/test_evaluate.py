"""Options of launch/evaluate.py: what is refused, and captions for models that take short ones."""

import sys

import pytest
from tiny import caption, tiny_config, write_frames

from launch import evaluate
from miles_fast.data.vocabulary import build_vocabulary
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.models.storage import write_model
from miles_fast.models.text_encoder import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose captions have 16 tokens at most, and heldout/."""
    place = tmp_path_factory.mktemp("evaluate")
    write_frames(place / "heldout", 4, shards=1)
    build_vocabulary((caption(i) for i in range(30)), place / "tokenizer")
    tokenizer = place / "tokenizer"
    model = build_dual_encoder(tiny_config(place).model, len(load_tokenizer(tokenizer)))
    write_model(place / "model", model.state_dict(), model.config, model.vocabulary_size, str(tokenizer))
    return place


@pytest.fixture
def program(place, monkeypatch, capsys):
    def call(*more):
        shards = ("--shards", place / "heldout" / "*.tar")
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, (place / "model", *shards, *more))])
        evaluate.main()
        return capsys.readouterr().out

    return call


def test_captions_are_as_long_as_the_model_takes(program):
    assert "gallery 4" in program("--frames", 2)


def test_longer_captions_than_the_model_takes_are_refused(program):
    with pytest.raises(ValueError, match="--caption-tokens 17: this model takes captions of 3 to 16 tokens"):
        program("--caption-tokens", 17)


@pytest.mark.parametrize(
    "option,value,least",
    [
        ("--frames", -2, 1),
        ("--frames", 0, 1),
        ("--batch", 0, 1),
        ("--caption-tokens", 2, 3),
        ("--workers", 0, 1),
    ],
)
def test_numbers_that_are_too_small_are_named(program, capsys, option, value, least):
    with pytest.raises(SystemExit):
        program(option, value)
    said = f"argument {option}: '{value}': write a whole number, {least} or greater"
    assert said in capsys.readouterr().err
