"""Modules while some thread or task sees them otherwise: their class then looks for its view of values and
calls. What the views are is in `views`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.layers.swap import MADE, ClassSwap, Viewed, class_of, made_class

if TYPE_CHECKING:
    from lora_lightning.layers.views import Choice, View

OWN_STATE = ("lora_choice", "lora_path")  # of an adapted layer for good, of other modules while viewed
# timm's attention keeps in eval mode what it has computed of the one, by device, as the other.
BIASES, KEPT = "attention_biases", "attention_bias_cache"


@dataclass(frozen=True, eq=False)
class Need:
    """What one view asks of one module.

    Attributes:
        names: leaf names of the values that are looked for in the view.
        called: whether the calls are, too.
    """

    names: frozenset[str] = frozenset()
    called: bool = False


class ViewedModule(Viewed):
    """Mixin of the class on top: values and calls are those of the calling thread's view, if it has one."""

    lora_choice: Choice
    lora_path: str
    need: Need

    @classmethod
    def on_top_of(cls, beneath: type[nn.Module]) -> type[nn.Module]:
        """The class for a module whose own class is `beneath`."""
        return _class_on_top(beneath, cls.need)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is the module as it stands."""
        parts: Any = super().__reduce_ex__(protocol)
        state = dict(parts[2])
        if "lora_forward" in state:
            state["forward"] = state.pop("lora_forward")
        swapped = isinstance(self, ClassSwap)
        if not (swapped and self.keeps_state):
            for name in OWN_STATE:
                del state[name]
        if swapped:
            return (*parts[:2], state, *parts[3:])
        return _settled, (self.beneath, *parts[1][1:]), state, *parts[3:]


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward without views: that of its class, or one that was put on the module itself."""
    for name in ("lora_forward", "forward"):
        if name in module.__dict__:
            return cast(Callable[..., Any], module.__dict__[name])
    return cast(Callable[..., Any], class_of(module).forward.__get__(module))


def show(view: View) -> dict[nn.Module, Need]:
    """Let the model's modules look for the view where it has something of theirs.

    Returns:
        What it asks of them, for `hide`.
    """
    modules = view.modules
    leaves: dict[str, set[str]] = {path: set() for path in view.calls}
    for name in view.values:
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, set()).add(leaf)
    for path, names in leaves.items():
        if BIASES in names and KEPT in vars(modules[path]):
            names.add("training")
    for path in view.calls:  # a branch by samples adds the bias itself
        leaves[path] |= {"bias"} & modules[path]._parameters.keys()
    needs = {modules[p]: Need(frozenset(names), p in view.calls) for p, names in leaves.items()}
    if (
        view.samples is not None
    ):  # their fused path would read the weights of parts that are called by samples
        layers = (m for m in modules.values() if isinstance(m, nn.TransformerEncoderLayer))
        needs.update({m: Need(frozenset({"training"})) for m in layers})
    paths = {module: path for path, module in modules.items()}
    with view.choice.lock:
        for module, need in needs.items():
            module.__dict__.update(lora_choice=view.choice, lora_path=paths[module])
            view.choice.needs.setdefault(module, []).append(need)
            _dress(module, view.choice)
    return needs


def hide(needs: Mapping[nn.Module, Need], choice: Choice) -> None:
    """Undo `show`."""
    with choice.lock:
        for module, need in needs.items():
            choice.needs[module].remove(need)
            _dress(module, choice)


def hide_all(choice: Choice) -> None:
    """Give every module its own class back; no thread is within a context."""
    for module, needs in list(choice.needs.items()):
        needs.clear()
        _dress(module, choice)


def _dress(module: nn.Module, choice: Choice) -> None:
    """Give the module the class that its needs ask for."""
    needs, own = choice.needs[module], class_of(module)
    if needs:
        need = needs[0]
        if len(needs) > 1:
            need = Need(frozenset().union(*(n.names for n in needs)), any(n.called for n in needs))
        module.__class__ = _class_on_top(own, need)
        if need.called and "forward" in module.__dict__:
            module.__dict__["lora_forward"] = module.__dict__["forward"]
            del module.__dict__["forward"]
        return
    del choice.needs[module]
    if "lora_forward" in module.__dict__:
        module.__dict__["forward"] = module.__dict__["lora_forward"]
        del module.__dict__["lora_forward"]
    module.__class__ = own
    if not isinstance(module, ClassSwap) or not module.keeps_state:
        for name in OWN_STATE:
            module.__dict__.pop(name, None)


def _class_on_top(beneath: type[nn.Module], need: Need) -> type[nn.Module]:
    compiles = "torch._dynamo" in sys.modules  # its import takes seconds
    key = (ViewedModule, need.names, need.called, compiles)
    made = beneath.__dict__.get(MADE, {}).get(key)  # before the rest is made for nothing
    if made is not None:
        return cast("type[nn.Module]", made)
    body: dict[str, Any] = {"__module__": beneath.__module__, "__doc__": beneath.__doc__}
    body |= {"beneath": beneath, "need": need}
    computed = beneath.properties if issubclass(beneath, ClassSwap) else ()
    body |= {name: _value(name) for name in need.names if name not in computed}
    if issubclass(beneath, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _put("_flat_weights"))
    if "training" in need.names:
        body["training"] = property(_training, _put("training"))
    if need.called:  # each new batch of samples would compile anew
        body["forward"] = torch.compiler.disable(_forward) if compiles else _forward
    return made_class(key, beneath.__name__, (ViewedModule, beneath), body)


def _settled(cls: type[nn.Module], *args: Any) -> nn.Module:
    return cls.__new__(cls, *args)


def _value(name: str) -> property:
    def read(module: Any) -> Tensor | None:
        view = module.lora_choice.view()
        if view is not None:
            path = f"{module.lora_path}.{name}" if module.lora_path else name
            if path in view.values:
                view.refuse_reading(module.lora_path)
                return view.value(path)
        places = module._parameters if name in module._parameters else module._buffers
        return cast("Tensor | None", places[name])

    return property(read)


def _put(name: str) -> Callable[[Any, Any], None]:
    def put(module: Any, value: Any) -> None:
        module.__dict__[name] = value

    return put


def _flat_weights(module: Any) -> list[Any]:
    """A recurrent module's list of its weights, as they are now."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _training(module: Any) -> bool:
    """Of nn.TransformerEncoderLayer, which takes its fused path in eval mode alone; and of attention that in
    eval mode would keep what it has computed of a view's value."""
    view = module.lora_choice.view()
    if view is not None and (
        view.samples is not None or f"{module.lora_path}.{BIASES}".lstrip(".") in view.values
    ):
        return True
    return cast(bool, module.__dict__["training"])


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    view = module.lora_choice.view()
    call = None if view is None or view.samples is None else view.calls.get(module.lora_path)
    return (call or own_forward(module))(*args, **kwargs)
