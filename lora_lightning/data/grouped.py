"""GroupedOrder: an order of samples in which almost every batch holds images of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from lora_lightning.trainer.loader import processes

GROUPS = 3  # aspect ratios on either side of the square, as in torchvision's references


class GroupedOrder(Sampler[int]):
    """Shuffled samples, batch after batch from one group, each sample exactly once.

    A batch of images is padded to its largest height and width: landscapes and portraits together
    waste half of the computation. Chunks of one batch for each process come from one group, in
    random order; what is left of the groups makes up the last batches, neighbouring groups together.
    It draws from torch's global generator, which `ResumableLoader` seeds, so that the order is a
    function of (seed, epoch) and a resumed run finds its place again.

    Args:
        groups: the group of each sample; neighbours in number are alike.
        batch_size: samples a batch and process.
    """

    def __init__(self, groups: Sequence[int], batch_size: int) -> None:
        self.groups = torch.as_tensor(groups, dtype=torch.int64)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        chunk = self.batch_size * processes()[1]
        order = torch.randperm(len(self.groups))
        chunks, rest = [], []
        for group in self.groups.unique():
            members = order[self.groups[order] == group]
            whole = len(members) // chunk * chunk
            chunks += list(members[:whole].split(chunk))
            rest.append(members[whole:])
        for index in torch.randperm(len(chunks)).tolist():
            yield from chunks[index].tolist()
        yield from torch.cat(rest or [order]).tolist()


def aspect_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The group of each image by width / height, in bins of equal ratio from 1/2 to 2.

    Args:
        sizes: (width, height) in pixels.
    """
    edges = 2.0 ** torch.linspace(-1, 1, 2 * GROUPS + 1)
    ratios = torch.tensor([width / height for width, height in sizes])
    return torch.bucketize(ratios, edges, right=True).tolist()
