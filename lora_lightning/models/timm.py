"""timm_model: an image model by its timm name, with weights from a file, the package or the hub."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from lora_lightning.errors import AdapterFileError, ConfigError, did_you_mean
from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, begin_at_zero, read_base
from lora_lightning.models.timm_folder import is_saved, saved_model
from lora_lightning.models.timm_weights import pretrained_file
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, Null, at_least, listed, whole

with loading("timm"):
    import timm
    from timm.models import get_pretrained_cfg, model_entrypoint

REMEDY = (
    "Give the model the options that the weights were made with (img_size, depth, ...), or the weights of "
    "this model."
)


def plain_name(name: Any) -> Any:
    """As timm has it, of the hub's `timm/NAME` and `hf-hub:timm/NAME`."""
    return re.sub(r"^(hf[-_]hub:)?timm/", "", name) if isinstance(name, str) else name


def _arch(name: Any) -> str:
    return str(plain_name(name)).partition(".")[0]


NAME = Check(
    "a model of timm, such as vit_base_patch16_224 (timm.list_models() lists them)",
    lambda v: isinstance(v, str) and timm.is_model(_arch(v)),
    near=lambda v: did_you_mean(_arch(v), timm.list_models()),
)
NAME_OR_SAVED = replace(
    NAME,
    allowed=f"{NAME.allowed}, hf-hub:USER/NAME or local-dir:FOLDER",
    test=lambda v: is_saved(v) or NAME.test(v),
)
OWN_HEAD = Null("the weights' own head")
SIDES = listed(
    "a whole number of at least 1, or two, height and width", whole(at_least(1)), count=2, alone=True
)


def timm_model(
    name: Annotated[str, NAME_OR_SAVED],
    *,
    pretrained: bool = False,
    checkpoint: Weights = None,
    num_classes: Annotated[int | None, at_least(0, note="0 for no head"), OWN_HEAD] = None,
    img_size: Annotated[int | Sequence[int] | None, SIDES] = None,
    patch_size: Annotated[int | Sequence[int] | None, SIDES] = None,
    embed_dim: Annotated[int | None, at_least(1)] = None,
    depth: Annotated[int | None, at_least(1)] = None,
    num_heads: Annotated[int | None, at_least(1)] = None,
    drop_path_rate: Annotated[float | None, at_least(0, below=1)] = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model, (batch, channels, height, width) -> (batch, num_classes).

    Weights are loaded whole or not at all; only the head may differ, and is then a fresh one, which begins at
    zero: the pretrained layers get no gradient through a head of random numbers (Dosovitskiy et al. 2021,
    arXiv 2010.11929, section 3.2; Kolesnikov et al. 2020, arXiv 1912.11370).

    Args:
        name: a name of `timm.list_models()`, with or without a tag (`resnet18.a1_in1k`); also as the hub
            has it (`timm/resnet18.a1_in1k`, `hf-hub:timm/resnet18.a1_in1k`). Or a model that somebody has
            saved with timm, config.json beside model.safetensors: `hf-hub:USER/NAME`, `local-dir:FOLDER`.
        pretrained: load timm's weights for this name, from the local cache or the hub; or those saved.
        checkpoint: a .safetensors file, or the bare name of weights shipped in the package
            (`vit_digits`); it takes the place of `pretrained`. Keys may carry the `model.` of a
            LightningModule.
        num_classes: outputs of the head; None keeps the weights' own head, or none where
            they have none. A head of another size
            is replaced by a fresh one, 0 leaves it out.
        img_size: height and width of the images, in pixels; one number is both.
        patch_size: of a patch, likewise.
        embed_dim: the width of a transformer.
        depth: how many blocks it has.
        num_heads: of each block's attention.
        drop_path_rate: probability that a block is left out in training.
        **kwargs: the model's other options. One that is null, these too, is the model's default.

    Raises:
        ConfigError: an unknown name or tag, or bad options.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is pickled, damaged, or made for another model.
    """
    name = plain_name(name)
    require(timm_model, locals(), [None if is_saved(name) else _tag_problem(name), pickle_problem(kwargs)])
    kwargs |= {
        "img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth,
        "num_heads": num_heads, "drop_path_rate": drop_path_rate,
    }  # fmt: skip
    kwargs = plain_options(kwargs)
    saved = None
    if is_saved(name):
        saved = saved_model(name, pretrained and checkpoint is None, kwargs.pop("cache_dir", None))
        name, kwargs = saved.architecture, {**saved.options, **kwargs}
        kwargs["pretrained_cfg_overlay"] = saved.data
    if checkpoint is not None:
        path = base_file(checkpoint)
        state = read_base(path)
        if num_classes is None:
            num_classes = _head_rows(name, state)
    elif pretrained:
        path = (saved and saved.weights) or pretrained_file(name, kwargs.get("cache_dir"))
        reference = _timm_pretrained(name, path, kwargs)
        if num_classes in (None, reference.num_classes):
            return reference
        state = reference.state_dict()
    else:
        return _build(name, num_classes, kwargs)
    model = _build(name, num_classes, kwargs)
    stored, built = network_state(model, state), model.state_dict()
    fresh = [h for h in _head_names(model) if _rows(stored, h) != _rows(built, h)]
    load_into(model, stored, path, f"{name} as it was built", REMEDY, fresh)
    begin_at_zero(model, fresh)
    return model


def pickle_problem(kwargs: Mapping[str, Any]) -> str | None:
    """Why weights are not read by timm itself, which older ones unpickle, if they were to be."""
    given = kwargs.get("checkpoint_path")
    told = "give checkpoint=file.safetensors instead; it is checked against the model and never unpickled."
    return None if given is None else f"checkpoint_path={given!r}: {told}"


def _tag_problem(name: Any) -> str | None:
    """Why a model of timm has no weights of the tag in its name, if it has none."""
    arch, _, tag = str(name).partition(".")
    tagged = timm.list_models(f"{arch}.*", pretrained=True) if tag and timm.is_model(arch) else [name]
    if name in tagged:
        return None
    tags = [t.partition(".")[2] for t in tagged]
    known = f"Tags: {', '.join(tags)}." if tags else "It has no pretrained weights at all."
    return f"name={name!r}: {arch} has no weights tagged {tag!r}.{did_you_mean(tag, tags)} {known}"


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, those of Hydra as plain lists and dictionaries."""
    return {key: _plain(value) for key, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    """Hydra's ListConfig and DictConfig as plain lists and dictionaries."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [_plain(v) for v in value]
    return value


def _build(name: str, num_classes: int | None, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except Exception as error:  # timm checks options by assertions and by what torch raises
        raise ConfigError([_build_problem(name, kwargs, error)]) from error


def _build_problem(name: str, kwargs: Mapping[str, Any], error: Exception) -> str:
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no options"
        return f"timm cannot build {name} with {given}: {error or type(error).__name__}. Give what it takes."
    owner, option = found.groups()
    arch = name.partition(".")[0]
    cls = getattr(sys.modules[model_entrypoint(arch).__module__], owner, None)
    known = [] if cls is None else list(inspect.signature(cls).parameters)
    options = f" Options: {', '.join(known)}." if known else ""
    return (
        f"{option}={kwargs.get(option)!r} is not an option of {name}.{did_you_mean(option, known)}{options}"
    )


def _timm_pretrained(name: str, path: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model with its own head, read by timm: renamed, resampled, channel-adapted, strict."""
    overlay = {**kwargs.get("pretrained_cfg_overlay", {}), "file": str(path), "custom_load": False}
    overlay |= {"source": "timm", "state_dict": None}  # either would be taken before the file
    try:
        return timm.create_model(name, pretrained=True, **{**kwargs, "pretrained_cfg_overlay": overlay})
    except Exception as error:  # timm's, torch's or safetensors' own
        _build(name, None, kwargs)  # the options may be at fault: then this says so
        reason = str(error).strip()
        raise AdapterFileError(
            f"The pretrained weights {path} cannot be loaded into {name}"
            f" ({reason[:400] or type(error).__name__}). Built with other options than"
            " the weights were made for, or a damaged file: mend the options, or delete it and"
            " download it again."
        ) from error


def _head_names(model: nn.Module) -> list[str]:
    """Where timm says the classifier is: one name, several (distilled models) or none."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    if named:
        return [named] if isinstance(named, str) else list(named)
    get_classifier = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else None
    return [key for key, module in model.named_modules() if module is head]


def _rows(state: Mapping[str, torch.Tensor], head: str) -> int:
    """Outputs of that head; 0 when there is none."""
    weight = state.get(f"{head}.weight")
    return 0 if weight is None else weight.shape[0]


def _head_rows(name: str, state: Mapping[str, torch.Tensor]) -> int | None:
    """Outputs of the head that a file holds, 0 for none; None where timm does not name the head."""
    cfg = get_pretrained_cfg(name)
    named = cfg.classifier if cfg else None
    if not named:
        return None
    head = named if isinstance(named, str) else named[0]
    return _rows(state, head) or _rows(state, f"model.{head}")
