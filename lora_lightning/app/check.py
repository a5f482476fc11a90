"""The check of a composed configuration: every problem, each one line, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.app.adapters import adapters_problems, config_of, names_of
from lora_lightning.app.compress_options import CHECKS, compress_problems
from lora_lightning.app.export_options import CHECKS as EXPORT
from lora_lightning.app.export_options import export_problems
from lora_lightning.app.logger_packages import missing_packages
from lora_lightning.app.matching import mismatches
from lora_lightning.app.methods import METHODS, method_problems
from lora_lightning.app.options import OPTIONAL, OWN, PROVIDED, REQUIRED, RULES, STRATEGIES, devices_of
from lora_lightning.app.resume import epochs_done
from lora_lightning.app.search_space import SEARCH, search_problems
from lora_lightning.app.signatures import (
    RESERVED,
    argument_problems,
    declared_problems,
    import_problem,
)
from lora_lightning.app.user_modules import import_remedy
from lora_lightning.errors import AdapterFileError, ConfigError, did_you_mean
from lora_lightning.utils.libraries import load_lightning
from lora_lightning.utils.marks import show

LAST = "last"
CLUSTER = ("SLURM_NTASKS", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR")


def problems_of(config: DictConfig) -> list[str]:
    """Every problem of a configuration (without its `hydra` node).

    The application's own options by their table, LoRA's and the optimizer's by their classes, those of every
    `_target_` by what its source declares, the resume checkpoint, and what does not go together.
    """
    problems: list[str] = []
    values = _resolved(_with_rate(config), "", problems)
    references = set(_references(config, ""))
    known = sorted({path.split(".")[0] for path in RULES} | {*REQUIRED, *OPTIONAL})
    problems += [
        f"{name}={show(value)}: there is no such option.{did_you_mean(name, known)} "
        f"Options: {', '.join(known)}."
        for name, value in values.items()
        if name not in known
    ]
    for section in (*REQUIRED, *OPTIONAL):
        value = values.get(section)
        if not isinstance(value, dict) and not (value is None and section in OPTIONAL):
            mapping = {
                "rates": "methods",
                "tuning": "points, factor, most, fraction",
                "compress": ", ".join(CHECKS),
                "export": ", ".join(EXPORT),
                "speedups": "channels_last, compile, gradient_checkpointing",
            }
            inside = mapping.get(section)
            what = f"a mapping of {inside}" if inside else f"{section}=NAME; --help lists them"
            problems.append(f"{section}={show(value)}: give {what}.")
    for path, rule in RULES.items():
        if path not in references:
            problems += [p for value in _at(values, path) for p in rule.problems(path, value, show)]
    problems += _strays(values.get("rates"), "rates", tuple(METHODS))
    problems += _strays(values.get("tuning"), "tuning", ("points", "factor", "most", "fraction"))
    for section, own in OWN.items():
        if isinstance(node := values.get(section), dict):
            provided = PROVIDED.get(section, {})
            problems += [
                f"{section}.{n}: is set by the application: leave it out; {provided[n]}."
                for n in node
                if n in provided
            ]
            beside = [n for n in node if n in RESERVED or n in provided or f"{section}.{n}" in RULES]
            beside += [n for n in node if f"{section}.{n}" in references]  # checked where they point
            options = {name: value for name, value in node.items() if name not in beside}
            problems += own.problems(options, f"{section}.")
    for path, node in _targets(values, ""):
        problems += argument_problems(path, node, references)
    problems += _strays(values.get("compress"), "compress", tuple(CHECKS))
    problems += compress_problems(values.get("compress"))
    problems += _strays(values.get("export"), "export", tuple(EXPORT))
    problems += export_problems(values)
    problems += mismatches(values)
    problems += _trainer_problems(_section(values, "trainer"))
    problems += method_problems(values)
    problems += missing_packages(_section(values, "logger"))
    if isinstance(checkpoint := values.get("ckpt_path"), str) and checkpoint != LAST:
        problems += checkpoint_problems(checkpoint, _section(values, "trainer").get("max_epochs"))
    if isinstance(search := values.get("search"), dict):
        problems += _strays(search, "search", SEARCH) + search_problems(config, values, problems_of)
    if adapters := values.get("adapters"):
        problems += adapters_problems(adapters) or [
            problem if problem in problems else f"adapters.{name}: {problem}"
            for name in names_of(config)
            for problem in _adapter_problems(config, name)
        ]
    return list(dict.fromkeys(problems))


def _with_rate(config: DictConfig) -> DictConfig:
    """The same, with some rate where that would follow from a method that there is not, which is told."""
    plain: Any = OmegaConf.to_container(config, resolve=False)  # it may refer to what is not there
    method = plain.get("method")
    optim = OmegaConf.select(config, "optim", throw_on_resolution_failure=False)
    known = isinstance(method, str) and method in METHODS
    if known or not isinstance(optim, DictConfig) or not OmegaConf.is_interpolation(optim, "lr"):
        return config
    config = config.copy()
    config.optim.lr = 1.0
    return config


def _adapter_problems(config: DictConfig, name: str) -> list[str]:
    try:
        return problems_of(config_of(config, name))
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # a list where a group is, and the like
        reason = str(error).splitlines()[0]
        return [
            f"these options do not go into the configuration: {reason}. "
            "Give a value where it has a value, KEY.KEY=VALUE where it has a group."
        ]


def unimportable(config: DictConfig) -> list[str]:
    """The callables of a sound configuration that cannot be imported, and what only the imported ones can say
    is wrong with their options; loads all that the run will need.

    Raises:
        LibraryError: a library does not load beside torch.
    """
    load_lightning()
    values, references = _resolved(config, "", []), set(_references(config, ""))
    problems = []
    for path, node in _targets(values, ""):
        if reason := import_problem(node["_target_"]):
            remedy = import_remedy(node["_target_"])
            problems.append(f"{path}._target_={node['_target_']}: cannot be imported: {reason}{remedy}")
        else:
            problems += declared_problems(path, node, references)
    return problems


def last_checkpoint(folder: Path, max_epochs: Any = None) -> str | None:
    """What `ckpt_path=last` means: the run's own last checkpoint, or none, when it has just begun. One with
    every epoch behind it is left to be tested.

    Raises:
        ConfigError: the Trainer cannot resume from it.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if not path.exists():
        return None
    if problems := checkpoint_problems(str(path), max_epochs, trained=True):
        raise ConfigError(problems)
    return str(path)


def checkpoint_problems(path: str, max_epochs: Any = None, trained: bool = False) -> list[str]:
    """Why a Trainer cannot resume from this file, if it cannot; nothing in it is executed.

    Args:
        trained: one with just `max_epochs` behind it will do.
    """
    file = Path(path).absolute()
    given = f"ckpt_path={path}"
    # DeepSpeed's, which it checks itself; with a .metadata beside, FSDP would unpickle that.
    if (file / "checkpoint").is_dir() and not (file / ".metadata").exists():
        return []
    from lora_lightning.files.checkpoint_read import read_checkpoint  # with it torch

    remedy = (
        "Give a Trainer checkpoint, such as checkpoints/last.ckpt; weights of a base model go into "
        "model.checkpoint."
    )
    try:
        state = read_checkpoint(file, remedy)
    except AdapterFileError as error:
        return [f"{given}: {error}"]
    if "optimizer_states" not in state:
        return [
            f"{given}: holds weights only, without the optimizer: it cannot be resumed. "
            "Give one of a checkpoint callback with save_weights_only=false."
        ]
    done = epochs_done(state)
    if isinstance(max_epochs, int) and 0 < max_epochs < done + (not trained):
        return [f"{given}: has all {done} epochs behind it; give trainer.max_epochs above {done}."]
    return []


def _resolved(node: DictConfig, path: str, problems: list[str]) -> dict[str, Any]:
    """Plain values; each interpolation that leads nowhere is a problem and left out."""
    values: dict[str, Any] = {}
    for key in node:
        here = _join(path, key)
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{here}: {str(error).splitlines()[0]}")
            continue
        if isinstance(value, DictConfig):
            value = _resolved(value, here, problems)
        elif isinstance(value, ListConfig):
            try:
                value = [v if not isinstance(v, (DictConfig, ListConfig)) else str(v) for v in value]
            except OmegaConfBaseException as error:
                problems.append(f"{here}: {str(error).splitlines()[0]}")
                continue
        values[str(key)] = value
    return values


def _join(path: str, key: Any) -> str:
    return f"{path}.{key!s}" if path else str(key)


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _at(values: Mapping[str, Any], path: str) -> list[Any]:
    """The value at a dotted path as a list of one, or nothing where there is none."""
    node: Any = values
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return []
        node = node[part]
    return [node]


def _references(node: DictConfig, path: str) -> Iterator[str]:
    """The options whose values are those of others, as data.seed is `${seed}`: they are checked there."""
    for key in map(str, node):
        here = _join(path, key)
        if OmegaConf.is_interpolation(node, key):
            yield here
        elif not OmegaConf.is_missing(node, key) and isinstance(value := node[key], DictConfig):
            yield from _references(value, here)


def _strays(node: Any, path: str, known: tuple[str, ...]) -> list[str]:
    if not isinstance(node, dict):
        return [] if node is None else [f"{path}={show(node)}: give a mapping of {', '.join(known)}."]
    return [
        f"{path}.{key}: there is no such option.{did_you_mean(key, known)} Options: {', '.join(known)}."
        for key in node
        if key not in known
    ]


def _targets(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in node.items():
        if isinstance(value, dict):
            here = _join(path, key)
            if "_target_" in value:
                yield here, value
            yield from _targets(value, here)


def _trainer_problems(trainer: Mapping[str, Any]) -> list[str]:
    """What this machine or Lightning cannot do, found before the Trainer is made."""
    problems = []
    accelerator, devices = trainer.get("accelerator"), devices_of(trainer.get("devices"))
    if accelerator in ("gpu", "cuda", "mps"):
        import torch

        mps = accelerator != "cuda" and torch.backends.mps.is_available()
        count = 0 if accelerator == "mps" else torch.cuda.device_count()
        if not mps and not count:
            problems.append(
                f"trainer.accelerator={accelerator}: this machine shows no such device. Give trainer=cpu,"
                " or trainer=ddp_sim for two processes."
            )
        elif count:
            wanted = (
                max(devices) + 1
                if isinstance(devices, list) and devices and all(isinstance(d, int) for d in devices)
                else devices
            )
            if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > count:
                problems.append(f"trainer.devices={show(devices)}: this machine shows {count}: give no more.")
    if accelerator == "cpu" and (isinstance(devices, list) or devices == -1):
        problems.append(f"trainer.devices={show(devices)}: a CPU has no numbers: give how many processes.")
    problems += _strategy_problems(trainer.get("strategy"), accelerator)
    nodes = trainer.get("num_nodes")
    if isinstance(nodes, int) and nodes > 1 and not any(name in os.environ for name in CLUSTER):
        problems.append(
            f"trainer.num_nodes={nodes}: the other machines are unknown here. Start with srun or torchrun,"
            " or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine."
        )
    if trainer.get("max_epochs") in (-1, None) and trainer.get("max_steps") == -1:
        problems.append(
            f"trainer.max_epochs={show(trainer.get('max_epochs'))}: the run would never end, and the learning"
            " rate falls to 0 at its end. Give trainer.max_epochs or trainer.max_steps."
        )
    return problems if trainer else []


def _strategy_problems(strategy: Any, accelerator: Any) -> list[str]:
    if isinstance(strategy, dict):
        name = str(strategy.get("_target_")).rpartition(".")[2]
        if name == "DeepSpeedStrategy" and find_spec("deepspeed") is None:
            return [f"trainer.strategy: {name} needs DeepSpeed: pip install deepspeed"]
        if accelerator == "cpu" and name in ("FSDPStrategy", "DeepSpeedStrategy"):
            return [f"trainer.strategy: {name} needs GPUs; on the CPU give trainer=ddp_sim."]
        return []
    if not isinstance(strategy, str) or strategy.lower() not in STRATEGIES:
        return [
            f"trainer.strategy={show(strategy)}: give one of {', '.join(STRATEGIES)}."
            f"{did_you_mean(strategy, STRATEGIES)}"
        ]
    strategy = strategy.lower()
    if "deepspeed" in strategy and find_spec("deepspeed") is None:
        return [f"trainer.strategy={strategy}: needs DeepSpeed: pip install deepspeed"]
    if accelerator == "cpu" and ("fsdp" in strategy or "deepspeed" in strategy):
        return [f"trainer.strategy={strategy}: needs GPUs; on the CPU give trainer=ddp_sim."]
    return []
