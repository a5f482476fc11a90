"""One `key=value` set in a composed configuration as Hydra will, or why it cannot, with what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.app.signatures import takes
from lora_lightning.errors import did_you_mean, nearest
from lora_lightning.utils.peft_names import peft_problem


def apply_override(loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> list[str]:
    """Set one value in `config` just as Hydra will, or say why it cannot."""
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
        return []
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        key, word = override.key_or_group, str(override.input_line)
        exists = _exists(config, key)
        if override.package is not None:
            return [f"{word}: {key} is not a group.{did_you_mean(key, loader.list_groups(''))}"]
        if override.type == OverrideType.ADD and exists:
            return [f"{word}: is set already; leave out the plus: {word[1:]}."]
        if exists:
            reason = str(error.__cause__ or error).splitlines()[0]
            return [f"{word}: {reason}"]
        section, _, name = key.rpartition(".")
        if section in ("", "lora") and (problem := peft_problem(name, override.value(), "lora.")):
            return [problem]
        return [f"{word}: {_unknown(loader, config, key)}"]


def _exists(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node


def _unknown(loader: ConfigLoaderImpl, config: DictConfig, key: str) -> str:
    """`there is no such option`, with what may have been meant."""
    parent, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent) if parent else None
    if isinstance(node, DictConfig):
        names = [str(k) for k in node if k != "_target_"]
        near = [f"{parent}.{n}" for n in nearest(name, names)]
        target = node.get("_target_")
        if isinstance(target, str) and takes(target, name):
            return f"is not set in this configuration; add it with a plus: +{key}=VALUE."
        tail = f" Options of {parent}: {', '.join(names)}."
        if isinstance(target, str) and takes(target, None):
            tail += f" What the model takes beyond these: +{key}=VALUE."
    else:
        inside = OmegaConf.create({"hydra": config.hydra}) if key.startswith("hydra.") else config
        options = list(leaves(inside))
        same = [leaf for leaf in options if leaf.rpartition(".")[2] == name]
        groups = [g for g in loader.list_groups("") if g != "hydra"]
        near = same or nearest(key, [*options, *groups])
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
