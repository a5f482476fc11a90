"""PEFT's adapter folders, read: configuration and keys made a SavedAdapter. `peft_write` writes them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.files.fingerprint import is_fingerprint
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import Pair, check_peft_digest
from lora_lightning.layers.embedding import EMBEDDING_SLOT
from lora_lightning.layers.slot import Slot
from lora_lightning.planning.peft_config import settings_of, variant_problems
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.utils.peft_names import init_of

PREFIX = "base_model.model."
# PEFT up to this version adds the update of nn.MultiheadAttention's output projection twice.
TWICE_UNTIL = (0, 21, 2)
OUT_PROJ = ".out_proj"

KEY = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<matrix>[AB])\.weight|lora_embedding_(?P<table>[AB])"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?)"
)
# With the others PEFT changes the base's weights; by the last two in a way that can be found again.
KNOWN_INITS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")
MERGE_IN_PEFT = "Merge it with PEFT (merge_and_unload) and save the model."


def assembled_peft(pair: Pair, folder: str | os.PathLike[str]) -> SavedAdapter:
    """An adapter that PEFT wrote, or `save_adapter(..., format="peft")`.

    Its layers, their ranks and their shapes follow from the tensors; what only a model can tell (weights
    of (in, out), kinds of layers) is settled by `in_model`.

    Raises:
        AdapterFileError: damaged, or with options that do not exist here; every problem at once.
    """
    about, tensors, metadata = pair
    check_peft_digest(about, tensors, metadata, Path(folder))
    problems = _option_problems(about)
    refuse_peft(problems, folder)
    found = _updates(about, tensors, problems)
    refuse_peft(problems, folder)
    try:
        return _assembled(about, found, tensors, metadata, problems, folder)
    except ConfigError as error:
        refuse_peft(error.problems, folder)
        raise
    except (TypeError, ValueError, AttributeError, re.error, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"{folder}: its options are damaged: {error}. Copy it anew.") from None


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that ends the name."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _option_problems(about: Mapping[str, Any]) -> list[str]:
    problems = variant_problems(about, MERGE_IN_PEFT)
    init = about.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in KNOWN_INITS):
        problems.append(
            f"init_lora_weights={init!r} changes the base's weights, and the file does not say how: save it "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it "
            "plain."
        )
    return problems


def _updates(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Layer as PEFT names it -> "A", "B", "magnitude"; embeddings' as "table A", "table B". A module that is
    saved whole, or has a bias that trains, may be called like one of these."""
    found: dict[str, dict[str, Tensor]] = {}
    saved_modules, biases = _saved_modules(about), about.get("bias", "none") != "none"
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _update_key(key, tensors, saved_modules):
            part = match["matrix"] or match["magnitude"] or f"table {match['table']}"
            found.setdefault(match["layer"], {})[part] = tensor
        elif _saved_module(name, saved_modules) or (biases and name.endswith(".bias")):
            continue
        elif re.search(r"\.lora_\w+(\.\w+)?$", key):
            problems.append(f"{key}: this tensor means nothing here. {MERGE_IN_PEFT}")
    for layer, parts in found.items():
        complete = {"A", "B"} <= parts.keys() or {"table A", "table B"} <= parts.keys()
        A = parts.get("A", parts.get("table A"))
        B = parts.get("B", parts.get("table B"))
        if not complete or A is None or B is None:
            problems.append(f"{layer}: has {', '.join(sorted(parts))} alone: a tensor is missing.")
        elif A.dim() > 2 and B.dim() == A.dim() and 0 < B.shape[1] < len(A) and len(A) % B.shape[1] == 0:
            groups = len(A) // B.shape[1]
            problems.append(f"{layer}: a convolution in {groups} groups, where PEFT's A mixes the groups.")
        elif not _factors_fit(A, B, "table A" in parts):
            problems.append(f"{layer}: A {tuple(A.shape)} and B {tuple(B.shape)} do not belong together.")
    if not found and not problems:
        problems.append("it holds no LoRA tensor.")
    return found


def _update_key(
    key: str, tensors: Mapping[str, Tensor], saved_modules: Iterable[str]
) -> re.Match[str] | None:
    """The parts of an update's key; None of others, as of a module called `lora_A` that is saved whole."""
    name = key.removeprefix(PREFIX)
    match = KEY.fullmatch(name)
    if match and match["matrix"] and _saved_module(name, saved_modules):
        end = f"{match['matrix']}.weight"
        other = "B.weight" if end == "A.weight" else "A.weight"
        return match if key.removesuffix(end) + other in tensors else None
    return match


def _saved_modules(about: Mapping[str, Any]) -> list[str]:
    """PEFT's `modules_to_save`; of another kind than a list they are refused where heads are read."""
    named = about.get("modules_to_save")
    return list(named) if isinstance(named, list) else []


def _saved_module(name: str, saved_modules: Iterable[str]) -> str | None:
    """The module with this tensor that is saved whole, by PEFT's rule: it ends as one of those named."""
    parts = name.split(".")
    ancestors = [".".join(parts[:i]) for i in range(1, len(parts))]
    return next((a for a in ancestors if any(f"{PREFIX}{a}".endswith(m) for m in saved_modules)), None)


def _factors_fit(A: Tensor, B: Tensor, table: bool) -> bool:
    if table:
        return A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1]
    if not 2 <= A.dim() <= 5 or A.dim() != B.dim() or 0 in (*A.shape, *B.shape):
        return False
    return B.shape[1] == A.shape[0] and all(k == 1 for k in B.shape[2:])


def _assembled(
    about: Mapping[str, Any],
    found: dict[str, dict[str, Tensor]],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    problems: list[str],
    folder: str | os.PathLike[str],
) -> SavedAdapter:
    attention = {
        name.removesuffix(f".base_layer{OUT_PROJ}") for name in found if f".base_layer{OUT_PROJ}" in name
    }
    if attention:
        problems += _version_problems(about.get("peft_version"))
    layers: list[LayerPlan] = []
    slots: dict[str, Slot] = {}
    ours: dict[str, Tensor] = {}
    for key, parts in found.items():
        module = key.replace(".base_layer", "")
        inside_attention = key.endswith(f".base_layer{OUT_PROJ}")
        slot = "in_proj" if key in attention else ""
        name = f"{module}.{slot}" if slot else module
        A, B, kind = _converted(parts)
        at = module.removesuffix(OUT_PROJ) if inside_attention else module
        alpha = pattern_value(about.get("alpha_pattern") or {}, at, about.get("lora_alpha", 8))
        rank = pattern_value(about.get("rank_pattern") or {}, at, about.get("r", 8))
        if rank != A.shape[0]:
            problems.append(f"{at}: rank {A.shape[0]}, but r or rank_pattern say {rank}.")
        ours[f"{name}.lora_A"], ours[f"{name}.lora_B"] = A, B
        if "magnitude" in parts:
            ours[f"{name}.lora_magnitude"] = parts["magnitude"].flatten()
        size = sum(t.numel() for t in parts.values())
        shape = (A.shape[1], B.shape[1]) if kind == "Embedding" else (B.shape[0], *A.shape[1:])
        slots[name] = EMBEDDING_SLOT if kind == "Embedding" else Slot("in_proj_weight" if slot else "weight")
        alpha = 2 * alpha if inside_attention else alpha  # as PEFT computes it
        layers.append(
            LayerPlan(name, module, slot, "MultiheadAttention" if slot else kind, shape, len(A), alpha, size)
        )
    own, heads = _own(tensors, about.get("modules_to_save") or [])
    refuse_peft(problems, folder)
    config = _config(about, layers, heads)
    trainable = sum(p.parameters for p in layers) + sum(t.numel() for t in own.values())
    extras = _extras(metadata)
    plan = Plan(layers, heads, {}, "", trainable, trainable)
    return SavedAdapter(config, plan, {**ours, **own}, slots, **extras, foreign=True)


def _version_problems(version: Any) -> list[str]:
    """The version decides what the output projection of nn.MultiheadAttention means."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", str(version or "0"))[:3])
    if numbers <= TWICE_UNTIL:
        return []
    return [
        f"peft_version={version!r}: PEFT up to {'.'.join(map(str, TWICE_UNTIL))} adds the update of "
        f"nn.MultiheadAttention's out_proj twice; whether this one does is not known here. {MERGE_IN_PEFT}"
    ]


def _converted(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, str]:
    """A and B as they are here, and the kind of layer as far as their shapes tell."""
    if "table A" in parts:
        return parts["table A"], parts["table B"].t().contiguous(), "Embedding"
    A, B = parts["A"], parts["B"]
    kind = "Linear" if A.dim() == 2 else f"Conv{A.dim() - 2}d"
    return A, B.flatten(1), kind


def _own(tensors: Mapping[str, Tensor], saved_modules: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The model's own trained tensors under its names, and the modules that are trained in full."""
    if isinstance(saved_modules, str):
        raise TypeError(f"modules_to_save={saved_modules!r}")
    saved_modules = list(saved_modules)
    own: dict[str, Tensor] = {}
    heads: dict[str, None] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        update = _update_key(key, tensors, saved_modules)
        if update or ".original_module." in name or ".modules_to_save." in name:
            continue  # the base's copies, and second names that PEFT gives to biases of saved modules
        name = name.replace(".base_layer.", ".")
        own[name] = tensor
        head = _saved_module(name, saved_modules)
        if head is not None:
            heads[head] = None
    return own, list(heads)


def _config(about: Mapping[str, Any], layers: list[LayerPlan], heads: list[str]) -> LoRAConfig:
    settings = settings_of(about)
    return LoRAConfig(
        target_modules=[p.name for p in layers],
        modules_to_save=heads or None,
        rank_pattern={p.name: p.rank for p in layers if p.rank != settings["rank"]},
        alpha_pattern={p.name: p.alpha for p in layers if not math.isclose(p.alpha, settings["alpha"])},
        init=init_of(about.get("init_lora_weights", True)) or "default",
        **settings,
    )


def _extras(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a SavedAdapter knows of its base and its training, where `save_adapter` wrote the file."""
    try:
        extras = json.loads(metadata.get("lora_lightning", "{}"))
        origin = Origin.read(extras.get("origin", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    fingerprint, training = extras.get("fingerprint"), extras.get("training")
    return {
        "base_class": str(extras.get("base_class", "")),
        "fingerprint": fingerprint if is_fingerprint(fingerprint) else {},
        "training": training if isinstance(training, dict) else {},
        "origin": origin,
    }


def refuse_peft(problems: list[str], where: str | os.PathLike[str]) -> None:
    if problems:
        raise AdapterFileError(
            f"the PEFT adapter in {where} cannot be loaded. Give another, or merge it there "
            "(merge_and_unload):\n" + "\n".join(f"  - {p}" for p in problems)
        )
