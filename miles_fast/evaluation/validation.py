"""Retrieval on the evaluation sets of a config while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from miles_fast.config import Config
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.sources import open_shards
from miles_fast.distributed import logger
from miles_fast.evaluation.retrieval import evaluate_retrieval
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.text_encoder import load_tokenizer


def validation(config: Config, batch: int) -> Callable[[DualEncoder, torch.device], dict[str, Any]] | None:
    """What the training loop calls: (model, device) -> a retrieval result, as a dict, for each set's name.

    None for a config without evaluation sets. Raises ShardError at once, not hours into the run, for one
    whose shards cannot be used. The loaders are opened at the first call and kept.
    """
    if not config.data.evaluation:
        return None
    for source in config.data.evaluation:
        open_shards(source, config.data)
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    loaders: list[EvaluationLoader] = []

    def evaluate(model: DualEncoder, device: torch.device) -> dict[str, Any]:
        if not loaders:
            size = model.config.video.image_size
            loaders.extend(
                EvaluationLoader(
                    source, config.data, image_size=size, tokenizer=tokenizer, batch=batch, device=device
                )
                for source in config.data.evaluation
            )
        results = {}
        for loader in loaders:
            result = evaluate_retrieval(model, loader)
            results[loader.name] = asdict(result)
            forth, back = result.text_to_video, result.video_to_text
            logger.info("%s: R@1 %.2f / %.2f %%", loader.name, 100 * forth.r1, 100 * back.r1)
        return results

    return evaluate
