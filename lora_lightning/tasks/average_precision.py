"""AveragePrecision: COCO's box and mask scores, the same for one process and for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

Picture = Mapping[str, Any]  # boxes (n, 4) and what belongs to them, of one image


class AveragePrecision(MeanAveragePrecision):
    """torchmetrics' MeanAveragePrecision (COCO's evaluation, by faster-coco-eval) over images by name.

    An image that several processes have seen, to fill up their last batches, counts once; the images are
    taken in the order of their names, so that ties between scores fall alike for any number of processes.

    Args:
        masks: score masks too; the names of COCO's numbers then begin with `bbox_` and `segm_`.
        area_scale: lengths are multiplied by this before COCO's limits of small and large objects (32²
            and 96² pixels) apply; for pictures much smaller than COCO's, about 640 pixels wide. Boxes alone.
        per_class: also each class's average precision.
        curves: also COCO's whole table of precisions, for `class_precisions`.
    """

    images: list[tuple[int, int]]

    def __init__(
        self, masks: bool = False, area_scale: float = 1.0, per_class: bool = False, curves: bool = False
    ) -> None:
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            class_metrics=per_class,
            extended_summary=curves,
            # torchmetrics' own are rounded to float32: a recall of 1/5 would miss its threshold of 0.2.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="faster_coco_eval",
            sync_on_compute=False,  # an image at a time, thousands of messages: `compute` gathers at once
        )
        self.area_scale = area_scale
        self.warn_on_many_detections = False
        self.add_state("images", default=[], dist_reduce_fx=None)

    def update(self, preds: Sequence[Picture], target: Sequence[Picture]) -> None:
        """Take in the predictions (boxes, scores, labels, masks) and the truth (boxes, labels, masks,
        iscrowd, area, image_id) of some images; without `image_id` an image is told by its place."""
        rank = dist.get_rank() if _processes() > 1 else 0
        for truth in target:
            image = truth.get("image_id")
            self.images.append((rank, len(self.images)) if image is None else (-1, _number(image)))
        super().update([self._plain(p) for p in preds], [self._plain(t) for t in target])

    def compute(self) -> dict[str, Tensor]:
        """COCO's scores of all images of all processes; -1 where there is nothing to find."""
        states: list[Any] = [self.metric_state]
        if _processes() > 1:
            states = [None] * _processes()
            dist.all_gather_object(states, self.metric_state)
        places: dict[Any, tuple[int, int]] = {}
        for process, one in enumerate(states):
            for position, image in enumerate(one["images"]):
                places.setdefault(image, (process, position))
        order = [places[image] for image in sorted(places)]
        for name, values in self.metric_state.items():
            setattr(self, name, [states[p][name][i] for p, i in order] if values else [])
        return super().compute()

    def _plain(self, picture: Picture) -> dict[str, Any]:
        """Tensors on the CPU, boxes in pictures of COCO's size, masks as bits (n, height, width)."""
        kept = {n: t.detach().cpu() for n, t in picture.items() if isinstance(t, Tensor)}
        kept["boxes"] = kept["boxes"].float() * self.area_scale
        if "area" in kept:
            kept["area"] = kept["area"] * self.area_scale**2
        if "masks" in kept:
            masks = kept["masks"]
            masks = masks[:, 0] if masks.ndim == 4 else masks  # torchvision: (n, 1, height, width) in [0, 1]
            kept["masks"] = masks > 0.5 if masks.is_floating_point() else masks.bool()
        return kept


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _number(image: Any) -> int:
    return int(image.item() if isinstance(image, Tensor) else image)


def scores_of(computed: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, float]:
    """The scores to log, fractions in [0, 1], without those of which there is nothing to find.

    Returns:
        `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, of masks the same after
        `mask_`, and `map/NAME` for each class where `computed` has them.
    """
    found: dict[str, float] = {}
    masks = "bbox_map" in computed
    for part, ours in (("bbox_", ""), ("segm_", "mask_")) if masks else (("", ""),):
        for name in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large"):
            found[ours + name] = float(computed[part + name])
        each = torch.atleast_1d(computed[f"{part}map_per_class"])
        classes = torch.atleast_1d(computed["classes"])
        if len(each) == len(classes):
            for label, value in zip(classes.tolist(), each.tolist(), strict=True):
                found[f"{ours}map/{class_names[label - 1]}"] = value
    return {name: value for name, value in found.items() if value >= 0}


def class_precisions(computed: Mapping[str, Tensor], classes: int, part: str = "") -> np.ndarray:
    """(IoUs from 0.5 to 0.95, 101 recalls from 0 to 1, classes): the precision at each recall, of at most 100
    predictions an image; NaN of a class of which there is no object.

    Args:
        computed: by `AveragePrecision(curves=True)`.
        classes: how many there are.
        part: `bbox_` or `segm_` where it scores masks too.
    """
    found = np.full((10, 101, classes), np.nan)
    if f"{part}precision" in computed:  # not of no image at all
        table = computed[f"{part}precision"][:, :, :, 0, -1].numpy()  # of all sizes
        present = torch.atleast_1d(computed["classes"]).numpy()
        found[:, :, present - 1] = np.where(table < 0, np.nan, table)
    return found
