"""`fold_norms`: every adapted convolution is told the frozen norm behind it, whose work its weight may do."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.adapters.state import AdapterState
from lora_lightning.layers.conv import LoRAConv
from lora_lightning.layers.folding import NormBehind
from lora_lightning.layers.norm import FrozenAffine, FrozenNorm, is_foldable
from lora_lightning.layers.registry import lora_layers
from lora_lightning.layers.swap import swap_class
from lora_lightning.planning.norms_behind import norms_behind
from lora_lightning.utils.names import named_modules
from lora_lightning.utils.tables import truncate_list

LOST = (
    "fold_norms=True: what {conv} computed did not reach {norm}, which stands behind it in the forward of "
    "the module that calls both: call that module, or set fold_norms to false."
)


def fold_norms(model: nn.Module, state: AdapterState) -> None:
    """Tell the convolutions what the first selected adapter's configuration asks for; where that is nothing,
    nothing is folded. The first time a line in the log says which norms are not."""
    convs = {n: layer for n, layer in lora_layers(model).items() if isinstance(layer, LoRAConv)}
    for conv in convs.values():
        conv.lora_norm = None
    if not state.config.fold_norms:
        return
    modules = named_modules(model)
    if state.norms_behind is None:
        state.norms_behind, failures = norms_behind(model)
        folded = {norm for conv, norm in state.norms_behind.items() if conv in convs}
        rank_zero_info(_summary([n for n, m in modules.items() if is_foldable(m)], folded, failures))
    for name, norm in state.norms_behind.items():
        if name not in convs or norm not in modules:
            continue
        if not isinstance(modules[norm], FrozenNorm):
            state.training.setdefault(norm, modules[norm].training)
            swap_class(modules[norm], FrozenAffine)
        convs[name].lora_norm = NormBehind(modules[norm], LOST.format(conv=name, norm=norm))


def _summary(norms: list[str], folded: set[str], failures: dict[str, str]) -> str:
    """Which of the norms are not folded, and why where that is known."""
    text = f"fold_norms: {len(folded)} of {len(norms)} frozen norms are folded into the convolutions before."
    if rest := [name for name in norms if name not in folded]:
        text += f" Behind no adapted convolution alone: {truncate_list(rest)}."
    for name, why in list(failures.items())[:1]:
        others = f" Nor can {len(failures) - 1} others." if len(failures) > 1 else ""
        text += f" The forward of {name or 'the model'} cannot be traced ({why}).{others}"
    return text
