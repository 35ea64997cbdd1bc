"""Where the model looks: the two figures of the paper, for any clip (spec/miles.md 6.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from miles_fast.export.encoder import VideoTextEncoder

# Words that name nothing to be seen.
_FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at to from into onto with by for over under before after then as while is "
    "are was were be being it its his her their this that these those he she they first".split()
)


@torch.inference_mode()
def cls_attention(model: VideoTextEncoder, video_BTCHW: Tensor) -> Tensor:
    """The last block's spatial attention of [CLS] to every patch, (B, T, rows, columns), mean over heads.

    With [CLS]'s attention to itself left out, a clip's maps sum to 1.
    """
    attention = model.video_model.blocks[-1].attn
    kept: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        model.video_model(video_BTCHW.to(model.vid_proj[0].weight.device))
    finally:
        hook.remove()
    query, key, _ = kept[0].float().unflatten(-1, (3, attention.heads, -1)).unbind(2)
    scores_BHN = torch.einsum("bhs,bnhs->bhn", query[:, 0], key) * query.shape[-1] ** -0.5
    weights = scores_BHN.softmax(-1)[:, :, 1:].mean(1)
    grid = model.config.video.grid
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.unflatten(1, (video_BTCHW.shape[1], grid, grid)).cpu()


def word_maps(
    model: VideoTextEncoder, video_BTCHW: Tensor, caption: str, limit: int = 4
) -> dict[str, Tensor]:
    """Cosines of words of a caption with every patch of one clip, (T, rows, columns) each.

    The first `limit` words that are no function words, each once.
    """
    words, embeddings_WE = model.encode_words(caption)
    patches = model.encode_patches(video_BTCHW[:1])[0]
    maps: dict[str, Tensor] = {}
    for word, embedding in zip(words, embeddings_WE, strict=True):
        name = word.lower()
        if len(maps) < limit and name not in maps and name.isalpha() and name not in _FUNCTION_WORDS:
            maps[name] = (patches @ embedding).float().cpu()
    return maps
