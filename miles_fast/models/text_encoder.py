"""The text encoder (transformers' DistilBERT) and its tokenizer: from a name, a local folder, or fresh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from miles_fast.config import TextEncoderConfig
from miles_fast.models.torchvision_cpu import repair_torchvision

if TYPE_CHECKING:
    from transformers import DistilBertModel, PreTrainedTokenizerBase


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Fast tokenizer from a name or folder. Raises ValueError naming the source when there is none."""
    repair_torchvision()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"tokenizer {str(source)!r} cannot be loaded ({str(error).splitlines()[0]}); name a folder with "
            "tokenizer.json, or a model that the Hugging Face hub serves"
        ) from error


def build_text_encoder(config: TextEncoderConfig, vocabulary_size: int) -> DistilBertModel:
    """DistilBERT with pretrained weights when `config.weights` names any, else freshly initialised.

    Raises ValueError when the weights are missing, are not DistilBERT's, or have another vocabulary.
    """
    repair_torchvision()
    from transformers import DistilBertConfig, DistilBertModel

    if config.weights is None:
        return DistilBertModel(
            DistilBertConfig(
                vocab_size=vocabulary_size,
                dim=config.width,
                n_layers=config.depth,
                n_heads=config.heads,
                hidden_dim=config.hidden,
                max_position_embeddings=config.max_positions,
                dropout=config.dropout,
                attention_dropout=config.dropout,
            )
        )
    try:
        model, report = DistilBertModel.from_pretrained(config.weights, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model.text.weights = {config.weights!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"model.text.weights = {config.weights!r} is not a complete DistilBERT: missing "
            f"{sorted(report['missing_keys'])[:5]}"
        )
    if model.config.vocab_size < vocabulary_size:
        raise ValueError(
            f"model.text.tokenizer has {vocabulary_size} tokens, but model.text.weights = {config.weights!r} "
            f"has embeddings for {model.config.vocab_size}; use the tokenizer that belongs to the weights"
        )
    model.config.dropout = model.config.attention_dropout = config.dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.dropout
    return model
