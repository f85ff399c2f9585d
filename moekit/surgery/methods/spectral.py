"""Normalised spectral clustering of a few hundred things with a given affinity."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.linalg import eigh

Array = NDArray[np.float64]
RESTARTS = 10


def spectral_labels(affinity_EE: Array, count: int, seed: int) -> list[int]:
    """Labels of ``count`` clusters, none empty (Shi and Malik 2000; von Luxburg 2007, sec. 4).

    The eigenvectors of the smallest eigenvalues of the random-walk Laplacian are clustered by
    k-means, the best of ten starts. Where k-means finds fewer clusters, the largest is split in two
    by the order of its own Fiedler vector.

    Args:
        affinity_EE: non-negative and symmetric.
        count: number of clusters.
        seed: of the starts.
    """
    experts = affinity_EE.shape[0]
    if count == 1 or count >= experts:
        return [0] * experts if count == 1 else list(range(experts))
    points = _embedding(affinity_EE, count)
    order = np.argsort(points[:, 1], kind="stable")  # k-means draws the same in any order
    labels = np.empty(experts, dtype=np.int64)
    labels[order] = _best_kmeans(points[order], count, seed)
    while len(set(labels.tolist())) < count:
        sizes = np.bincount(labels, minlength=count)
        largest = int(sizes.argmax())
        members = np.flatnonzero(labels == largest)
        fiedler = _embedding(affinity_EE[np.ix_(members, members)], 2)[:, 1]
        order = members[np.argsort(fiedler, kind="stable")]
        labels[order[len(order) // 2 :]] = int(np.flatnonzero(sizes == 0)[0])
    return [int(label) for label in labels]


def _embedding(affinity_EE: Array, dimensions: int) -> Array:
    root_E = np.sqrt(np.maximum(affinity_EE.sum(1), np.finfo(float).tiny))
    normalised_EE = affinity_EE / root_E[:, None] / root_E
    size = affinity_EE.shape[0]
    _, vectors = eigh(normalised_EE, subset_by_index=[size - dimensions, size - 1])
    vectors = vectors[:, ::-1]
    largest = np.abs(vectors).argmax(0)
    sign = np.sign(vectors[largest, np.arange(dimensions)])  # either sign is an eigenvector
    embedded: Array = vectors * sign / root_E[:, None]
    return embedded


def _best_kmeans(points: Array, count: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    best, best_cost = np.zeros(len(points), dtype=np.int64), np.inf
    for _ in range(RESTARTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # points that coincide divide 0 by 0
                centres, labels = kmeans2(
                    points, count, iter=100, minit="++", missing="raise", rng=generator
                )
        except (ClusterError, ValueError):
            continue  # a start with an empty cluster
        cost = float(((points - centres[labels]) ** 2).sum())
        if cost < best_cost:
            best, best_cost = labels.astype(np.int64), cost
    return best
