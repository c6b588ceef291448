"""What the kept channels stand for when the distance to them is measured."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

TARGETS = ("kept", "kmeans", "gmm")
"""`kept`: the kept channels themselves; `kmeans`, `gmm`: cluster centres grown from them (Theus et al. 2024)."""


def representatives(features: Tensor, kept: Tensor, kind: str = "kept", *, seed: int = 0) -> Tensor:
    """Features of the k targets.

    features: [n, d] (normalised rows), kept: [k] row numbers. Returns [k, d]; row j grew from channel kept[j].
    `kmeans` starts Lloyd's iterations at the kept channels; `gmm` starts a mixture of spherical Gaussians there and
    returns its means. Both depend on distances only, so they run on an exact rotation of the features to at most
    n dimensions. A cluster that ends up empty keeps the channel it started from.
    """
    start = features[kept]
    if kind == "kept" or len(kept) == len(features):
        return start
    x = _rotate_to_rank(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning: duplicates make fewer distinct points than clusters
        share = _kmeans(x, kept, seed) if kind == "kmeans" else _gmm(x, kept, seed)
    share = torch.from_numpy(share).to(features)
    mass = share.sum(dim=0)
    means = (share.T @ features) / mass.clamp(min=1e-12)[:, None]
    return torch.where((mass > 1e-9)[:, None], means, start)


def _rotate_to_rank(features: Tensor) -> np.ndarray:
    """[n, min(n, d)] coordinates with the same pairwise distances, from the Gram matrix."""
    x = features - features.mean(dim=0)
    if x.shape[1] <= x.shape[0]:
        return x.cpu().numpy()
    values, vectors = torch.linalg.eigh(x @ x.T)
    return (vectors * values.clamp(min=0).sqrt()).cpu().numpy()


def _kmeans(x: np.ndarray, kept: Tensor, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    start: Any = x[kept.cpu().numpy()]  # scikit-learn declares `init` a string
    labels = KMeans(len(kept), init=start, n_init=1, random_state=seed).fit(x).labels_  # pyright: ignore
    return np.eye(len(kept))[labels]


def _gmm(x: np.ndarray, kept: Tensor, seed: int) -> np.ndarray:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        len(kept), covariance_type="spherical", means_init=x[kept.cpu().numpy()], random_state=seed
    )
    return mixture.fit(x).predict_proba(x)
