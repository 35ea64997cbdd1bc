"""Batches out of a training loader, for tests that compare what two of them deal."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tiny import numbered_masks, tiny_config

from miles_fast.config import Config
from miles_fast.data.batches import Batch, Quarantine
from miles_fast.data.loader import Loader
from miles_fast.data.order import Share
from miles_fast.models.text_encoder import load_tokenizer


def config_of(root: Path, train: list[dict], **data) -> Config:
    """The tiny config with these training sources."""
    return tiny_config(root, data={"train": train, "evaluation": [], **data})


def build_loader(config: Config, **share) -> Loader:
    """A loader of 4 clips a micro batch unless `share` says otherwise, with masks that name their step."""
    return Loader(
        config.data,
        image_size=32,
        tokenizer=load_tokenizer(config.model.text.tokenizer_source),
        share=Share(**{"batch": 4, **share}),
        seed=5,
        device=torch.device("cpu"),
        quarantine=Quarantine(None),
        draw_masks=partial(numbered_masks, share.get("batch", 4)),
    )


def take(config: Config, first: int, count: int, **share) -> list[Batch]:
    """The micro batches from optimizer step `first` on."""
    batches = build_loader(config, **share).batches(first)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def same(one: Batch, two: Batch) -> bool:
    """Whether samples, crops, flips, captions and masks are the same, to the bit."""
    return (
        one.keys == two.keys
        and torch.equal(one.video_BTCHW, two.video_BTCHW)
        and torch.equal(one.token_ids_BL, two.token_ids_BL)
        and torch.equal(one.masked_BM, two.masked_BM)
    )
