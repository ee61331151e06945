"""K-means in torch on any device: k-means++ seeding and Lloyd's iterations, in chunks of points.

    python kmeans.py      # five planted clusters: inertia per point after each update; seconds

Minimizes the inertia, the sum over all points of |x_i - c_a(i)|^2 (Eq. 16 of SUPMER, arXiv
2303.12314). Memory holds the points twice, and the distances of one chunk to all centroids.
Points and centroids are float32 or float64. Sums over points are float64, in the points' order
except on CUDA: the chunk's size changes only the rounding of the matrix product.
n points of width d, K clusters, c points in a chunk.
"""

from typing import NamedTuple

import numpy as np
import torch


class Clustering(NamedTuple):
    """What kmeans returns. The assignments and the last inertia belong to these centroids."""
    centroids: torch.Tensor     # (K, d), dtype and device of the points
    assignments: torch.Tensor   # (n,) long, the nearest centroid of each point
    inertia: list[float]        # of the start, then after each update of the centroids


def nearest(points, centroids, chunk=1024):
    """Points (n, d), centroids (K, d) -> index of the nearest one (n,) long, squared distance (n,).
    Ties go to the lower index. The default chunk fits a CPU's cache; a GPU likes larger ones."""
    origin = centroids.mean(0)      # a component that all share would cost digits of the rest
    return _nearest(points - origin, centroids - origin, chunk)


def _nearest(points, centroids, chunk):
    """nearest() by |x|^2 - 2 x.c + |c|^2, a matrix product a chunk. The origin lies among them."""
    squares = centroids.square().sum(1)                                        # (K,)
    indexes, distances = [], []
    for x in points.split(chunk):                                              # (c, d)
        smallest, index = torch.addmm(squares, x, centroids.T, alpha=-2).min(1)    # of (c, K)
        distance = smallest + torch.linalg.vector_norm(x, dim=1).square()      # (c,)
        indexes.append(index)
        distances.append(distance.clamp(min=0))                                # rounding: below 0
    return torch.cat(indexes), torch.cat(distances)


def plus_plus(points, k, seed, chunk=1024):
    """k-means++ (Arthur & Vassilvitskii 2007): k of the points (n, d) to start from -> (K, d).
    The first is uniform. Each next one has a probability proportional to its squared distance from
    the nearest one so far. seed: whatever numpy.random.default_rng takes."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(points)))]
    distances = points.new_full((len(points),), torch.inf)
    while len(chosen) < k:
        new = [torch.linalg.vector_norm(x - points[chosen[-1]], dim=1) for x in points.split(chunk)]
        distances = torch.minimum(distances, torch.cat(new).square())
        total = distances.double().cpu().cumsum(0)                             # (n,)
        index = int(torch.searchsorted(total, rng.random() * total[-1], right=True))
        chosen.append(min(index, len(points) - 1))      # n if all distances are 0: then any will do
    return points[chosen]


def fill_empty(assignments, distances, k):
    """Give each empty cluster the point farthest from its centroid, each point once -> (n,) long.
    A cluster's last point stays (n >= k leaves enough others). A moved point is its new cluster's
    mean: its share of the inertia falls to 0, and no other share rises.
    >>> fill_empty(torch.tensor([0, 0, 2, 0]), torch.tensor([1., 4., 9., 2.]), 4)
    tensor([0, 1, 2, 3])
    """
    counts = assignments.bincount(minlength=k).tolist()
    empty = [cluster for cluster in range(k) if counts[cluster] == 0]
    if not empty:
        return assignments
    filled = assignments.clone()
    for point in distances.argsort(descending=True, stable=True).tolist():
        donor = int(filled[point])
        if empty and counts[donor] > 1:
            counts[donor] -= 1
            filled[point] = empty.pop(0)
    return filled


def kmeans(points, k, seed, iterations=50, chunk=1024, centroids=None):
    """Cluster points (n, d) from k-means++, or from centroids (k, d), until nothing changes.

    Up to `iterations` times: assign each point to its nearest centroid, fill empty clusters, move
    each centroid to the mean of its points. No step raises the inertia, except by rounding. A
    cluster ends empty only at the limit, or if fewer than k points are distinct.
    Raises ValueError for k outside 1..n and for an inertia that is not finite.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"cannot make {k} clusters of {len(points)} points: 1 <= k <= n")
    centroids = plus_plus(points, k, seed, chunk) if centroids is None else centroids
    origin = points.mean(0)
    points, centroids = points - origin, centroids.double() - origin
    inertia, previous = [], None
    while True:
        assignments, distances = _nearest(points, centroids.to(points.dtype), chunk)
        inertia.append(distances.double().sum().item())                        # Eq. 16
        if not np.isfinite(inertia[-1]):
            raise ValueError(f"the inertia is {inertia[-1]}: points are too large, or not finite")
        filled = fill_empty(assignments, distances, k)
        if len(inertia) > iterations or previous is not None and torch.equal(filled, previous):
            return Clustering((centroids + origin).to(points.dtype), assignments, inertia)
        previous = filled
        sums = torch.zeros_like(centroids)                                     # (K, d) float64
        for x, index in zip(points.split(chunk), filled.split(chunk)):
            sums.index_add_(0, index, x.double())
        centroids = sums / torch.bincount(filled)[:, None]                     # none is empty


if __name__ == "__main__":
    import show
    show.main(show.inertia)
