"""Pictures split into parts: by a seed, each class in its shares, the pictures of a group together."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

BINS = 10  # of numbers


def split(
    names: Sequence[str],
    labels: Sequence[tuple[Hashable, ...]],
    groups: Sequence[Hashable],
    shares: Mapping[str, float],
    seed: int,
) -> list[str]:
    """A part for each picture: one of `shares`, or "train".

    A picture's place depends on its name, not on the order of the list, so that few change their part when
    pictures are added. Without groups of several pictures every class has its share of each part, rounded,
    one for training at least, and in the others where it has enough; with groups the shares are met as the
    groups allow.

    Args:
        names: different for each picture.
        labels: the classes of each.
        groups: pictures of equal groups come into one part.
        shares: of the parts but the training part.
        seed: another one, another split.
    """
    keys = [_key(seed, name) for name in names]
    clusters: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        clusters[group].append(place)
    single = all(len(found) == 1 for found in labels)
    if single and len(clusters) == len(names):
        return _by_class(keys, [found[0] for found in labels], shares)
    return _by_cluster(keys, labels, list(clusters.values()), shares)


def binned(numbers: Sequence[float], share: float) -> list[tuple[int]]:
    """The tenth in which each number is, from the least to the greatest, as its class for the split; of few
    numbers fewer parts, so that a part's share of each is one at least."""
    bins = max(1, min(BINS, int(len(numbers) * share)))
    ranks = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")
    return [(int(rank) * bins // len(numbers),) for rank in ranks]


def _key(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()


def _by_class(keys: Sequence[bytes], labels: Sequence[Hashable], shares: Mapping[str, float]) -> list[str]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place in sorted(range(len(keys)), key=keys.__getitem__):
        members[labels[place]].append(place)
    parts = ["train"] * len(keys)
    for places in members.values():
        start = 0
        for number, (part, share) in enumerate(shares.items(), 2):
            least = 1 if share > 0 and len(places) >= number else 0
            count = min(max(least, round(share * len(places))), len(places) - start - 1)
            for place in places[start : start + count]:
                parts[place] = part
            start += count
    return parts


def _by_cluster(
    keys: Sequence[bytes],
    labels: Sequence[tuple[Hashable, ...]],
    clusters: list[list[int]],
    shares: Mapping[str, float],
) -> list[str]:
    """Cluster after cluster, the largest first, to the part that lacks most of what the cluster holds
    (Sechidis et al. 2011, iterative stratification, with clusters in place of pictures)."""
    classes = {label: n for n, label in enumerate(dict.fromkeys(x for found in labels for x in found))}
    names = ["train", *shares]
    part_shares = np.array([1 - sum(shares.values()), *shares.values()])
    total = np.zeros(len(classes) + 1)
    held = np.zeros((len(clusters), len(classes) + 1))  # of each class, and of pictures
    for number, cluster in enumerate(clusters):
        for place in cluster:
            held[number, [*(classes[x] for x in labels[place]), -1]] += 1
    total = held.sum(0)
    lacking = part_shares[:, None] * total  # (parts, classes + 1)
    order = sorted(range(len(clusters)), key=lambda n: (-len(clusters[n]), min(keys[p] for p in clusters[n])))
    parts = [""] * len(keys)
    for number in order:
        # Weighed by rarity: a class of few pictures decides more than one of many.
        need = (lacking * (held[number] / np.maximum(total, 1))).sum(1)
        need[part_shares <= 0] = -np.inf
        part = int(need.argmax())
        lacking[part] -= held[number]
        for place in clusters[number]:
            parts[place] = names[part]
    return parts


def joined(groups: Sequence[Hashable], same: Sequence[Sequence[int]]) -> list[int]:
    """A group for each picture, in which those of one group and those of the same content are together."""
    parent = list(range(len(groups)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[Hashable, int] = {}
    for place, group in enumerate(groups):
        parent[root(place)] = root(first.setdefault(group, place))
    for places in same:
        for place in places:
            parent[root(place)] = root(places[0])
    return [root(place) for place in range(len(groups))]
