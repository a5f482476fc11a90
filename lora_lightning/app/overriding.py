"""One `key=value` set in a composed configuration as Hydra will, or why it cannot, with what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.app.compose import Configurations
from lora_lightning.app.options import options_in
from lora_lightning.app.signatures import takes
from lora_lightning.errors import did_you_mean, nearest
from lora_lightning.utils.marks import show
from lora_lightning.utils.peft_names import peft_problem


def apply_override(known: Configurations, config: DictConfig, override: Override) -> list[str]:
    """Set one value in `config` just as Hydra will, or say why it cannot."""
    try:
        _set(config, override)
        return []
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        key, word = override.key_or_group, str(override.input_line)
        exists = _exists(config, key)
        if override.package is not None:
            return [
                f"{word}: {key} is not a group.{did_you_mean(key, known.groups())} "
                f"Leave out @{override.package}, which is of groups alone."
            ]
        if override.type == OverrideType.ADD and exists:
            return [f"{word}: is set already; leave out the plus: {word[1:]}."]
        if exists:
            return _strays(known, config, override) or [f"{word}: {str(error).splitlines()[0]}"]
        section, _, name = key.rpartition(".")
        if section in ("", "lora") and (problem := peft_problem(name, override.value(), "lora.")):
            return [problem]
        return [f"{word}: {_unknown(known, config, key)}"]


def with_plus(config: DictConfig, overrides: Sequence[Override]) -> list[Override]:
    """These overrides, with the plus that Hydra wants for what no file sets where the class of the section
    declares the option.

    Args:
        config: composed of the groups among them.
    """
    given = {o.key_or_group: o.value() for o in overrides if o.key_or_group.endswith("._target_")}
    return [_declared(config, o, given) for o in overrides]


def _declared(config: DictConfig, override: Override, given: Mapping[str, Any]) -> Override:
    section, _, name = override.key_or_group.rpartition(".")
    if override.type != OverrideType.CHANGE or not section or _exists(config, override.key_or_group):
        return override
    node = OmegaConf.select(config, section)
    target = given.get(f"{section}._target_", node.get("_target_") if isinstance(node, DictConfig) else None)
    if name not in options_in(section, target):
        return override
    return OverridesParser.create().parse_override(f"++{override.input_line}")


def _set(config: DictConfig, override: Override) -> None:
    """Hydra's own, which applies a value to what is composed already, is not public."""
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise ValueError("not a group")
    if override.is_delete():
        _delete(config, key, value)
        return
    merges = isinstance(value, (dict, list))
    if override.is_add() and not merges and OmegaConf.select(config, key) is not None:
        raise ValueError("is set already")
    OmegaConf.update(config, key, value, merge=True, force_add=override.is_add() or override.is_force_add())


def _strays(known: Configurations, config: DictConfig, override: Override) -> list[str]:
    """One line for each name in a mapping that is not in the one that stands; the others are set."""
    key, value = override.key_or_group, override.value()
    node = OmegaConf.select(config, key)
    if not isinstance(value, dict) or not isinstance(node, DictConfig):
        return []
    strays = [name for name in value if name not in node]
    OmegaConf.update(config, key, {n: v for n, v in value.items() if n not in strays}, merge=True)
    return [
        f"{key}.{name}={show(value[name])}: {_unknown(known, config, f'{key}.{name}')}" for name in strays
    ]


def _delete(config: DictConfig, key: str, value: Any) -> None:
    held = OmegaConf.select(config, key)
    if held is None:
        raise ValueError("does not exist")
    if value is not None and value != held:
        raise ValueError(f"is {held}, not {value}")
    parent, _, name = key.rpartition(".")
    with open_dict(config):
        del (OmegaConf.select(config, parent) if parent else config)[name]


def _exists(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node


def _unknown(known: Configurations, config: DictConfig, key: str) -> str:
    """`there is no such option`, with what may have been meant."""
    parent, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent) if parent else None
    if isinstance(node, DictConfig):
        target = node.get("_target_")
        names = list(dict.fromkeys([*(str(k) for k in node if k != "_target_"), *options_in(parent, target)]))
        near = [f"{parent}.{n}" for n in nearest(name, names)]
        if isinstance(target, str) and takes(target, name):
            return f"is not set in this configuration; add it with a plus: +{key}=VALUE."
        tail = f" Options of {parent}: {', '.join(names)}."
        if isinstance(target, str) and takes(target, None):
            tail += f" What the model takes beyond these: +{key}=VALUE."
    else:
        inside = OmegaConf.create({"hydra": config.hydra}) if key.startswith("hydra.") else config
        options = list(leaves(inside))
        same = [leaf for leaf in options if leaf.rpartition(".")[2] == name]
        near = same or nearest(key, [*options, *known.groups()])
        if not near:
            ends = {leaf.rpartition(".")[2]: leaf for leaf in options}
            near = [ends[n] for n in nearest(name, ends)]
        tail = "" if near else " `--help` lists all."
    hint = f" Did you mean {' or '.join(repr(n) for n in near[:3])}?" if near else ""
    return f"there is no such option.{hint}{tail}"


def leaves(node: DictConfig, path: str = "") -> Iterator[str]:
    """The dotted names of a configuration's values, as they are written on a command line."""
    for key, value in node.items_ex(resolve=False):
        here = f"{path}.{key!s}" if path else str(key)
        if (here == "hydra" and len(node) > 1) or str(key).startswith("_"):
            continue
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from leaves(value, here)
        else:
            yield here
