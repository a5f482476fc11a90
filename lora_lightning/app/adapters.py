"""The option `adapters`: several adapters in one run, each trained by itself with options of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.utils.marks import show


def names_of(config: DictConfig) -> list[str]:
    """The adapters to train; one that is null is left out."""
    return [name for name, options in (config.get("adapters") or {}).items() if options is not None]


def config_of(config: DictConfig, name: str) -> DictConfig:
    """The configuration that trains one of the adapters, in a folder of its own."""
    one = config.copy()
    OmegaConf.set_struct(one, False)
    one.merge_with(config.adapters[name])
    one.run_dir = str(Path(config.run_dir) / name)
    one.adapters = None
    return one


def adapters_problems(adapters: Any) -> list[str]:
    """What is wrong with the option itself; each one's own configuration is checked as any other."""
    if adapters is None:
        return []
    if not isinstance(adapters, Mapping) or not adapters:
        return [
            f"adapters={show(adapters)}: give a mapping such as {{scottish: {{data: {{accent: scottish}}}}}}."
        ]
    names = [f"adapters.{n}: give a name of letters, digits and _." for n in adapters if not n.isidentifier()]
    values = [
        f"adapters.{name}={show(options)}: give options as a mapping, such as {{data: {{accent: scottish}}}}."
        for name, options in adapters.items()
        if not isinstance(options, (Mapping, type(None)))
    ]
    return names + values
