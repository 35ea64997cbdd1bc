"""A WordPiece vocabulary made from captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_vocabulary(captions: Iterable[str], folder: Path, size: int = 30522) -> None:
    """Write a WordPiece tokenizer to `folder`: the commonest words, and all characters as pieces.

    A pure function of the captions; words beyond `size` are spelled in pieces, so that nothing seen is [UNK].
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from miles_fast.models.torchvision_cpu import repair_torchvision

    repair_torchvision()
    from transformers import PreTrainedTokenizerFast

    words = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower()))
    characters = sorted({character for word in words for character in word})
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    common = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    vocabulary = {token: number for number, token in enumerate([*pieces, *common][:size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
