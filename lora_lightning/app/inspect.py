"""What `lora-lightning inspect` prints: an adapter, a Trainer's checkpoint or a file of weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.app.rebuild import base_of
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.alignment import aligned
from lora_lightning.files.allowed import checked_facts
from lora_lightning.files.fingerprint import other_tensors, short
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.hubs.address import is_address
from lora_lightning.files.hubs.fetch import fetched
from lora_lightning.files.locate import WEIGHTS, AdapterSource, read_source
from lora_lightning.files.merge import module_names
from lora_lightning.files.origin import Origin
from lora_lightning.files.peft_resolve import with_beginning
from lora_lightning.files.weights import read_weights
from lora_lightning.layers.weight_norm import normed_parts, normed_weight
from lora_lightning.methods.spectra import Spectra, spectra_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.digests import digests
from lora_lightning.utils.names import family
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import format_table, printable, span, truncate_list

EFFECTIVE = (
    "‖ΔW‖: Frobenius norm of s·B·A{dora}. effective rank: exp of the entropy of its singular values over\n"
    "their sum (Roy & Vetterli 2007), at most the rank. stable rank: ‖ΔW‖² over the square of the largest."
)

RESIDUAL = (
    "These are PEFT's B·A, whose beginning PEFT takes off the base's weights: give base=FILE.safetensors for "
    "the change itself."
)


def inspect(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> str:
    """A page of plain text about an adapter's folder or address, a Trainer's checkpoint or a merged file.

    Args:
        base: a safetensors file with the base's weights, for norms relative to them.

    Raises:
        UserError, AdapterFileError: there is nothing of the kind, or it is damaged.
    """
    given, path = path, fetched(path)
    if is_address(given) and (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    if path.suffix == ".safetensors" and path.is_file():
        return _weights_page(path)
    source = read_source(path)
    weights = base_of(source, base) if base is not None or source.base_weights else {}
    if weights:
        fit = aligned(source.saved, module_names(weights))
        if {fit.weight_name(p) for p in fit.plan.layers} <= weights.keys():
            fit = with_beginning(fit, lambda layer: weights[fit.weight_name(layer)], path)
        source = replace(source, saved=fit, base_weights=weights)
    saved = source.saved
    lines = [*_facts(source, weights), "", layer_table(saved, weights)]
    if saved.plan.heads:
        lines.append(f"trained in full: {', '.join(saved.plan.heads)}")
    if rest := _rest(saved):
        lines.append(f"also trained: {truncate_list(rest, most=6)}")
    dora = " before DoRA's magnitudes" if saved.config.use_dora else ""
    away = f"\n{RESIDUAL}" if saved.on_residual else ""
    return printable("\n".join([*lines, "", EFFECTIVE.format(dora=dora) + away]))


def layer_table(saved: SavedAdapter, weights: Mapping[str, Tensor]) -> str:
    """Layers that repeat in one row, with the ranges of what was measured; and all of them."""
    families: dict[str, list[LayerPlan]] = {}
    for layer in saved.plan.layers:
        families.setdefault(family(layer.name), []).append(layer)
    measured = _spectra(saved, weights)
    rows = []
    groups = [*families.items(), *([("all", saved.plan.layers)] if len(families) > 1 else [])]
    for name, layers in groups:
        numbers = [measured[p.name] for p in layers]
        shapes = {"×".join(map(str, p.shape)) for p in sorted(layers, key=lambda p: math.prod(p.shape))}
        rows.append(
            (
                name,
                str(len(layers)),
                shapes.pop() if len(shapes) == 1 else "",
                span([p.rank for p in layers], "{:d}"),
                span([n.effective_rank for n in numbers], "{:.1f}"),
                span([n.stable_rank for n in numbers], "{:.1f}"),
                span([n.norm for n in numbers], "{:.3g}"),
                span([100 * n.relative for n in numbers if n.relative is not None], "{:.2f}"),
                f"{sum(p.parameters for p in layers):,}",
            )
        )
    header = (
        "layers", "count", "weight", "rank", "effective rank", "stable rank", "‖ΔW‖", "‖ΔW‖/‖W‖ %",
        "parameters",
    )  # fmt: skip
    if not rows:
        return "no layer is adapted"
    shown = [i for i, name in enumerate(header) if weights or "‖W‖" not in name]
    return format_table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _spectra(saved: SavedAdapter, weights: Mapping[str, Tensor]) -> Spectra:
    layers = saved.plan.layers
    factors = {p.name: saved.thin_factors(p) for p in layers}
    norms = {}
    for layer in working(layers, "measuring", "layers"):
        name = saved.weight_name(layer)
        parts = normed_parts(weights, name)
        weight = normed_weight(*(weights[n] for n in parts)) if parts else weights.get(name)
        if weight is not None and weight.numel():
            norms[layer.name] = saved.slots[layer.name].of(weight).double().norm()
    return spectra_of(factors, norms)


def _facts(source: AdapterSource, weights: Mapping[str, Tensor]) -> list[str]:
    saved, config = source.saved, source.saved.config
    method = "LoRA"
    method += " with DoRA magnitudes" if config.use_dora else ""
    if alphas := sorted({p.alpha for p in saved.plan.layers}):
        over = "√rank (rsLoRA)" if config.use_rslora else "rank"
        method += f", alpha {span(alphas, '{:g}')}, scaling alpha / {over}"
    default = LoRAConfig().to_dict()
    shown = ("use_dora", "use_rslora", "rank", "alpha")
    changed = [f"{k}={_brief(v)}" for k, v in config.to_dict().items() if v != default[k] and k not in shown]
    values = sum(t.numel() for t in saved.tensors.values())
    facts = [
        ("", f"{source.path}  ({source.kind})"),
        ("base", _base_text(saved, weights)),
        ("method", method),
        ("options", ", ".join(changed) or "all at their defaults"),
        *([("decided", saved.plan.by_data)] if saved.plan.by_data else []),
        ("trained", _training_text(source.recipe(), saved.training)),
        *facts_text(source.facts() or {}),
        ("size", f"{_size(source.path)}, {len(saved.tensors)} tensors of {values:,} values in all"),
    ]
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" if name else text for name, text in facts]


def facts_text(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What travels with weights, in words: classes, pictures, the temperature."""
    names, lines = facts.get("class_names") or [], []
    count = len(names) or facts.get("num_classes")
    if facts.get("target") == "number":
        mean, std = facts.get("number_mean", 0.0), facts.get("number_std", 1.0)
        lines.append(("predicts", f"a number; {mean:.4g} ± {std:.4g} in the training pictures"))
    elif count:
        several = ", of which a picture may have several" if facts.get("target") == "classes" else ""
        listed = f": {truncate_list(names, most=8)}" if names else ", not named"
        lines.append(("classes", f"{count}{several}{listed}"))
    if size := facts.get("input_size"):
        how = f", {facts['interpolation']}" if "interpolation" in facts else ""
        kept = f", the middle {100 * facts['crop_pct']:.4g} %" if facts.get("crop_pct", 1) != 1 else ""
        lines.append(("pictures", f"{size[2]} × {size[1]} pixels{how}{kept}"))
    if "temperature" in facts:
        lines.append(("temperature", f"{facts['temperature']:.3g}, by which logits are divided"))
    return lines


def _base_text(saved: SavedAdapter, weights: Mapping[str, Tensor]) -> str:
    if not saved.fingerprint:
        return f"{saved.base_class} · fingerprint not known".removeprefix(" · ")
    known = f"{short(saved.fingerprint)} of {len(saved.fingerprint)} frozen tensors"
    text = f"{saved.base_class} · fingerprint {known}"
    for kind in dict.fromkeys(saved.quantized.values()):
        text += f" · {list(saved.quantized.values()).count(kind)} of them in {kind}"
    if weights:
        here = digests(weights)
        others = other_tensors(saved.fingerprint, here)
        text += f" · {len(others)} of them differ here" if others else " · the same here"
    return text


def _training_text(recipe: str, training: Mapping[str, Any]) -> str:
    parts = [f"recipe {recipe}"] if recipe else []
    for unit in ("epochs", "steps"):
        count = training.get(unit)
        if isinstance(count, int):
            parts.append(f"{count:,} {unit if count != 1 else unit[:-1]}")
    return ", ".join(parts) or "not known"


def _rest(saved: SavedAdapter) -> list[str]:
    """Tensors that are neither updates nor of a head."""
    updates = saved.update_shapes()
    heads = tuple(f"{h}." for h in saved.plan.heads)
    return [n for n in saved.tensors if n not in updates and not n.startswith(heads)]


def _weights_page(path: Path) -> str:
    tensors, metadata = read_weights(path)
    names, dtypes = list(tensors), {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    kind = "trained weights"
    try:
        about = json.loads(metadata["lora_lightning"])
        origin = Origin.read(about.get("origin", {}))
        facts = facts_text(checked_facts(origin.facts, path))
        if "merged_from" in about:
            kind, (largest, relative) = "merged weights", about["rounding"]
            facts[:0] = [
                ("merged from", about["merged_from"]),
                ("base", f"{about['base_class']} · fingerprint {about['fingerprint'] or 'not known'}"),
                ("trained", _training_text(about["recipe"], about["training"])),
                ("updates", f"{about['layers']}, merged; {rounding_text(largest, relative)}"),
            ]
        elif origin:
            facts.insert(0, ("trained", _training_text(origin.recipe, {})))
        else:
            raise ValueError("it says nothing of itself")
    except (KeyError, ValueError, TypeError, AttributeError):
        raise AdapterFileError(
            f"{path} is a plain safetensors file of {len(names)} tensors: no adapter, and written neither by "
            "a run nor by lora-lightning merge. Give an adapter's folder, a checkpoint, or a merged file."
        ) from None
    facts.append(("size", f"{_size(path)}, {len(names)} tensors of {', '.join(sorted(dtypes))}"))
    width = max(len(name) for name, _ in facts)
    lines = [f"{path}  ({kind})", *(f"{name:<{width}}  {text}" for name, text in facts)]
    return printable("\n".join(lines))


def rounding_text(largest: float, relative: float) -> str:
    """What was lost by rounding merged weights to their own type."""
    if not largest:
        return "rounding lost nothing"
    return f"rounding lost {100 * relative:.2g} % of them (Frobenius norm), at most {largest:.2g} in a weight"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size(path: Path) -> str:
    files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return f"{sum(p.stat().st_size for p in files) / 1e6:.2f} MB"
