"""Captions to token ids. Imports neither torch nor transformers: reading processes do this too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHORTEST = 3  # [CLS], one token of a word, [SEP]


def caption_length(asked: int | None, most: int, usual: int = 32, key: str = "length") -> int:
    """Tokens of a caption: those asked for, else the usual number, or the model's most where that is less.

    Raises ValueError, naming the `key`, where fewer than SHORTEST or more than `most` are asked for.
    """
    length = min(usual, most) if asked is None else asked
    if not SHORTEST <= length <= most:
        raise ValueError(f"{key} {length}: this model takes captions of {SHORTEST} to {most} tokens")
    return length


class CaptionEncoder:
    """Encodes captions as transformers' fast tokenizer would, cut and padded to `length`; can be pickled."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.enable_truncation(length)
        self._backend.enable_padding(
            length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
        )
        self._length = length

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids and attention mask, (B, 2, L) int64.

        A caption's tail that cannot reach `length` tokens is cut first, so that one huge caption costs no
        time.
        """
        length = self._length
        cut = [" ".join(caption[: 64 * length].split(maxsplit=length)[:length]) for caption in captions]
        found = self._backend.encode_batch(cut)
        return np.array([(one.ids, one.attention_mask) for one in found], np.int64).reshape(-1, 2, length)
