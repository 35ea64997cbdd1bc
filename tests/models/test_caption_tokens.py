"""How many tokens a caption has."""

import pytest

from miles_fast.models.caption_tokens import caption_length


@pytest.mark.parametrize(
    "asked,most,usual,length",
    [(None, 16, 32, 16), (None, 512, 32, 32), (None, 512, 100, 100), (16, 16, 32, 16), (3, 16, 32, 3)],
)
def test_a_caption_is_as_long_as_asked_for_or_as_usual_but_for_the_model(asked, most, usual, length):
    assert caption_length(asked, most, usual) == length


@pytest.mark.parametrize("asked", [-1, 0, 2, 17])
def test_lengths_that_the_model_does_not_take_are_named(asked):
    with pytest.raises(ValueError, match=f"^--tokens {asked}: this model takes captions of 3 to 16 tokens$"):
        caption_length(asked, 16, key="--tokens")
