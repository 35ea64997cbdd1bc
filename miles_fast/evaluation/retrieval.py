"""Text-video retrieval: embeddings of shards and the metrics of both directions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_fast.data.batches import Batch, Quarantine
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import gather_objects, rank, world_size
from miles_fast.evaluation.host_copies import on_host
from miles_fast.evaluation.ranks import best_ranks
from miles_fast.models.dual_encoder import DualEncoder, unit


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Recall at 1, 5 and 10 as fractions, median and mean rank (1 is best)."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Both directions over a gallery, and how many samples could not be read."""

    text_to_video: Ranking
    video_to_text: Ranking
    gallery: int
    unreadable: int


def ranking(similarity_QG: Tensor) -> Ranking:
    """Metrics of queries against a gallery whose i-th item answers the i-th query.

    Ties count half: rank = 1 + (items above) + (other items equal) / 2, so that a constant model scores
    chance, not 1 (the official code counts text-to-video ties in the model's favour: spec/miles.md 5.1).
    Raises ValueError for similarities that are not finite.
    """
    own = torch.arange(len(similarity_QG), device=similarity_QG.device)
    ranks = best_ranks(similarity_QG, own, own)
    recall = {k: float((ranks <= k).double().mean()) for k in (1, 5, 10)}
    return Ranking(
        r1=recall[1],
        r5=recall[5],
        r10=recall[10],
        median_rank=float(ranks.quantile(0.5)),
        mean_rank=float(ranks.mean()),
    )


def chance(gallery: int) -> Ranking:
    """What guessing scores on a gallery of this size."""
    middle = (gallery + 1) / 2
    r1, r5, r10 = (min(k / gallery, 1.0) for k in (1, 5, 10))
    return Ranking(r1=r1, r5=r5, r10=r10, median_rank=middle, mean_rank=middle)


@torch.inference_mode()
def embed_source(
    model: DualEncoder, loader: EvaluationLoader
) -> tuple[Tensor, Tensor, list[str], Quarantine]:
    """Unit text and video embeddings (G, E) of a source, and keys, on the CPU, in the shards' order.

    Ranks share the work; every rank returns the whole gallery and must call it.
    """
    total, quarantine = len(loader), Quarantine(None)
    share = -(-total // world_size())
    own = range(min(rank() * share, total), min((rank() + 1) * share, total))
    texts, videos, keys = [], [], []

    def embed(batches: Iterable[Batch]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        for batch in batches:
            text = unit(model.embed_text(batch.token_ids_BL, batch.attention_BL))
            yield batch.keys, torch.stack([text, unit(model.embed_video(batch.video_BTCHW))])

    with contextlib.closing(loader.batches(quarantine, own)) as batches:
        for found, (text, video) in on_host(embed(batches)):
            texts.append(text)
            videos.append(video)
            keys += found
    empty = torch.empty(0, model.config.embedding)
    parts = gather_objects((torch.cat([empty, *texts]), torch.cat([empty, *videos]), keys, quarantine.counts))
    for part in parts[: rank()] + parts[rank() + 1 :]:
        quarantine.counts.update(part[3])
    all_keys = [key for part in parts for key in part[2]]
    return (
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        all_keys,
        quarantine,
    )


def evaluate_retrieval(model: DualEncoder, loader: EvaluationLoader) -> Retrieval:
    """Retrieval on a source, both directions; unreadable samples are counted, not scored as misses.

    Raises ValueError when no sample could be read.
    """
    training = model.training
    model.eval()
    try:
        texts, videos, keys, quarantine = embed_source(model, loader)
    finally:
        model.train(training)
    if not keys:
        raise ValueError(f"source {loader.name!r}: no readable sample ({dict(quarantine.counts)})")
    similarity = texts @ videos.T
    return Retrieval(
        text_to_video=ranking(similarity),
        video_to_text=ranking(similarity.T),
        gallery=len(keys),
        unreadable=sum(quarantine.counts.values()),
    )


def table(result: Retrieval) -> str:
    """The metrics beside chance, for people."""
    rows = [
        ("text to video", result.text_to_video),
        ("video to text", result.video_to_text),
        ("chance", chance(result.gallery)),
    ]
    lines = [f"{'gallery ' + str(result.gallery):<16}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MedR':>8}"]
    lines += [
        f"{name:<16}{100 * r.r1:>8.2f}{100 * r.r5:>8.2f}{100 * r.r10:>8.2f}{r.median_rank:>8.1f}"
        for name, r in rows
    ]
    if result.unreadable:
        lines.append(f"{result.unreadable} samples could not be read and are not scored")
    return "\n".join(lines)
