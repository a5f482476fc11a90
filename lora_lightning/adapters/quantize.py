"""quantize: the frozen weights of a model's linear layers in 8 or 4 bits, as in QLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from torch import nn

from lora_lightning.adapters.state import is_injected
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.kernels.quantized_tensor import QUANTIZERS, QuantizedTensor
from lora_lightning.planning.heads import find_heads, holds
from lora_lightning.planning.patterns import matching
from lora_lightning.planning.structure import targets_of
from lora_lightning.planning.targets import find_backbone, inside_backbone
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import one_of
from lora_lightning.utils.names import inside, joined, named_modules, named_parameters, submodule
from lora_lightning.utils.progress import working
from lora_lightning.utils.sharding import FIRST, refuse_sharded


def quantize(
    model: nn.Module,
    kind: Annotated[str, one_of(*QUANTIZERS)],
    exclude_modules: str | list[str] | None = None,
) -> list[str]:
    """Keep the weights of the model's linear layers in 8 or 4 bits, in place, and freeze them; adapt it
    afterwards. Its modules and its names stay, and everything reads the weights as before, rounded.

    The head is left alone, as are layers whose weight another kind of layer shares (an embedding), and what
    lies outside the backbone (`LoRAConfig.backbone`). A quarter or an eighth of the memory of float32 is
    taken: 1 byte an entry and 4 a row, or half a byte and 4 for each 64 entries. See `QuantizedTensor`.

    Args:
        model: on the CPU or a GPU; with its pretrained weights.
        kind: "int8", or "nf4", which needs bitsandbytes.
        exclude_modules: layers to leave alone, those of `modules_to_save` for example: a list of suffixes or
            globs, or a regular expression.

    Returns:
        The names of the modules whose weights are quantized.

    Raises:
        ConfigError: another kind, a pattern that matches nothing, or no layer is left; nothing is changed.
        UserError: the model is adapted or sharded, has no memory yet, or bitsandbytes is not installed.

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> quantize(model, "int8")
        ['0']
    """
    refuse_sharded(model, "quantize", FIRST)
    if is_injected(model):
        raise UserError("the model is adapted already: call quantize before inject or the Trainer's fit.")
    require(quantize, locals())
    backbone = find_backbone(model, LoRAConfig())
    found = {n: p for n, p in _linear_weights(model).items() if inside_backbone(n, backbone)}
    problems: list[str] = []
    alone = [joined(backbone, head) for head in find_heads(submodule(model, backbone))]
    if exclude_modules is not None:
        names = {n: None for n, m in named_modules(model).items() if n and holds(m)}
        alone += matching("exclude_modules", exclude_modules, names, problems)
    elsewhere = {
        id(p)
        for n, p in named_parameters(model, all_names=True).items()
        if n not in found or inside(n, alone)
    }
    weights = {n: p for n, p in found.items() if id(p) not in elsewhere}
    if not weights and not problems:
        problems.append(f"quantize={kind!r}: the model has no linear layer left but its head: leave it out.")
    if problems:
        raise ConfigError(problems)
    if meta := [n for n, p in weights.items() if p.is_meta]:
        raise UserError(f"{meta[0]} has no memory yet (meta device): load the weights first.")
    quantize_as(model, dict.fromkeys(weights, kind))
    return [name.rpartition(".")[0] for name in weights]


def quantize_as(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Quantize the parameters of these names, those that the model has, each in its kind; a shared one once.

    Raises:
        UserError: bitsandbytes is not installed; nothing is changed.
    """
    found = named_parameters(model, all_names=True)
    rounded: dict[int, nn.Parameter] = {}
    kinds = {name: kind for name, kind in kinds.items() if name in found}
    for name, kind in working(kinds.items(), "quantizing", "weights"):
        if id(found[name]) not in rounded:
            made = QuantizedTensor.of(found[name], kind)
            rounded[id(found[name])] = nn.Parameter(made, requires_grad=False)
    for name in kinds:
        module, _, leaf = name.rpartition(".")
        submodule(model, module)._parameters[leaf] = rounded[id(found[name])]


def summary(model: nn.Module) -> str:
    """`frozen in nf4: 48 weights, 11.9 MB instead of 84.9`, of their own dtype; "" where there are none."""
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    if not weights:
        return ""
    kept = sum(w.codes.nbytes + w.scales.nbytes for w in weights) / 1e6
    whole = sum(w.nbytes for w in weights) / 1e6
    kinds = ", ".join(dict.fromkeys(w.kind for w in weights))
    return f"frozen in {kinds}: {len(weights)} weights, {kept:.3g} MB instead of {whole:.3g}"


def _linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of linear layers by name; a shared one by each of its names."""
    weights = {}
    for target in targets_of(model)[0].values():
        parameters = submodule(model, target.module)._parameters
        weight = parameters.get(target.slot.parameter)
        if target.kind == "linear" and weight is not None and not isinstance(weight, QuantizedTensor):
            weights[joined(target.module, target.slot.parameter)] = weight
    return weights
