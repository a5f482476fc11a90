"""What a configuration names, built: data and model together, and the options that are classes of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.methods import OF_UPDATES, RANKED, SCALED
from lora_lightning.app.signatures import lacking, provided
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.ranks import on_rank_zero

APPLICATIONS = ("quantize", "spectra")  # options of the group `lora` that are no LoRAConfig's


def lora_config(config: DictConfig) -> LoRAConfig:
    """The group `lora` as LoRAConfig."""
    options = plain(config.lora)
    return LoRAConfig(**{k: v for k, v in options.items() if k not in APPLICATIONS})


def optim_config(config: DictConfig) -> OptimConfig:
    """The group `optim` as OptimConfig, of a method without updates without what is for updates alone."""
    options = {name: value for name, value in plain(config.optim).items() if name != "rate_scale"}
    if config.method not in RANKED:
        options = {name: value for name, value in options.items() if name not in OF_UPDATES}
        options["name"] = "adamw" if options["name"] == SCALED else options["name"]
    return OptimConfig(**options, schedule=plain(config.schedule))


def compared_config(config: DictConfig, method: str, folder: str | Path) -> DictConfig:
    """The configuration of a method that the run's own is compared with: the same but for its rate, which is
    that of `rates`, as `optim.lr` and `optim.head_lr` are those of the run's own."""
    other = config.copy()
    other.method, other.compare, other.run_dir = method, [], str(folder)
    other.optim.lr = config.rates[method] * config.optim.get("rate_scale", 1)
    other.optim.head_lr = None
    return other


def rate_of(config: DictConfig, lr: float) -> float:
    """The value of `rates`, which are AdamW's, by which a compared method trains at `lr`."""
    return float(f"{lr / config.optim.get('rate_scale', 1):.12g}")


def plain(node: DictConfig) -> dict[str, Any]:
    """A node's values, resolved."""
    values: Any = OmegaConf.to_container(node, resolve=True)
    return dict(values)


@contextlib.contextmanager
def named(group: str) -> Iterator[None]:
    """Problems of one group's classes under the names that they have on the command line."""
    try:
        yield
    except (UserError, InstantiationException) as error:
        cause = error if isinstance(error, UserError) else error.__cause__
        if isinstance(cause, ConfigError):
            raise ConfigError([under(group, problem) for problem in cause.problems]) from None
        if isinstance(cause, UserError):
            raise UserError(under(group, str(cause))) from None
        raise


def under(group: str, problem: str) -> str:
    """A problem that begins with an option's name, with the group before it, also where it comes again."""
    if not (option := re.match(r"(\w+)[=:\[]", problem)):
        return problem
    again = re.sub(rf"(?<=[ ,;]){option[1]}=", f"{group}.{option[1]}=", problem)
    return f"{group}.{again}"


def data_and_model(config: DictConfig) -> tuple[Any, Any]:
    """Built together, so that whatever is wrong or missing is named in one message."""
    errors: list[UserError] = []
    data: Any = None
    model = None
    try:
        with named("data"):
            data = instantiate(config.data, _convert_="all")
            if on_rank_zero():
                data.prepare_data()
    except UserError as error:
        errors.append(error)
    facts: dict[str, Any] = {}
    try:
        with named("data"):
            facts = provided(data, config.model)
    except UserError as error:
        errors = errors or [error]  # what could not be prepared cannot be asked either, for the same reason
    try:
        with named("model"):
            if not (errors and lacking(config.model, facts)):
                model = instantiate(config.model, **facts, _convert_="all")
    except UserError as error:
        errors.append(error)
    problems = [problem for e in errors if isinstance(e, ConfigError) for problem in e.problems]
    if problems and all(isinstance(e, ConfigError) for e in errors):
        raise ConfigError(problems)
    if errors:
        raise UserError("\n\n".join(map(str, errors)))
    return data, model
