"""From a configuration to a plan: which layers, at which rank, what else trains. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.kernels.quantized_tensor import is_quantized
from lora_lightning.layers.foreign import library_of
from lora_lightning.layers.norm import is_norm
from lora_lightning.layers.registry import LoRALayer, slots_of
from lora_lightning.planning.detectors import detectors, is_convolutional, within_part
from lora_lightning.planning.heads import find_heads, holds
from lora_lightning.planning.patterns import matching
from lora_lightning.planning.peft_config import config_of
from lora_lightning.planning.plan import LayerPlan, Plan, summary
from lora_lightning.planning.ranks import Decided, ranked
from lora_lightning.planning.structure import Target, auto_targets, targets_of
from lora_lightning.utils.names import inside, joined, named_modules, named_parameters, submodule
from lora_lightning.utils.tables import ROOT, truncate_list

IN_FULL = "in modules_to_save, and trains in full: name it in one of the two"


def plan(model: nn.Module, config: LoRAConfig | None = None, decided: Decided | None = None) -> Plan:
    """Decide what would be adapted, without touching the model.

    Args:
        model: any module that is not adapted yet.
        config: None takes the defaults; a mapping of LoRAConfig's fields and PEFT's `LoraConfig` will do.
        decided: the ranks that data have given, which `inject` and `LoRACallback` find out; without them the
            layers that wait for data stand with an even rank.

    Raises:
        ConfigError: nothing to adapt, a pattern that matches nothing (with near misses), a layer that
            cannot be adapted, a rank given by name above that layer's smaller side; every problem at once.
    """
    config = config_of(config)
    _refuse_unfit(model)
    backbone = find_backbone(model, config)
    network = submodule(model, backbone)
    problems: list[str] = []
    heads = _heads(network, config, problems)
    chosen, skipped = _targets(network, config, heads, problems)
    total = sum(p.numel() for p in named_parameters(model).values())
    layers = ranked(network, config, chosen, problems, total, decided and decided.within(backbone))
    problems += _impossible(network, config, chosen, heads)
    if problems:
        raise ConfigError(problems)
    planned = assemble(model, config, backbone, heads, layers, skipped)
    if config.by_data:
        waits = f"{config.by_data}: decided when the training data are seen"
        planned = replace(planned, by_data=decided.how if decided else waits)
    return planned


def plan_parts(model: nn.Module, config: LoRAConfig) -> Plan:
    """The plan in which no layer is adapted: of the model itself trains the head, and biases and norms as
    `train_bias` and `train_norm` say.

    Raises:
        ConfigError: nothing would train.
    """
    _refuse_unfit(model)
    backbone = find_backbone(model, config)
    problems: list[str] = []
    heads = _heads(submodule(model, backbone), config, problems)
    if problems:
        raise ConfigError(problems)
    planned = assemble(model, config, backbone, heads, [], {})
    if not planned.trainable:
        raise ConfigError(["no head was found to train: name it in modules_to_save."])
    return planned


def head_alone(config: LoRAConfig) -> LoRAConfig:
    """The configuration of a linear probe: what LoRA trains beside its updates and the head stays frozen."""
    return replace(config, train_bias="none", train_norm="frozen", regularizer={})


def _refuse_unfit(model: nn.Module) -> None:
    if any(isinstance(m, LoRALayer) for m in model.modules()):
        raise ConfigError(["the model is adapted already; call lora_lightning.eject(model) first."])
    for name, module in model.named_modules():
        if about := library_of(module):
            library, remedy = about
            raise ConfigError([f"{library} has adapted the model ({name or ROOT}): {remedy}."])
    if lazy := [n for n, p in named_parameters(model).items() if isinstance(p, nn.UninitializedParameter)]:
        raise ConfigError([
            f"the shapes of {truncate_list(lazy)} are not known yet: run one batch through the model first."
        ])  # fmt: skip


def assemble(
    model: nn.Module,
    config: LoRAConfig,
    backbone: str,
    heads: list[str],
    layers: list[LayerPlan],
    skipped: dict[str, str],
) -> Plan:
    """A plan in which names of the backbone are names of the plain model, with the parameters counted."""

    def absolute(name: str) -> str:
        return joined(backbone, name)

    layers = [replace(p, name=absolute(p.name), module=absolute(p.module)) for p in layers]
    heads = [absolute(h) for h in heads]
    updates = sum(p.parameters for p in layers)
    magnitudes = {p.name: p.shape[0] if config.use_dora else 0 for p in layers}
    fixed = sum((p.parameters - magnitudes[p.name]) // p.rank * p.fixed for p in layers)
    trained = trained_names(model, config, backbone, heads, [p.module for p in layers])
    sizes = {n: p.numel() for n, p in named_parameters(model).items()}
    return Plan(
        layers=layers,
        heads=heads,
        skipped={absolute(n): r for n, r in skipped.items()},
        backbone=backbone,
        trainable=updates + sum(size for name, size in sizes.items() if name in trained),
        total=updates + fixed + sum(sizes.values()),
    )


def find_backbone(model: nn.Module, config: LoRAConfig) -> str:
    """Name of the backbone: `config.backbone`, else `model.backbone` if it is a module, else ""; a detector,
    whose other parts are pretrained too, is its own backbone."""
    names = named_modules(model)
    if config.backbone is not None:
        if config.backbone not in names:
            raise ConfigError([
                f"backbone={config.backbone!r} is not a submodule of the model: give the name of one."
                f"{did_you_mean(config.backbone, names)}"
            ])  # fmt: skip
        return config.backbone
    return "backbone" if "backbone" in names and "" not in detectors(model) else ""


def trained_names(
    model: nn.Module, config: LoRAConfig, backbone: str, heads: list[str], adapted: list[str]
) -> set[str]:
    """Names of the model's own parameters that train: outside the backbone those that did before;
    inside it the heads, and biases and norms as configured. A parameter of several names trains when
    it does by one of them."""
    norms_train = config.train_norm in ("affine", "both")
    norms = {n for n, m in named_modules(model).items() if is_norm(m)} if norms_train else set()
    named = list(named_parameters(model, all_names=True).items())
    # By identity: a head that is tied to an embedding is listed under the embedding's name.
    in_heads = {id(p) for n, p in named if inside(n, heads)}
    trained = set()
    for name, parameter in named:
        module, _, leaf = name.rpartition(".")
        if not inside_backbone(name, backbone):
            trains = parameter.requires_grad
        else:
            trains = (
                id(parameter) in in_heads
                or module in norms
                or (config.train_bias == "all" and "bias" in leaf)
                or (config.train_bias != "none" and leaf == "bias" and module in adapted)
            )
        if trains:
            trained.add(id(parameter))
    first = {id(p): n for n, p in reversed(named)}
    return {name for parameter, name in first.items() if parameter in trained}


def inside_backbone(name: str, backbone: str) -> bool:
    """Whether a name lies in the backbone; the backbone "" is the whole model."""
    return not backbone or inside(name, [backbone])


def _heads(backbone: nn.Module, config: LoRAConfig, problems: list[str]) -> list[str]:
    if config.modules_to_save is None:
        return []
    if config.modules_to_save == "auto":
        heads = _untied(backbone, find_heads(backbone))
    else:
        heads = _named_heads(backbone, config.modules_to_save, problems)
    named = named_parameters(backbone, all_names=True).items()
    rounded = [h for h in heads if any(inside(n, [h]) and is_quantized(p) for n, p in named)]
    if rounded:
        problems.append(
            f"modules_to_save: {truncate_list(rounded)} cannot train in full, quantized: name it in the "
            "exclude_modules of lora_lightning.quantize."
        )
    return heads


def _named_heads(backbone: nn.Module, named: str | list[str], problems: list[str]) -> list[str]:
    """The modules meant, those within another of them left out; "auto" in a list means the head."""
    holders = {n: None for n, m in named_modules(backbone).items() if n and holds(m)}
    holders |= dict.fromkeys(loose_parameters(backbone))
    others = [n for n in named if n != "auto"] if isinstance(named, list) else named
    meant = {*matching("modules_to_save", others, holders, problems)}
    if others != named:
        meant.update(_untied(backbone, find_heads(backbone)))
    return [n for n in holders if n in meant and not inside(n, meant - {n})]


def loose_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to no layer and no norm, such as a class token or a table of positions:
    `modules_to_save` may name them as it names modules."""
    return {
        joined(name, leaf): parameter
        for name, module in named_modules(model).items()
        if not (slots_of(name, module) or is_norm(module) or isinstance(module, ParametrizationList))
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _untied(backbone: nn.Module, heads: list[str]) -> list[str]:
    """The heads with a weight of their own: one that is tied to an embedding is no new layer to train."""
    elsewhere = {id(p) for n, p in named_parameters(backbone, all_names=True).items() if not inside(n, heads)}
    return [
        head
        for head in heads
        if any(id(p) not in elsewhere for p in submodule(backbone, head).parameters() if p.dim() > 1)
    ]


def _targets(
    backbone: nn.Module, config: LoRAConfig, heads: list[str], problems: list[str]
) -> tuple[list[Target], dict[str, str]]:
    """What to adapt, and the other weights with the reason why they stay frozen."""
    targets, refused = targets_of(backbone)
    known = {n: t for n, t in targets.items() if not inside(t.module, heads)}
    whole = dict.fromkeys((n for n in targets if n not in known), IN_FULL)
    refused = {n: reason for n, reason in refused.items() if not inside(n, heads)}
    left: dict[str, str] = {}
    if config.target_modules == "auto":
        chosen, left = auto_targets(backbone, known.values())
    elif config.target_modules == "all":
        chosen = [n for n, t in known.items() if not t.slot.part]
    else:
        chosen = matching("target_modules", config.target_modules, known, problems, {**refused, **whole})
        left = {n: "not a target" for n, t in known.items() if n not in chosen and not t.slot.part}
    confined = _confined(backbone, config, chosen, problems)
    outside = f"outside detector_part={config.detector_part or 'neck'}"
    left.update({n: outside for n in chosen if n not in confined})
    chosen = confined
    if config.exclude_modules is not None:
        everything = {**known, **dict.fromkeys(refused)}
        excluded = matching("exclude_modules", config.exclude_modules, everything, problems)
        left.update({n: "excluded" for n in chosen if n in excluded})
        chosen = [n for n in chosen if n not in excluded]
    if not chosen and not problems:
        problems.append(_nothing_to_adapt(config, refused))
    return _without_parts([known[n] for n in chosen]), {**left, **refused}


def _confined(backbone: nn.Module, config: LoRAConfig, chosen: list[str], problems: list[str]) -> list[str]:
    """Those of the chosen targets that lie in the part of the detector that `detector_part` names."""
    if config.detector_part is None:
        auto = config.target_modules == "auto" and is_convolutional(backbone)
        return within_part(backbone, "neck", chosen) if auto else chosen
    if not detectors(backbone):
        problems.append(
            f"detector_part={config.detector_part!r}: {type(backbone).__name__} is no detector: no backbone "
            "stands beside an RPN, a head with anchors, or a decoder. Give detector_part=null; "
            "target_modules chooses the layers."
        )
    return within_part(backbone, config.detector_part, chosen)


def _without_parts(chosen: list[Target]) -> list[Target]:
    """A part of a weight goes when the whole is chosen too, by a glob for example."""
    whole = {(t.module, t.slot.parameter) for t in chosen if not t.slot.part}
    return [t for t in chosen if not t.slot.part or (t.module, t.slot.parameter) not in whole]


def _impossible(backbone: nn.Module, config: LoRAConfig, chosen: list[Target], heads: list[str]) -> list[str]:
    """Options that some of the chosen layers cannot have."""
    problems = []
    by_weight = [t.name for t in chosen if not t.family.has_branch or _read_by_parent(backbone, t.module)]
    if config.dropout and by_weight:
        problems.append(
            f"dropout={config.dropout}: {truncate_list(by_weight)} are read by their weights, where "
            "dropout cannot act: set dropout to 0, or name them in exclude_modules."
        )
    transposed = [t.name for t in chosen if t.slot.transposed]
    if config.use_dora and transposed:
        problems.append(
            f"use_dora=True: {truncate_list(transposed)} have weights of (in, out), whose outputs have no "
            "norm of their own: set use_dora to false, or name them in exclude_modules."
        )
    in_heads = {id(p): n for n, p in named_parameters(backbone, all_names=True).items() if inside(n, heads)}
    tied = {
        t.name: in_heads[id(p)]
        for t in chosen
        if (p := submodule(backbone, t.module)._parameters.get(t.slot.parameter)) is not None
        and id(p) in in_heads
    }
    for name, head in tied.items():
        problems.append(
            f"target_modules: the weight of {name} is tied to {head}, which trains in full: "
            "name it in exclude_modules, or leave the head out of modules_to_save."
        )
    return problems


def _read_by_parent(backbone: nn.Module, module: str) -> bool:
    """nn.MultiheadAttention never calls its output projection."""
    return isinstance(submodule(backbone, module.rpartition(".")[0]), nn.MultiheadAttention)


def _nothing_to_adapt(config: LoRAConfig, refused: Mapping[str, str]) -> str:
    found = f" Found but not supported: {summary(refused)}." if refused else ""
    excluded = f" after exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
    return (
        f"target_modules={config.target_modules!r} leaves no layer to adapt{excluded}: name "
        f"linear, convolution, embedding or recurrent layers, or attention, outside the head.{found}"
    )
