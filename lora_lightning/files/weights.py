"""The weights of a plain network: their file, with a checksum, and loading them whole or not at all."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.files.pair import digest_of, map_tensors
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.names import inside
from lora_lightning.utils.tables import truncate_list
from lora_lightning.utils.torch_file import SHOWN, torch_reasons

logger = logging.getLogger(__name__)


def write_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file that says where its tensors come from, with a digest of it all.

    Args:
        about: values fit for JSON.

    Raises:
        WriteError: the file cannot be written; what stood there before is untouched.
    """
    write_whole(path, weights_writer(tensors, about))


def weights_writer(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Callable[[str], object]:
    """What fills the file of `write_weights`, whose name it is given."""
    state = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    texts = {"lora_lightning": json.dumps(about)}
    metadata = {"format": "pt", **texts, "sha256": digest_of(texts, state)}
    return lambda temporary: save_file(state, temporary, metadata)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, whose digest is compared where we have written it.

    Raises:
        AdapterFileError: it is missing, cannot be read, or is damaged.
    """
    tensors, metadata = map_tensors(path)
    about = metadata.get("lora_lightning")
    ours = about is not None and "config_sha256" not in metadata  # which an adapter in PEFT's format has
    if ours and metadata.get("sha256") != digest_of({"lora_lightning": about}, tensors):
        raise AdapterFileError(f"{path} is damaged: it does not match its checksum. Make or copy it again.")
    return tensors, metadata


def about_in(metadata: Mapping[str, str], where: object) -> dict[str, Any]:
    """What the metadata of a file say beside its tensors; empty of one that is not ours.

    Raises:
        AdapterFileError: it is of another kind.
    """
    try:
        about = json.loads(metadata.get("lora_lightning", "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{where} is damaged: {error}.") from None
    return about if isinstance(about, dict) else {}


def network_state(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a state dict that are the network's, under its names: a LightningModule has put `model.`
    before them and may hold others. Any other state is returned as it is."""
    if model.state_dict().keys() & state.keys():
        return state
    return {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")} or state


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: object,
    what: str,
    remedy: str,
    fresh: Collection[str] = (),
) -> None:
    """Load weights into a network that was just built: all of them, but for layers that are to be fresh ones.

    Step counters of BatchNorm may be absent, as for torch itself: older files have none. Names that a
    layer's class had before are renamed by the class.

    Args:
        model: thrown away by the caller where this raises: it may have some of the weights then.
        state: names may carry the `model.` of a LightningModule.
        where: the file, for errors.
        what: the network, for errors, such as "resnet18 as it was built".
        remedy: what to do where the weights do not fit; ends the message.
        fresh: names of modules and tensors that stay as they were built, whatever the file has of them.

    Raises:
        AdapterFileError: tensors are missing, foreign or of another shape or kind, all of them counted.
    """
    own = model.state_dict()
    given = {n: t for n, t in network_state(model, state).items() if not inside(n, fresh)}
    shapes = {
        n: f"{n} is {_kind(t)} in the file, {_kind(own[n])} in the model"
        for n, t in given.items()
        if n in own and _kind(t) != _kind(own[n])
    }
    other: list[str] = []
    missing: list[str] = []
    foreign: list[str] = []
    try:
        found = _loaded(model, {n: t for n, t in given.items() if n not in shapes})
        missing = [n for n in found.missing_keys if n not in shapes and not inside(n, fresh)]
        foreign = found.unexpected_keys
    except RuntimeError as error:  # of a name that a layer's class has renamed
        other = torch_reasons(error)
    refuse_misfit(missing, foreign, [*shapes.values(), *other], where, what, remedy)
    if fresh:
        logger.info("%s: fresh layers %s", what, truncate_list(sorted(fresh)))


def _loaded(model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """The names that do not fit. A class that asks for the version of the state, which files do not have, as
    MNASNet does, is told its own."""
    try:
        return model.load_state_dict(dict(state), strict=False)
    except ValueError:
        told = OrderedDict(state)
        vars(told)["_metadata"] = {"": getattr(model.state_dict(), "_metadata", {}).get("", {})}
        return model.load_state_dict(told, strict=False)


def refuse_misfit(
    missing: list[str], foreign: list[str], shapes: list[str], where: object, what: str, remedy: str
) -> None:
    """Refuse weights that a network does not take whole.

    Args:
        missing: names of tensors that the file lacks.
        foreign: names of tensors that the network lacks.
        shapes: sentences about tensors of another shape or kind.
        where, what, remedy: as in `load_into`.

    Raises:
        AdapterFileError: there are any.
    """
    near = did_you_mean(foreign[0], missing) if foreign and missing else ""
    if any("lora_" in n for n in foreign):
        near += " It holds updates of LoRA: load it with lora_lightning.load_adapter."
    lines = [
        *_line(missing, "missing"),
        *(f"{line}{near}" for line in _line(foreign, "not of this model")),
        *_line(shapes, "of another shape"),
    ]
    if lines:
        raise AdapterFileError(
            f"{where} does not fit {what}; nothing was loaded:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + f"\n{remedy}"
        )


def _kind(tensor: Tensor) -> str:
    number = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{number}"


def _line(items: list[str], what: str) -> Iterable[str]:
    if items:
        count = f"1 tensor is {what}" if len(items) == 1 else f"{len(items)} tensors are {what}"
        rest = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
        yield f"{count}: {'; '.join(items[:SHOWN])}{rest}."
