"""The terms R of the objective L + λ·R that the weights of an adapted model tell; `outputs`, which needs
batches, is the Trainer's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_lightning.adapters.state import extra_tensors, state_of
from lora_lightning.errors import ConfigError
from lora_lightning.layers.registry import lora_layers
from lora_lightning.methods.regularizers import TERMS, alike, of_updates, of_values


def regularization(model: nn.Module) -> Tensor:
    """λ·R of the selected adapter's configuration, to be added to the loss in a training loop of your own.
    In a Trainer `LoRACallback` adds it.

    Args:
        model: the module that was given to `inject`.

    Returns:
        A number with its gradient.

    Raises:
        UserError: the model is not adapted.
        ConfigError: the configuration has no regularizer, has `outputs`, which only the callback knows, or
            one of what does not train.
    """
    weights = state_of(model).config.regularizer
    if not weights or "outputs" in weights:
        what = "LoRACallback alone can add how far the outputs move" if weights else "it has no terms"
        raise ConfigError(
            [f"regularizer={weights}: {what}; give terms of the weights: {', '.join(OF_WEIGHTS)}."]
        )
    terms = WeightTerms(model, weights)()
    return sum(weight * terms[name] for name, weight in weights.items())  # type: ignore[return-value]  # not empty


OF_WEIGHTS = (*TERMS, "heads")


class WeightTerms:
    """Gives the terms of these names for the selected adapters, as often as they are asked for. What they are
    made of is looked up again when another adapter was selected.

    Args:
        model: the module that was given to `inject`.
        names: of `OF_WEIGHTS`; others are left alone.

    Raises:
        ConfigError: nothing trains of which a term speaks.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.names = [name for name in names if name in TERMS]
        self.heads = "heads" in names
        self._look()

    def __call__(self) -> dict[str, Tensor]:
        choice = state_of(self.model).choice
        if self._seen != (choice, choice.version):
            self._look()
        terms = of_updates(self._kinds, self.names) if self.names else {}
        return {**terms, "heads": of_values(*self._own)} if self.heads else terms

    def _look(self) -> None:
        state = state_of(self.model)
        layers = lora_layers(self.model).values()
        updates = [u for layer in layers for adapter in layer.lora_active for u in layer.updates(adapter)]
        updates = [u for u in updates if u.lora_A.requires_grad or u.lora_B.requires_grad]
        own = extra_tensors(self.model, state.adapters[state.adapter].extra_trainables)
        trained = {n: t for n, t in own.items() if isinstance(t, nn.Parameter) and n in state.originals}
        originals = [state.originals[n].to(t.device, t.dtype) for n, t in trained.items()]
        self._seen, self._kinds = (state.choice, state.choice.version), alike(updates)
        self._own = list(trained.values()), originals
        if self.names and not updates:
            raise ConfigError([f"regularizer.{self.names[0]}: A and B of no update train; leave it out."])
        if self.heads and not trained:
            raise ConfigError([
                "regularizer.heads: no head, norm or bias inside the backbone trains in full; leave it out."
            ])  # fmt: skip
