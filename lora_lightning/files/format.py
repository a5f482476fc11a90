"""An adapter apart from any model: what it is made of, and how its files are filled and understood."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.config import OFF_ZERO, LoRAConfig
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.fingerprint import is_fingerprint
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, Pair, digest_of, read_pair, write_pair
from lora_lightning.kernels.quantized_tensor import QUANTIZERS
from lora_lightning.layers.factors import joined_factors, sides
from lora_lightning.layers.mixture import weighted
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LEAVES
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.utils.names import joined

FORMAT = "lora_lightning"
VERSION = 1


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter apart from any model.

    Attributes:
        tensors: updates under `<name in the plan>.lora_A`, `.lora_B` and the other `LEAVES`; the model's own
            trained tensors under their names in `state_dict()`.
        slots: how the weight of each planned layer factorizes, by the layer's name.
        base_class: class of the network that was adapted.
        fingerprint: the base's fingerprint; empty when it is not known.
        quantized: "int8" or "nf4" by the base's parameters that were so kept.
        training: what is known of the training, such as `{"epochs": 5, "steps": 100}`.
        origin: what builds the model again, and what its data said; empty where it is not known.
        foreign: read from PEFT's files, which leave open what only a model can tell.
    """

    config: LoRAConfig
    plan: Plan
    tensors: dict[str, Tensor]
    slots: dict[str, Slot]
    base_class: str = ""
    fingerprint: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    foreign: bool = False

    @property
    def on_residual(self) -> bool:
        """Whether it is PEFT's for a base of whose weights PEFT has taken what the updates begin at, and
        nothing here takes that off yet (`peft_resolve.with_beginning`)."""
        return self.foreign and self.config.init in OFF_ZERO and not any(p.fixed for p in self.plan.layers)

    def weight_name(self, layer: LayerPlan) -> str:
        """Name in the base's state_dict of the weight that a planned layer updates."""
        return joined(layer.module, self.slots[layer.name].parameter)

    def update_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the updates' tensors by their names in `tensors`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.plan.layers:
            A, B = self.slots[layer.name].factors(layer.shape, layer.rank)
            shapes[layer.tensor("lora_A")], shapes[layer.tensor("lora_B")] = A, B
            if layer.fixed:
                A, B = self.slots[layer.name].factors(layer.shape, layer.fixed)
                shapes[layer.tensor("lora_fixed_A")], shapes[layer.tensor("lora_fixed_B")] = A, B
            if layer.mixed:
                shapes[layer.tensor("lora_mixture")] = (len(layer.mixed),)
            if self.config.use_dora:
                shapes[layer.tensor("lora_magnitude")] = layer.shape[:1]
        return shapes

    def factors(self, layer: LayerPlan) -> tuple[Tensor, Tensor, int]:
        """A and B of a layer's whole update, with what never trains of it, and their rank."""
        A, B = (self.tensors[layer.tensor(f"lora_{k}")] for k in "AB")
        if layer.mixed:
            weights = self.tensors[layer.tensor("lora_mixture")].softmax(0)
            B = weighted(self.slots[layer.name], B, weights, [rank for _, rank in layer.mixed])
        if layer.fixed:
            fixed = (self.tensors[layer.tensor(f"lora_fixed_{k}")] for k in "AB")
            A, B = joined_factors(self.slots[layer.name], A, B, *fixed)
        return A, B, layer.rank + layer.fixed

    def thin_factors(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """A layer's whole update by groups, as `LowRankUpdate.thin_factors`."""
        left, right = sides(self.slots[layer.name], *self.factors(layer))
        return self.config.scaling(layer.rank, layer.alpha) * left, right

    def update_names(self) -> set[str]:
        """Names in `tensors` of the updates, by the plan."""
        return {layer.tensor(leaf) for layer in self.plan.layers for leaf in LEAVES}

    def description(self) -> dict[str, Any]:
        """All but the tensors, in plain types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "base_class": self.base_class,
            "training": self.training,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "slots": {name: _slot_dict(slot) for name, slot in self.slots.items()},
            "fingerprint": self.fingerprint,
            **({"quantized": self.quantized} if self.quantized else {}),
            **({"origin": self.origin.to_dict()} if self.origin else {}),
        }


def write_adapter(folder: str | os.PathLike[str], saved: SavedAdapter) -> None:
    """Write both files. Each holds one digest over the contents of both, so that damage, and two files
    of different saves, are found.

    Raises:
        WriteError: the folder cannot be written; files that stood there before are untouched.
    """
    about = saved.description()
    tensors = {n: t.detach().contiguous().cpu() for n, t in saved.tensors.items()}
    digest = digest_of(about, tensors)
    text = json.dumps({**about, "sha256": digest}, indent=1) + "\n"
    write_pair(folder, text, tensors, {"format": "pt", "sha256": digest})


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read and check the two files of an adapter in our format.

    Raises:
        AdapterFileError: a file is missing, damaged, of another format, of a newer version or of another
            save than its fellow.
    """
    return assembled(read_pair(folder), folder)


def assembled(pair: Pair, folder: str | os.PathLike[str]) -> SavedAdapter:
    """`read_adapter` for files that were read."""
    about, tensors, metadata = pair
    path = Path(folder) / CONFIG_FILE
    if about.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path} is not an adapter of lora_lightning. Give a folder that save_adapter wrote."
        )
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{path} has format version {about.get('version')!r}; this release of lora_lightning reads "
            f"version {VERSION}. Upgrade lora-lightning."
        )
    stated = about.pop("sha256", None)
    if stated != metadata.get("sha256"):
        raise AdapterFileError(
            f"{CONFIG_FILE} and {TENSOR_FILE} in {folder} are of two different saves, or damaged: their "
            f"checksums differ. Copy both from one place, or save the adapter again."
        )
    if stated != digest_of(about, tensors):
        raise AdapterFileError(
            f"{folder} is damaged: the contents of {CONFIG_FILE} or {TENSOR_FILE} do not match their "
            f"checksum. They are not to be edited by hand: save the adapter again."
        )
    return described(about, tensors, str(path))


def described(about: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> SavedAdapter:
    """The inverse of `SavedAdapter.description`.

    Args:
        where: named in errors.

    Raises:
        AdapterFileError: a value is not of its kind.
    """
    try:
        plan = Plan.from_dict(about["plan"])
        slots = {layer.name: _slot(about["slots"][layer.name]) for layer in plan.layers}
        if not is_fingerprint(about["fingerprint"]) or not isinstance(about["training"], dict):
            raise TypeError("its base or training is of another kind")
        quantized = about.get("quantized", {})
        if not all(isinstance(n, str) and kind in QUANTIZERS for n, kind in quantized.items()):
            raise TypeError("its weights are quantized in a way that is not known here")
        config = LoRAConfig(**about["config"])
        if config.use_dora and any(layer.mixed for layer in plan.layers):
            raise TypeError("its plan is of a mixture, which has no DoRA")
        return SavedAdapter(
            config,
            plan,
            tensors,
            slots,
            str(about["base_class"]),
            about["fingerprint"],
            quantized,
            about["training"],
            Origin.read(about.get("origin", {})),
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{where} is damaged: {error}. Save the adapter again.") from None


def _slot_dict(slot: Slot) -> dict[str, Any]:
    """What differs from a slot of a whole `weight`."""
    default = asdict(Slot("weight"))
    return {k: list(v) if k == "out_range" else v for k, v in asdict(slot).items() if v != default[k]}


def _slot(values: Mapping[str, Any]) -> Slot:
    kinds = {
        "parameter": str,
        "out_range": list,
        "groups": int,
        "transposed": bool,
        "zero": str,
        "part": bool,
    }
    for name, value in values.items():
        if type(value) is not kinds[name]:
            raise TypeError(f"slot option {name}={value!r}")
    out_range = values.get("out_range")
    if out_range is not None and not (
        len(out_range) == 2 and all(type(r) is int for r in out_range) and 0 <= out_range[0] < out_range[1]
    ):
        raise ValueError(f"slot out_range={out_range!r}")
    if values.get("groups", 1) < 1:
        raise ValueError(f"slot groups={values['groups']!r}")
    return Slot(**{"parameter": "weight", **values, "out_range": tuple(out_range) if out_range else None})
