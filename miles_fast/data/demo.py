"""The demo's data: the generated corpus prepared into frame shards, with its own vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

from miles_fast.data.demo_corpus import Recipe, build_demo_corpus
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.data.shards import ShardSet
from miles_fast.data.vocabulary import build_vocabulary


def prepare_demo(root: Path, recipe: Recipe | None = None) -> None:
    """Build video/, frames/{train,heldout}/ and tokenizer/ under `root`, unless this recipe is there."""
    recipe = recipe or Recipe()
    stamp = root / "frames" / "recipe"
    if stamp.exists() and stamp.read_text() == recipe.fingerprint():
        return
    corpus = build_demo_corpus(root, recipe)
    if stamp.exists():
        shutil.rmtree(root / "frames")
    options = PreparationOptions(frames=8, short_side=96)
    for split, tars in (("train", corpus.train_tars), ("heldout", corpus.heldout_tars)):
        prepare(tars, root / "frames" / split, options)
    shards = ShardSet(sorted((root / "frames" / "train").glob("*.tar")))
    build_vocabulary((shards[i].captions()[0] for i in range(len(shards))), root / "tokenizer")
    stamp.write_text(recipe.fingerprint())
