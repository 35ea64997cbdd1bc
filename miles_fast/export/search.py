"""Nearest neighbours among unit embeddings: faiss where it is installed, a matrix product otherwise."""

from __future__ import annotations

import importlib.util

import numpy as np

from miles_fast.distributed import note_once


def nearest(queries_QE: np.ndarray, gallery_GE: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places of the `count` nearest of the gallery for each query, (Q, K) each, best first.

    Both searches are exact. Raises ValueError for embeddings of another width.
    """
    if queries_QE.shape[1] != gallery_GE.shape[1]:
        raise ValueError(
            f"the queries are {queries_QE.shape[1]} wide, the gallery {gallery_GE.shape[1]}: of two models"
        )
    count = min(count, len(gallery_GE))
    queries, gallery = (np.ascontiguousarray(x, dtype=np.float32) for x in (queries_QE, gallery_GE))
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        return index.search(queries, count)
    note_once(
        "faiss is not installed (pip install 'miles-fast[search]'): numpy searches instead, more slowly"
    )
    similarity = queries @ gallery.T
    places = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(similarity, places, axis=1), places
