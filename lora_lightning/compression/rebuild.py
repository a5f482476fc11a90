"""compressed: a fresh model gets the layers that a description names; the files of a compressed model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from torch import nn

from lora_lightning.compression.form import Layer, Rank, kind_of
from lora_lightning.compression.forms import FORMS
from lora_lightning.compression.held import Held
from lora_lightning.compression.layers import empty, layers_of, put, refuse_adapted
from lora_lightning.compression.recurrent import FORM as RECURRENT
from lora_lightning.compression.recurrent import Stack
from lora_lightning.compression.recurrent_stacks import described, in_place
from lora_lightning.compression.result import FORMAT, Compressed
from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.files.origin import Origin
from lora_lightning.files.weights import load_into, read_weights, weights_writer
from lora_lightning.utils.atomic import make_folder, write_together
from lora_lightning.utils.mapping_file import read_mapping
from lora_lightning.utils.sharding import refuse_sharded

DESCRIPTION, WEIGHTS = "compressed.json", "model.safetensors"
GIVE = "Give a folder that save_compressed wrote, whole."
FRESH = "Build the model as it was before it was compressed."
Model = TypeVar("Model", bound=nn.Module)


def compressed(model: Model, description: Mapping[str, Any]) -> Model:
    """Put layers without values in the places where a compressed model has its own, so that its state dict
    loads strictly.

    Args:
        model: as it was before it was compressed, freshly built; changed in place.
        description: of the compressed one, `Compressed.description()`, or what JSON made of it.

    Returns:
        The same model.

    Raises:
        AdapterFileError: it is no such description, or of another model; the model is untouched.
        UserError: the model has an adapter or is sharded.
    """
    refuse_sharded(model, "compressed")
    refuse_adapted(model)
    layers, left = layers_of(model, ())
    new: dict[str, nn.Module] = {}
    stacks: dict[str, Stack] = {}
    problems = []
    for (name, kind, shape, form, rank), readers in _entries(description):
        if form == RECURRENT:
            stack = described(model, name, shape, rank, readers)
            if isinstance(stack, str):
                problems.append(stack)
            else:
                stacks[name] = stack
                new |= {place or name: module for place, module in stack.empty(rank[0]).items()}
            continue
        layer = layers.get(name)
        if form == "product" and isinstance(layer, nn.Linear):  # the data showed that it is read
            layer = layers[name] = Held(layer, name, "", "weight")
        if layer is None:
            why = f": {left[name]}" if name in left else f".{did_you_mean(name, layers)}"
            problems.append(f"there is no layer {name!r} that can be compressed{why}")
        elif (kind_of(layer), tuple(layer.weight.shape)) != (kind, shape):
            problems.append(f"{name} is {kind} {shape} there, {_told(layer)} here")
        elif not _fits(layer, form, rank):
            problems.append(f"{name} cannot have the form {form!r} with rank {'x'.join(map(str, rank))}")
        else:
            new[name] = empty(layer, form, rank)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterFileError(f"the description does not fit: {'; '.join(problems[:4])}{more}. {FRESH}")
    put(model, {**layers, **in_place(stacks)}, new)
    return model


def save_compressed(
    model: nn.Module,
    told: Compressed,
    folder: str | os.PathLike[str],
    origin: Origin | Mapping[str, Any] | None = None,
) -> None:
    """Write `compressed.json` and `model.safetensors`, both or none.

    Args:
        model: that was compressed, as it is now: trained since or not.
        told: what `compress` returned.
        folder: made where there is none.
        origin: of the weights, so that the command line builds their model again; as of `save_adapter`.

    Raises:
        ConfigError: the origin holds more than plain values.
        WriteError: the folder cannot be written; what stood there is untouched.
    """
    refuse_sharded(model, "save_compressed")
    place = Path(folder)
    make_folder(place)
    text = text_of(told)
    about = {**about_weights(told), "origin": Origin.of(origin).to_dict()}
    files = {
        place / WEIGHTS: weights_writer(model.state_dict(), about),
        place / DESCRIPTION: lambda temporary: Path(temporary).write_text(text, encoding="utf-8"),
    }
    write_together(files)


def text_of(told: Compressed) -> str:
    """Of `compressed.json`."""
    return json.dumps(told.description(), indent=1) + "\n"


def about_weights(told: Compressed) -> dict[str, Any]:
    """What the metadata of weights say of their compression."""
    digest = sha256(text_of(told).encode()).hexdigest()
    return {"compressed_sha256": digest, "compressed": told.description()}


def load_compressed(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Make a fresh model the compressed one that a folder holds. Nothing in the folder is run.

    Args:
        model: as it was before it was compressed, freshly built; changed in place, thrown away where this
            raises.
        folder: that `save_compressed` wrote.

    Returns:
        The same model.

    Raises:
        AdapterFileError: a file is missing, damaged, of another compression or of another model.
        UserError: as `compressed`.
    """
    place = Path(folder)
    description = read_mapping(place / DESCRIPTION, GIVE)
    tensors, metadata = read_weights(place / WEIGHTS)
    try:
        about = json.loads(metadata.get("lora_lightning", ""))
        digest = about.get("compressed_sha256")
    except (ValueError, AttributeError):
        digest = None
    if digest != sha256((place / DESCRIPTION).read_bytes()).hexdigest():
        raise AdapterFileError(f"{place}: {DESCRIPTION} and {WEIGHTS} are not of one compression. {GIVE}")
    load_into(compressed(model, description), tensors, place, "the compressed model", FRESH)
    return model


def _entries(description: Any) -> list[tuple[tuple[str, str, tuple[int, ...], str, Rank], Any]]:
    """Of each layer name, kind, shape, form and rank; and what reads it, unchecked.

    Raises:
        AdapterFileError: the description is of another kind.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("layers"), list):
        raise AdapterFileError(f"this is no description of a compressed model: it names no layers. {GIVE}")
    if (number := description.get("format")) != FORMAT:
        raise AdapterFileError(
            f"the description has format {number!r}, and {FORMAT} is known: use the version that wrote it."
        )
    found = []
    for entry in description["layers"]:
        known = entry if isinstance(entry, Mapping) else {}
        name, kind, form, shape, rank = (known.get(k) for k in ("name", "kind", "form", "shape", "rank"))
        if not (isinstance(name, str) and isinstance(kind, str) and isinstance(form, str)) or not (
            _is_whole(shape) and _is_whole(rank)
        ):
            raise AdapterFileError(f"the description of a layer holds a value of another kind. {GIVE}")
        found.append(((name, kind, tuple(shape), form, tuple(rank)), known.get("readers")))
    names = [entry[0][0] for entry in found]
    if len({*names}) < len(names):
        raise AdapterFileError(f"the description names a layer twice. {GIVE}")
    return found


def _is_whole(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers above 0."""
    return isinstance(value, list) and bool(value) and all(type(n) is int and n > 0 for n in value)


def _fits(layer: Layer, form: str, rank: Rank) -> bool:
    if form not in FORMS or not FORMS[form].fits(layer):
        return False
    full = FORMS[form].full(layer)
    return len(rank) == len(full) and all(r <= most for r, most in zip(rank, full, strict=True))


def _told(layer: Layer) -> str:
    return f"{kind_of(layer)} {tuple(layer.weight.shape)}"
