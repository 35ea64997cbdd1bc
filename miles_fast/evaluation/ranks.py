"""Ranks of what answers a query among all that could, with ties counted half."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # queries compared at a time: a full MSR-VTT comparison would take gigabytes


def best_ranks(similarity_QG: Tensor, query_labels_Q: Tensor, gallery_labels_G: Tensor) -> Tensor:
    """Rank (Q,) of each query's best answer, 1 being the first; answers are the items of the query's label.

    rank = 1 + (other items above the best answer) + (other items equal to it) / 2, where other items are
    those that do not answer the query: several right answers do not push each other down, and a constant
    model scores chance. Raises ValueError when a query has no answer in the gallery, and for similarities
    that are not finite, which nothing would rank above.
    """
    if not similarity_QG.isfinite().all():
        raise ValueError("similarities are not finite: the model gives NaN or infinite embeddings")
    ranks = []
    for start in range(0, len(similarity_QG), ROWS):
        rows = similarity_QG[start : start + ROWS]
        answers = query_labels_Q[start : start + ROWS, None] == gallery_labels_G[None]
        unanswered = ~answers.any(1)
        if unanswered.any():
            query = start + int(unanswered.nonzero()[0])
            raise ValueError(
                f"query {query} (label {int(query_labels_Q[query])}) has no answer in the gallery"
            )
        best = rows.masked_fill(~answers, -torch.inf).amax(1, keepdim=True)
        above = ((rows > best) & ~answers).sum(1)
        equal = ((rows == best) & ~answers).sum(1)
        ranks.append(1 + above + equal / 2)
    return torch.cat(ranks).double()


def dual_softmax(similarity_QG: Tensor, temperature: float = 0.01) -> Tensor:
    """Scores after the dual softmax (Cheng et al. 2021, arXiv 2109.04290): (Q, G).

    Each item's softmax over all queries of the test set weighs its similarities, which uses queries that a
    retrieval system would not have: figures with it are not comparable to those without.
    """
    return similarity_QG * (similarity_QG / temperature).softmax(0)
