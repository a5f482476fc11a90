"""LoRA for nn.RNN, nn.LSTM and nn.GRU: effective weights once a forward, then the fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.slot import Slot, read_weight
from lora_lightning.layers.swap import class_of

# Order of the gates in the rows of a weight (the documentation of nn.LSTM and nn.GRU).
GATES: dict[type[nn.Module], str] = {
    nn.LSTM: "ifgo",
    nn.LSTMCell: "ifgo",
    nn.GRU: "rzn",
    nn.GRUCell: "rzn",
}


def recurrent_slots(module: nn.Module) -> dict[str, Slot]:
    """A slot for every weight of every layer and direction, `weight_ih_l0` …, and as parts of those
    one for each gate, `weight_ih_l0.f` …"""
    slots = {}
    gates = next((g for base, g in GATES.items() if isinstance(module, base)), "")
    names = getattr(module, "_flat_weights_names", ["weight_ih", "weight_hh"])
    for name in (n for n in names if n.startswith("weight")):
        slots[name] = Slot(name)
        if gates and not name.startswith("weight_hr"):
            size = read_weight(module, name).shape[0] // len(gates)
            slots.update(
                {
                    f"{name}.{g}": Slot(name, (i * size, (i + 1) * size), part=True)
                    for i, g in enumerate(gates)
                }
            )
    return slots


class LoRARecurrent(LoRALayer):
    """The base class's forward with the effective weights in its list of flat weights."""

    if TYPE_CHECKING:
        _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # on a twin: another thread may see other weights, and a history kept in an attribute cannot be copied
        twin = object.__new__(class_of(self))
        weights = [getattr(self, name) for name in self._flat_weights_names]
        twin.__dict__ = {**self.__dict__, "_flat_weights": weights}
        return self.original_class.forward(twin, *args, **kwargs)

    def _init_flat_weights(self) -> None:
        self._flat_weights = [self._parameters.get(name) for name in self._flat_weights_names]
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        """The base class would look for changed parameters; forward always takes the present ones."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._init_flat_weights()
