"""Merging without a model: an adapter and its base's weights made one plain state dict."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_lightning.adapter_file import SavedAdapter
from lora_lightning.adapter_pair import read_weights, weights_metadata
from lora_lightning.digests import digests
from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files import write_whole
from lora_lightning.fingerprint import refusal_of_base, short
from lora_lightning.fitting import aligned, update_shapes
from lora_lightning.layers.layer import effective_weight
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.weight_norm import normed_parts, normed_weight, parts_of
from lora_lightning.names import named_modules, named_parameters
from lora_lightning.quantization import quantize_as
from lora_lightning.quantized import QuantizedTensor, is_quantized
from lora_lightning.random_base import kept_base, put_back_base
from lora_lightning.rebuild import build, builder_of, checked_facts, section_of
from lora_lightning.report import listed
from lora_lightning.source import Source, read_source


@dataclass(frozen=True)
class Merged:
    """A plain state dict and what the merging did to it.

    Attributes:
        state: names -> tensors, in the base's dtypes.
        weights: how many weights were changed by updates.
        largest: the largest absolute difference between a merged weight and the sum in float32.
        relative: Frobenius norm of all those differences over that of all updates.
        left_out: trained tensors outside the network.
    """

    state: dict[str, Tensor]
    weights: int
    largest: float
    relative: float
    left_out: list[str]


def merge_state(saved: SavedAdapter, base: Mapping[str, Tensor], any_base: bool = False) -> Merged:
    """Add an adapter's updates to the weights of a state dict, and put its trained tensors in place.

    The sum is taken in float32 (float64 for such weights) and rounded to the weight's dtype once. Of a
    weight-normed layer g and v are written, under the names that they have in the base. Weights
    that were quantized while the adapter trained are rounded as they were then, and are floats again.

    Args:
        saved: from `read_source(...).saved` or `read_adapter`.
        base: a state dict of the network, or of a module that holds it; it is not changed.
        any_base: accept frozen weights with other values than those that it was trained on.

    Raises:
        AdapterFileError: the adapter does not fit the weights, or they are another base's.
        UserError: a merged weight would not be finite.
    """
    saved = aligned(saved, _modules(base))
    _check(saved, base, any_base)
    base = {n: _as_trained(t, saved.quantized.get(n)) for n, t in base.items()}
    state = dict(base)
    groups: dict[str, list[str]] = {}
    for layer in saved.plan.layers:
        groups.setdefault(_weight_name(saved, layer.name, layer.module), []).append(layer.name)
    largest, lost, moved = 0.0, 0.0, 0.0
    for name, layers in groups.items():
        parts = normed_parts(base, name)
        weight = normed_weight(*(base[n] for n in parts)) if parts else base[name]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        total = effective_weight(wide, [_update(saved, layer, wide) for layer in layers])
        merged = total.to(weight.dtype)
        _refuse_not_finite(name, merged, weight)
        error = merged.to(wide.dtype) - total
        largest = max(largest, error.abs().max().item())
        lost += error.double().square().sum().item()
        moved += (total - wide).double().square().sum().item()
        if parts:
            state.update(zip(parts, parts_of(total, *(base[n] for n in parts)), strict=True))
        else:
            state[name] = merged
    updates = update_shapes(saved.plan, saved.slots, saved.config)
    own = {n: t for n, t in saved.tensors.items() if n not in updates}
    tops = {n.split(".")[0] for n in base} | {h.split(".")[0] for h in saved.plan.heads}
    left_out = [n for n in own if n.split(".")[0] not in tops]
    for name, tensor in own.items():
        if name not in left_out:
            state[name] = tensor.to(base[name].dtype) if name in base else tensor
            _refuse_not_finite(name, state[name], base.get(name))
    return Merged(state, len(groups), largest, (lost / moved) ** 0.5 if moved else 0.0, left_out)


def _refuse_not_finite(name: str, merged: Tensor, weight: Tensor | None) -> None:
    """A base that holds infinity itself may keep it."""
    if not torch.isfinite(merged).all() and (weight is None or torch.isfinite(weight).all()):
        raise UserError(f"{name}: merged it would hold NaN or infinity. Nothing was written.")


def _as_trained(weight: Tensor, kind: str | None) -> Tensor:
    """The base's tensor as floats; where it was quantized while the adapter trained, rounded as then."""
    if kind and not is_quantized(weight):
        weight = QuantizedTensor.of(weight, kind)
    return weight.dequantize() if is_quantized(weight) else weight


def merge_files(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    any_base: bool = False,
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
        any_base: accept frozen weights with other values than those that it was trained on.

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
        raise UserError(f"out={out}: there is no folder {out.parent}.")
    source = read_source(path, adapter)
    merged = merge_state(source.saved, base_of(source, base), any_base)
    tensors = {n: t.detach().contiguous().clone() for n, t in merged.state.items()}
    about = {"merged_from": str(path), **_origin(source), "rounding": [merged.largest, merged.relative]}
    metadata = weights_metadata(tensors, about)
    write_whole(out, lambda temporary: save_file(tensors, temporary, metadata))
    return merged


def base_of(source: Source, base: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """The base's weights: from a file, from the checkpoint itself, or rebuilt.

    Raises:
        UserError: none of these can give them.
    """
    if base is not None:
        path = Path(base)
        if not path.is_file():
            raise UserError(f"base={base}: there is no such file. Give a .safetensors file.")
        return read_weights(path)[0]
    if source.base:
        return source.base
    if kept := kept_base(source.run):
        return kept
    config = source.run_config()
    if not config:
        raise UserError(
            f"{source.path} does not hold the base's weights and lies in no run of the training application, "
            "by which they could be rebuilt: give base=FILE.safetensors."
        )
    return dict(rebuilt_model(config, source)[0].state_dict())


def rebuilt_model(
    config: Mapping[str, Any], source: Source | None, facts: Mapping[str, Any] | None = None
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model as a configuration builds it, and what its data say of themselves (`provides`).

    A run's configuration may have come with a download: only models and data of this package are built
    from it, see `lora_lightning.rebuild`. The data are not, where the run has kept what they said.

    Args:
        source: whose run's the configuration is; None is a recipe of this package or the user.
        facts: what the data say, where it is known already.

    Raises:
        UserError: it would build something else, or cannot be built.
    """
    try:
        if source is None:
            return _composed_model(config, facts)
        model, facts = _model_of_run(config, source, facts)
    except ModuleNotFoundError as error:
        raise UserError(
            f"rebuilding the base needs {error.name}: pip install 'lora-lightning[recipes]', or give "
            "base=FILE.safetensors."
        ) from None
    put_back_base(model, source.run)
    quantize_as(model, aligned(source.saved, list(named_modules(model))).quantized)
    return model, facts


def _model_of_run(
    config: Mapping[str, Any], source: Source, facts: Mapping[str, Any] | None
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    where = source.run_file
    target, options = section_of(config, "model", where)
    facts = source.facts() if facts is None else facts
    data = section_of(config, "data", where) if facts is None else None
    try:
        if data is not None:
            facts = checked_facts(getattr(build(*data), "provides", {}), where)
        takes = inspect.signature(builder_of(target)).parameters
        given = {name: value for name, value in (facts or {}).items() if name in takes}
        return build(target, {**options, **given}), facts or {}
    except UserError as error:
        raise UserError(
            f"the base cannot be rebuilt as {source.run} says: {error}\nOr give base=FILE.safetensors."
        ) from None


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


def _check(saved: SavedAdapter, base: Mapping[str, Tensor], any_base: bool) -> None:
    problems = []
    for layer in saved.plan.layers:
        name = _weight_name(saved, layer.name, layer.module)
        if (parts := normed_parts(base, name)) is not None:
            name = parts[1]  # v has the shape of the weight
        if name not in base:
            computed = any(n.startswith(f"{layer.module}.parametrizations.") for n in base)
            remedy = " (it is computed: merge with eject(model, merged=True))" if computed else ""
            problems.append(f"no weight {name}{remedy}")
        elif not base[name].is_floating_point():
            problems.append(f"{name} is {base[name].dtype}")
        elif saved.slots[layer.name].shape(base[name]) != layer.shape:
            problems.append(f"{name} is {tuple(base[name].shape)}, in the adapter {layer.shape}")
        elif shared := [
            n for n, t in base.items() if n != name and t.data_ptr() == base[name].data_ptr() != 0
        ]:
            problems.append(f"{name} is also {shared[0]}: merge the model itself, eject(model, merged=True)")
    shapes = update_shapes(saved.plan, saved.slots, saved.config)
    problems += [f"the adapter lacks {n}" for n in shapes if n not in saved.tensors]
    problems += [
        f"{n} is {tuple(saved.tensors[n].shape)}, not {s}"
        for n, s in shapes.items()
        if n in saved.tensors and tuple(saved.tensors[n].shape) != s
    ]
    if problems:
        raise AdapterFileError(f"the adapter does not fit the base's weights: {listed(problems, most=3)}.")
    refusal = refusal_of_base(saved.base, digests(base), "the adapter")
    if refusal and not any_base:
        raise AdapterFileError(refusal)


def _update(saved: SavedAdapter, name: str, weight: Tensor) -> LowRankUpdate:
    layer = next(p for p in saved.plan.layers if p.name == name)
    slot = saved.slots[name]
    update = LowRankUpdate(
        slot.of(weight),
        slot,
        layer.rank,
        saved.config.scaling(layer.rank, layer.alpha),
        use_dora=saved.config.use_dora,
    ).requires_grad_(False)
    for part, parameter in named_parameters(update).items():
        parameter.copy_(saved.tensors[layer.tensor(part)])
    return update


def _weight_name(saved: SavedAdapter, layer: str, module: str) -> str:
    return f"{module}.{saved.slots[layer].parameter}".lstrip(".")


def _modules(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that the tensors of a state dict lie in."""
    parts = [n.split(".") for n in state]
    return list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p))))


def _origin(source: Source) -> dict[str, Any]:
    saved = source.saved
    return {
        "recipe": source.recipe(),
        "training": saved.training,
        "base_class": saved.base_class,
        "base": short(saved.base) if saved.base else "",
        "layers": len(saved.plan.layers),
    }
