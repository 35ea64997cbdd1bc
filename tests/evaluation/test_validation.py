"""Evaluation sets of a config: what is found at once, not at the first evaluation."""

import pytest
from tiny import tiny_config, write_frames

from miles_fast.data.shards import ShardError
from miles_fast.evaluation import validation as module
from miles_fast.evaluation.validation import validation


def test_missing_shards_are_found_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", lambda source: None)
    config = tiny_config(tmp_path)
    with pytest.raises(ShardError, match=r"no shard matches '.*heldout"):
        validation(config, batch=2)
    write_frames(tmp_path / "heldout", 2, shards=1)
    assert validation(config, batch=2) is not None
