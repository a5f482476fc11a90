"""An adapter written as PEFT writes its own, for `peft.PeftModel.from_pretrained(base, folder)`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.files.alignment import network_of, renamed
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.pair import peft_metadata
from lora_lightning.files.peft_read import OUT_PROJ, PREFIX, TWICE_UNTIL
from lora_lightning.files.peft_resolve import foreign_computation
from lora_lightning.layers.conv import LoRAConv
from lora_lightning.layers.embedding import LoRAEmbedding
from lora_lightning.layers.linear import LoRALinear
from lora_lightning.layers.registry import family_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.names import inside, named_modules, plain_name, submodule

OURS = 'save it with format="lora_lightning", or merge it (eject(model, merged=True))'


class Update(NamedTuple):
    """A and B as PEFT has them, of one of its layers."""

    A: Tensor
    B: Tensor
    rank: int
    alpha: float


def to_peft(
    saved: SavedAdapter, model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and metadata of PEFT's two files.

    Args:
        saved: with names of this model.
        model: as it was before it was adapted. Of a LightningModule the network inside is PEFT's base.

    Raises:
        ConfigError: what PEFT cannot express, every layer named.
    """
    saved, network = _in_network(saved, model)
    modules = named_modules(network)
    problems = [p for layer in saved.plan.layers if (p := _layer_problem(layer, saved, modules))]
    problems += _shared(network, [p.module for p in saved.plan.layers])
    whole, biases = _own_parts(saved, modules, problems)
    if problems:
        raise ConfigError([f'format="peft": {p}' for p in problems])
    updates = _updates(saved, modules)
    tensors = {
        **{f"{PREFIX}{k}": t for name, u in updates.items() for k, t in _keys(name, u, modules).items()},
        **_magnitudes(saved, modules),
        **{f"{PREFIX}{n}": t for n, t in _whole_states(saved, modules, whole).items()},
        **{f"{PREFIX}{_wrapped(n, saved, modules)}": saved.tensors[n] for n in biases},
    }
    extras = {"base_class": saved.base_class, "fingerprint": saved.fingerprint, "training": saved.training}
    extras |= {"origin": saved.origin.to_dict()} if saved.origin else {}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    about = _config(saved, updates, whole, modules)
    return about, tensors, peft_metadata(about, tensors, extras)


def _in_network(saved: SavedAdapter, model: nn.Module) -> tuple[SavedAdapter, nn.Module]:
    top = network_of(model, saved.plan)
    if not top:
        return saved, model
    return renamed(saved, lambda n: n.removeprefix(top).removeprefix(".")), submodule(model, top)


def _layer_problem(layer: LayerPlan, saved: SavedAdapter, modules: dict[str, nn.Module]) -> str | None:
    """Why PEFT cannot have this layer's update."""
    module, slot = modules[layer.module], saved.slots[layer.name]
    family = family_of(module)
    if isinstance(module, nn.MultiheadAttention):
        if layer.slot != "in_proj":
            return f"{layer.name} is a part of a projection: target {layer.module}.in_proj, or {OURS}."
        if saved.config.use_dora:
            return f"{layer.name}: PEFT has no DoRA of nn.MultiheadAttention; {OURS}."
        return None
    if slot.out_range is not None:
        return f"{layer.name} is an update of some rows of {layer.module}: target {layer.module}, or {OURS}."
    if not layer.module:
        return f"the model itself is the adapted layer, which PEFT cannot replace; {OURS}."
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return None
    if reason := foreign_computation(module):
        return f"{layer.name} is {reason}; {OURS}."
    if family is LoRAConv:
        plain = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c))
        if type(module).__init__ is not plain.__init__:
            return f"{layer.name} is a {layer.kind}, which PEFT cannot make anew; {OURS}."
        return None
    if family in (LoRALinear, LoRAEmbedding):
        return None
    return f"{layer.name} is a {layer.kind}, which PEFT does not adapt by its weight; {OURS}."


def _shared(network: nn.Module, adapted: list[str]) -> list[str]:
    """PEFT replaces a module under its first name only."""
    names: dict[int, list[str]] = {}
    for name, module in named_modules(network, all_names=True).items():
        names.setdefault(id(module), []).append(name)
    return [
        f"{name} is used under the names {', '.join(same)}, of which PEFT adapts the first alone; {OURS}."
        for name in dict.fromkeys(adapted)
        if len(same := names[id(submodule(network, name))]) > 1
    ]


def _own_parts(
    saved: SavedAdapter, modules: dict[str, nn.Module], problems: list[str]
) -> tuple[list[str], list[str]]:
    """Modules that PEFT saves whole (heads, norms), and trained biases of other modules."""
    whole = dict.fromkeys(_with_forward([h for h in saved.plan.heads if h in modules], modules))
    biases = []
    adapted = [p.module for p in saved.plan.layers]
    for name in own_names_of(saved):
        module, _, leaf = name.rpartition(".")
        if inside(name, whole):
            continue
        if "bias" in leaf and saved.config.train_bias != "none":
            biases.append(name)
        elif module in modules and module and not any(inside(a, [module]) for a in adapted):
            whole[module] = None
        else:
            problems.append(f"{name} is trained outside of any layer that PEFT could save whole; {OURS}.")
    return list(whole), [n for n in biases if not inside(n, whole)]


def own_names_of(saved: SavedAdapter) -> list[str]:
    """Names of the tensors that are no updates."""
    names = saved.update_names()
    return [n for n in saved.tensors if n not in names]


def _with_forward(heads: Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """PEFT cannot wrap a list of modules; it can wrap what is in it."""
    found = []
    for head in heads:
        if isinstance(modules[head], (nn.ModuleList, nn.ModuleDict)):
            children = [f"{head}.{n}" for n, _ in modules[head].named_children()]
            found += _with_forward(children, modules)
        else:
            found.append(head)
    return found


def _updates(saved: SavedAdapter, modules: dict[str, nn.Module]) -> dict[str, Update]:
    """By PEFT's names of the layers: of an attention both projections under one rank and alpha."""
    updates: dict[str, Update] = {}
    for layer in saved.plan.layers:
        A, B, rank = saved.factors(layer)
        A, B = A.detach().cpu(), B.detach().cpu()
        alpha = _alpha(saved.config, layer, rank)
        module = modules[layer.module]
        if saved.slots[layer.name].transposed:
            B = B.t()  # (r, out) -> (out, r)
        if A.dim() > 2:
            B = B.view(*B.shape, *[1] * (A.dim() - 2))
        key = (
            f"{layer.module}" if not isinstance(module, nn.MultiheadAttention) else f"{layer.module}.in_proj"
        )
        updates[key] = Update(A, B, rank, alpha)
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            parts = {n: updates.pop(n) for n in (f"{name}.in_proj", f"{name}{OUT_PROJ}") if n in updates}
            if parts:
                updates.update(_attention(name, module, parts, saved))
    return updates


def _alpha(config: LoRAConfig, layer: LayerPlan, rank: int) -> float:
    """With which the scaling is the layer's at this rank."""
    times = rank / layer.rank
    return layer.alpha * (math.sqrt(times) if config.use_rslora else times)


def _attention(
    name: str, module: nn.MultiheadAttention, parts: dict[str, Update], saved: SavedAdapter
) -> dict[str, Update]:
    """PEFT adapts both projections or none, with one rank and one scaling, and adds the second's update
    twice: an absent one is zero, a smaller rank is filled up with zeros, and the second is halved."""
    rank = max(u.rank for u in parts.values())
    alpha = max(parts.values(), key=lambda u: u.rank).alpha
    scaling = saved.config.scaling
    filled = {}
    for key, rows in ((f"{name}.in_proj", 3 * module.embed_dim), (f"{name}{OUT_PROJ}", module.embed_dim)):
        like = next(iter(parts.values())).A
        A, B = like.new_zeros(rank, module.embed_dim), like.new_zeros(rows, rank)
        if key in parts:
            part = parts[key]
            A[: part.rank], B[:, : part.rank] = part.A, part.B
            B *= scaling(part.rank, part.alpha) / scaling(rank, alpha)
        if key.endswith(OUT_PROJ):
            B /= 2
        filled[key] = Update(A, B, rank, alpha)
    return filled


def _wrapped(name: str, saved: SavedAdapter, modules: dict[str, nn.Module]) -> str:
    """The name of a tensor of the base once PEFT has put its layers around it."""
    module, _, leaf = name.rpartition(".")
    attention = {n.module.removesuffix(OUT_PROJ) for n in saved.plan.layers}
    attention = {n for n in attention if isinstance(modules.get(n), nn.MultiheadAttention)}
    if module in attention:
        return f"{module}.base_layer.{leaf}"
    if module.removesuffix(OUT_PROJ) in attention:
        return f"{module.removesuffix(OUT_PROJ)}.base_layer{OUT_PROJ}.base_layer.{leaf}"
    adapted = module in {p.module for p in saved.plan.layers}
    return f"{module}.base_layer.{leaf}" if adapted else name


def _keys(name: str, update: Update, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    parent = name.rpartition(".")[0]
    if isinstance(modules.get(name), nn.Embedding):
        return {f"{name}.lora_embedding_A": update.A, f"{name}.lora_embedding_B": update.B}
    if isinstance(modules.get(parent), nn.MultiheadAttention):
        name = parent if name.endswith(".in_proj") else f"{parent}.base_layer{OUT_PROJ}"
    return {f"{name}.lora_A.weight": update.A, f"{name}.lora_B.weight": update.B}


def _magnitudes(saved: SavedAdapter, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Convolutions' are (1, out, 1, 1)."""
    found = {}
    for layer in saved.plan.layers if saved.config.use_dora else []:
        m = saved.tensors[layer.tensor("lora_magnitude")]
        m = m if len(layer.shape) == 2 else m.view(1, -1, *[1] * (len(layer.shape) - 2))
        found[f"{PREFIX}{layer.module}.lora_magnitude_vector"] = m
    return found


def _whole_states(saved: SavedAdapter, modules: dict[str, nn.Module], whole: list[str]) -> dict[str, Tensor]:
    """All of each module's state, with what was trained in the place of the base's."""
    state = {
        f"{name}.{plain_name(modules[name], n)}": tensor
        for name in whole
        for n, tensor in modules[name].state_dict().items()
    }
    return {n: saved.tensors.get(n, t) for n, t in state.items()}


def _config(
    saved: SavedAdapter, updates: dict[str, Update], whole: list[str], modules: dict[str, nn.Module]
) -> dict[str, Any]:
    config = saved.config
    layers: dict[str, Update] = {}
    for name, update in updates.items():
        parent = name.rpartition(".")[0]
        layers[parent if isinstance(modules.get(parent), nn.MultiheadAttention) else name] = update
    rank = Counter(u.rank for u in layers.values()).most_common(1)[0][0] if layers else config.rank
    alpha = Counter(u.alpha for u in layers.values()).most_common(1)[0][0] if layers else 2 * rank
    return {
        "peft_type": "LORA",
        "peft_version": ".".join(map(str, TWICE_UNTIL)),
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": _unambiguous_targets(list(layers), list(modules)),
        "exclude_modules": None,
        "modules_to_save": _unambiguous_saved(whole, list(modules), list(layers)) or None,
        "rank_pattern": {f"^{re.escape(n)}": u.rank for n, u in layers.items() if u.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": u.alpha for n, u in layers.items() if u.alpha != alpha},
        "bias": config.train_bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "fan_in_fan_out": any(type(modules[n]).__name__ == "Conv1D" for n in layers),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _unambiguous_targets(names: list[str], modules: list[str]) -> list[str] | str:
    """Full names; where one of them is also the ending of another module's, a regular expression."""
    wanted = set(names)
    if any(m.endswith(f".{n}") and m not in wanted for n in names for m in modules):
        return "|".join(map(re.escape, names))
    return names


def _unambiguous_saved(names: list[str], modules: list[str], adapted: list[str]) -> list[str]:
    """Full names; with PEFT's prefix where one is also an ending or a part of another module's name."""
    return [
        f"{PREFIX}{n}"
        if any((m.endswith(n) and m != n) for m in modules)
        or any(re.match(rf"(^|.*\.){n}($|\..*)", a) for a in adapted)
        else n
        for n in names
    ]
