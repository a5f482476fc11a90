"""A base built anew as a run's configuration says, and merging from files, which may need one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.quantize import quantize_as
from lora_lightning.compression.rebuild import DESCRIPTION, compressed
from lora_lightning.errors import MissingFileError, UserError
from lora_lightning.files.alignment import aligned
from lora_lightning.files.allowed import BUILDERS, checked_facts, section_of
from lora_lightning.files.fingerprint import short
from lora_lightning.files.hubs.fetch import fetched
from lora_lightning.files.locate import CHECKPOINT, AdapterSource, Source, WeightsSource, read_source
from lora_lightning.files.merge import Merged, merge_state
from lora_lightning.files.random_base import about_base, kept_base, put_back_base
from lora_lightning.files.weights import read_weights, write_weights
from lora_lightning.utils.mapping_file import NOTHING_RUN, read_mapping
from lora_lightning.utils.names import named_modules


def merge_files(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    check_base: bool = True,
) -> Merged:
    """Write the merged weights of an adapter's folder or a Trainer's checkpoint as one safetensors file,
    which timm, torchvision or torchaudio load without this package.

    Args:
        path: the folder or checkpoint.
        out: the file to write, ending in `.safetensors`.
        base: a safetensors file with the base's weights. None takes them from the checkpoint if it holds
            them, else rebuilds the base as the configuration of the training application's run says.
        adapter: which one of a checkpoint that holds several.
        overwrite: replace a file that stands there.
        check_base: refuse frozen weights with other values than those that it was trained on.

    Raises:
        UserError, AdapterFileError: as `merge_state` and `read_source`; or the base is not known.
        OSError: the file cannot be written; what stood there before is untouched.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"out={out}: give a file that ends in .safetensors.")
    if out.exists() and not overwrite:
        raise UserError(f"out={out} exists: give another name, or overwrite=true to replace it.")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}: create it first.")
    source = read_source(path, adapter)
    merged = merge_state(source.saved, base_of(source, base), check_base)
    about = {"merged_from": str(path), **_origin(source), "rounding": [merged.largest, merged.relative]}
    if base is None and (description := compression_of(source)):
        about["compressed"] = description
    write_weights(out, merged.state, about)
    return merged


def base_of(source: AdapterSource, base: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """The base's weights: from a file, from the checkpoint itself, or rebuilt.

    Raises:
        UserError: none of these can give them.
    """
    if base is not None:
        path = fetched(base, adapter=False)
        if not path.is_file():
            raise UserError(f"base={base}: there is no such file. Give a .safetensors file.")
        return read_weights(path)[0]
    if source.base_weights:
        return source.base_weights
    if kept := kept_base(source.base_folders()):
        return kept
    config = source.config()
    if not config:
        raise UserError(
            f"{source.path} does not hold the base's weights and lies in no run of the training application, "
            "by which they could be rebuilt: give base=FILE.safetensors."
        )
    return dict(rebuilt_model(config, source)[0].state_dict())


def rebuilt_model(
    config: Mapping[str, Any],
    source: Source | None,
    facts: Mapping[str, Any] | None = None,
    replaced: bool | None = None,
    own: bool = False,
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model as a configuration builds it, and what its data say of themselves (`provides`).

    A run's configuration may have come with a download: only models and data of this package are built
    from it, see `lora_lightning.files.allowed`. The data are not, where the run has kept what they said.

    Args:
        source: whose run's the configuration is; None is a recipe of this package or the user.
        facts: what the data say, where it is known already.
        replaced: whether the weights that it begins with are replaced anyway, and may be absent; None is
            those of a source with weights.
        own: the configuration is a recipe or of the user's own words, although there is a source.

    Raises:
        UserError: it would build something else, or cannot be built.
    """
    try:
        if source is None or own:
            model, facts = _composed_model(config, facts)
            if source and (description := compression_of(source)):
                put_back_base(compressed(model, description), source.base_folders())
            return model, facts
        replaced = isinstance(source, WeightsSource) if replaced is None else replaced
        model, facts = _model_of_run(config, source, facts, replaced)
    except ModuleNotFoundError as error:
        raise UserError(
            f"rebuilding the base needs {error.name}: pip install 'lora-lightning[recipes]', or give "
            "base=FILE.safetensors."
        ) from None
    if description := compression_of(source):
        compressed(model, description)
    if isinstance(source, AdapterSource):
        put_back_base(model, source.base_folders())
        quantize_as(model, aligned(source.saved, list(named_modules(model))).quantized)
    return model, facts


def compression_of(source: Source) -> dict[str, Any] | None:
    """How the network was made smaller before it was trained, if it was."""
    if isinstance(source, WeightsSource):
        return source.about.get("compressed") or _told_beside(source)
    return about_base(source.base_folders()).get("compressed")


def _told_beside(source: WeightsSource) -> dict[str, Any] | None:
    """What the run's folder, or that of one of its methods, says of a Trainer's checkpoint in it."""
    if source.kind != CHECKPOINT or source.run is None:
        return None
    here = source.path.absolute()
    folders = [folder for folder in here.parents if folder.is_relative_to(source.run.absolute())]
    file = next((f for folder in folders if (f := folder / DESCRIPTION).is_file()), None)
    return read_mapping(file, NOTHING_RUN) if file else None


def _model_of_run(
    config: Mapping[str, Any], source: Source, facts: Mapping[str, Any] | None, replaced: bool
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    where = source.config_file
    target, options = section_of(config, "model", where)
    facts = source.facts() if facts is None else facts
    data = section_of(config, "data", where) if facts is None else None
    try:
        if data is not None:
            facts = checked_facts(getattr(build(*data), "provides", {}), where)
        takes = inspect.signature(builder_of(target)).parameters
        given = {name: value for name, value in (facts or {}).items() if name in takes}
        return _built(target, {**options, **given}, replaced), facts or {}
    except UserError as error:
        raise UserError(
            f"the base cannot be rebuilt as {where} says: {error}\nOr give base=FILE.safetensors."
        ) from None


def _built(target: str, options: dict[str, Any], replaced: bool) -> torch.nn.Module:
    """The model; without the weights that it begins with where these are not on this machine and are replaced
    anyway."""
    try:
        return build(target, options)
    except MissingFileError:
        if not replaced:
            raise
        empty = {"pretrained": False, "checkpoint": None}
        return build(target, options | {name: value for name, value in empty.items() if name in options})


def _composed_model(
    config: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """By the user's own words and recipes, which may name any class."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from lora_lightning.app.signatures import takes

    whole: Any = OmegaConf.create(dict(config))
    try:
        if facts is None:
            facts = getattr(instantiate(whole.data, _convert_="all"), "provides", {})
        given = {name: value for name, value in facts.items() if takes(whole.model["_target_"], name)}
        return instantiate(whole.model, **given, _convert_="all"), facts
    except (UserError, InstantiationException) as error:
        reason = error if isinstance(error, UserError) else error.__cause__ or error
        raise UserError(str(reason)) from None


def build(name: str, options: Mapping[str, Any]) -> Any:
    """Call a builder.

    Args:
        name: from `section_of`.
        options: plain values.

    Raises:
        UserError: it cannot be built from these.
    """
    if not any(name in names for names in BUILDERS.values()):
        raise ValueError(f"{name} is no builder")
    builder = builder_of(name)
    try:
        inspect.signature(builder).bind(**options)
        return builder(**options)
    except UserError:
        raise
    except Exception as error:  # the libraries' own, for whatever a file may say
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{name.rpartition('.')[2]} cannot be built: {reason}. Give what it can be built with."
        ) from error


def builder_of(name: str) -> Any:
    """The class or function of a name in BUILDERS."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _origin(source: AdapterSource) -> dict[str, Any]:
    saved = source.saved
    return {
        "origin": source.origin().to_dict(),
        "recipe": source.recipe(),
        "training": saved.training,
        "base_class": saved.base_class,
        "fingerprint": short(saved.fingerprint) if saved.fingerprint else "",
        "layers": len(saved.plan.layers),
    }
