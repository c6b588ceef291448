"""What the kept channels stand for when the distance to them is measured."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intrafusion.ot.parts import Features, Rows

TARGETS = ("kept", "kmeans", "gmm")
"""`kept`: the kept channels themselves; `kmeans`, `gmm`: cluster centres grown from them (Theus et al. 2024)."""


def representatives(features: Features, kept: Tensor, kind: str = "kept", *, seed: int = 0) -> Rows:
    """Features of the k targets.

    features: [n, d] (normalised rows), kept: [k] row numbers. Returns k rows; row j grew from channel kept[j].
    `kmeans` starts Lloyd's iterations at the kept channels; `gmm` starts a mixture of spherical Gaussians there and
    returns its means. Both depend on distances only, so they run on an exact rotation of the features to at most
    n dimensions. A cluster that ends up empty keeps the channel it started from.
    """
    rows = Rows.of(features)
    start = rows.take(kept)
    if kind == "kept" or len(kept) == len(rows):
        return start
    x = _rotate_to_rank(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning: duplicates make fewer distinct points than clusters
        share = _kmeans(x, kept, seed) if kind == "kmeans" else _gmm(x, kept, seed)
    share = torch.from_numpy(share).to(rows.device, torch.float64)
    mass = share.sum(dim=0)
    mean = share.T / mass.clamp(min=1e-12)[:, None]
    mean[mass <= 1e-9] = torch.nn.functional.one_hot(kept.to(rows.device)[mass <= 1e-9], len(rows)).to(mean)
    return Rows.of([(mean @ block.double()).to(rows.dtype) for block in rows.blocks()])


def _rotate_to_rank(rows: Rows) -> np.ndarray:
    """[n, min(n, d)] float64 coordinates with the same pairwise distances, from the Gram matrix."""
    if sum(part.shape[1] for part in rows.parts) <= len(rows):
        return rows.dense().double().cpu().numpy()
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.blocks():
        away = block.double()
        away -= away.mean(dim=0)
        gram += away @ away.T
    values, vectors = torch.linalg.eigh(gram)
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
