"""What a run writes down of itself for its page: how it was begun, where, with what, and what changed."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from lora_lightning.adapters.spectra import spectra_now
from lora_lightning.adapters.state import is_injected, state_of
from lora_lightning.app.methods import METHODS, compared
from lora_lightning.app.recipe_file import RecipeFile
from lora_lightning.app.recipe_text import description
from lora_lightning.app.results import Result, results_rows
from lora_lightning.errors import AdapterFileError
from lora_lightning.planning.heads import find_heads
from lora_lightning.planning.plan import Plan, summary
from lora_lightning.report.layers import HEAD, NORM_OR_BIAS, WEIGHT
from lora_lightning.report.left import FACTS, UPDATES
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.copying import Before
from lora_lightning.utils.mapping_file import read_text
from lora_lightning.utils.plurals import counted

LIBRARIES = (  # whose versions are told, of those that are loaded
    "torch", "lightning", "timm", "torchvision", "torchaudio", "transformers", "peft", "bitsandbytes",
)  # fmt: skip
OF_THE_PLACE = ("hydra.run.dir=", "hydra.mode=", "ckpt_path=last")  # words that say where or how it goes on
WORDS = ("domain", "accent", "name", "source")  # options of data modules that say which data they are


@dataclass
class Facts:
    """What is known of a run, kept in `report/run.json` of its folder from its beginning on."""

    folder: Path
    known: dict[str, Any]
    clock: float

    @classmethod
    def begin(cls, config: DictConfig, folder: Path, adapter: str = "", goes_on: bool = False) -> Facts:
        """Write what is known when a run begins."""
        context = HydraConfig.get()
        known: dict[str, Any] = {
            "recipe": str(context.runtime.choices.get("recipe")),
            "about": _about(),
            "adapter": adapter,
            "command": command(),
            "started": time.strftime("%Y-%m-%d %H:%M"),
            "goes_on": goes_on,
            "model": _named(config.model),
            "data": _data(config.data),
            "versions": versions(),
            "labels": [
                {"method": m, "label": METHODS[m].label} for m in compared(config.method, config.compare)
            ],
        }
        facts = cls(folder, known, time.monotonic())
        facts.save()
        return facts

    def add(self, **found: Any) -> None:
        """Write down more."""
        self.known |= found
        self.save()

    def planned(self, plan: Plan | None, trained: int, total: int) -> None:
        """Write down what trains."""
        self.add(trained=trained, total=total, plan=None if plan is None else _plan(plan))

    def end(self, results: Sequence[Result], task: Any, device: str) -> None:
        """Write down what came of it."""
        header, rows = results_rows(results, task.scores)
        if hasattr(task, "before") and not any(r.method == "none" for r in results):
            self.add(before=task.before())
        self.ended()
        self.add(
            device=device,
            versions=versions(),  # more are loaded by now
            scores=[score._asdict() for score in task.scores],
            labels=[{"method": r.method, "label": r.label} for r in results],
            table={"header": list(header), "rows": [list(row) for row in rows]},
        )

    def ended(self) -> None:
        """Write down that all is done."""
        self.add(seconds=None if self.known["goes_on"] else round(time.monotonic() - self.clock, 1))

    def save(self) -> None:
        write_json(self.folder / FACTS, self.known)


def write_json(path: Path, value: Any) -> None:
    """Plain values, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


def command() -> str:
    """The command line that makes this run, or this job of a sweep, anew; as one types it."""
    hydra: Any = HydraConfig.get()
    words = [w for w in (*hydra.overrides.task, *hydra.overrides.hydra) if not w.startswith(OF_THE_PLACE)]
    words = [w for w in words if not w.lstrip("+").startswith("hydra.sweep")]
    return " ".join(["lora-lightning train", *map(shlex.quote, words)])


def versions() -> dict[str, str]:
    """Of what is loaded and counts."""
    found = {"lora-lightning": _version("lora-lightning"), "Python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES if name in sys.modules}


def _version(name: str) -> str:
    module = sys.modules.get(name)
    if isinstance(told := getattr(module, "__version__", None), str):
        return told  # with the build: 2.14.1+cu130
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that was not installed
        return "unknown"


def device_in_words(trainer: Trainer) -> str:
    """`NVIDIA H200, 2 processes (ddp), bf16-mixed`."""
    root = trainer.strategy.root_device
    if root.type == "cuda":
        words = [torch.cuda.get_device_name(root)]
    elif root.type == "cpu":
        threads = torch.get_num_threads()
        words = [f"CPU ({_processor()})", counted(threads, "thread")]
    else:
        words = [root.type]
    if trainer.world_size > 1:
        words.append(f"{trainer.world_size} processes ({type(trainer.strategy).__name__})")
    return ", ".join([*words, str(trainer.precision)])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _about() -> str:
    """The sentence in which the run's recipe says what it does; empty where its file is not found."""
    context = HydraConfig.get()
    name = context.runtime.choices.get("recipe")
    for source in context.runtime.config_sources:
        own = source.schema == RecipeFile.scheme()
        path = Path(source.path) if own else Path(source.path) / "recipe" / f"{name}.yaml"
        if path.is_file() and path.stem == name:
            try:
                return description(read_text(path, ""))
            except AdapterFileError:
                return ""
    return ""


def _named(node: DictConfig) -> str:
    """A model in a few words: `vit_tiny_patch16_224, weights vit_digits`, or its class."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    name = str(node.get("name") or node.get("architecture") or target)
    weights = node.get("checkpoint")
    return f"{name}, weights {Path(str(weights)).name}" if weights else name


def _data(node: DictConfig) -> str:
    """`DigitsDataModule, domain=target`."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    words = [f"{key}={node[key]}" for key in WORDS if isinstance(node.get(key), str)]
    return ", ".join([target, *words])


def _plan(plan: Plan) -> dict[str, Any]:
    rows = [[name, count, shape, rank, f"{number:,}"] for name, count, shape, rank, number in plan.families()]
    notes = [plan.by_data] if plan.by_data else []
    notes += [f"trained in full: {', '.join(plan.heads)}"] if plan.heads else []
    notes += [f"left frozen: {summary(plan.skipped)}"] if plan.skipped else []
    return {"rows": rows, "notes": notes}


def save_updates(task: LightningModule, before: Before | None, folder: Path) -> None:
    """Write down how much each layer of a trained task has changed, and the spectra of its updates; nothing
    where it is neither adapted by us nor known what it was before."""
    if is_injected(task):
        state = state_of(task)
        trained = dict(task.named_parameters())  # no statistics of norms, which are not trained
        base = {name: tensor for name, tensor in state.originals.items() if name in trained}
        found = [*_spectra(task), *_changes(trained, base, state.named(state.adapter).plan.heads)]
    elif before is not None:
        network = cast("nn.Module", task.model)
        found = list(_changes(dict(network.named_parameters()), before.values, find_heads(network)))
    else:
        (folder / UPDATES).unlink(missing_ok=True)
        return
    write_json(folder / UPDATES, found)


def _spectra(task: LightningModule) -> Iterator[dict[str, Any]]:
    if not state_of(task).named(state_of(task).adapter).plan.layers:
        return
    for name, one in spectra_now(task).items():
        yield {
            "name": name,
            "kind": WEIGHT,
            "rank": one.values.shape[1],
            "effective_rank": one.effective_rank,
            "stable_rank": one.stable_rank,
            "norm": one.norm,
            "relative": one.relative,
            "values": one.values.mean(0).tolist(),  # over the groups
        }


@torch.no_grad()
def _changes(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], heads: Collection[str]
) -> Iterator[dict[str, Any]]:
    """How far tensors that train in full have gone, beside what they were.

    Args:
        heads: modules that are heads.
    """
    for name, before in base.items():
        after = tuned.get(name)
        if after is None or after.shape != before.shape or not after.is_floating_point():
            continue
        size = before.float().norm().item()
        change = (after.detach().float().to(before.device) - before.float()).norm().item()
        if change:
            kind = _kind(name, before, heads)
            yield {"name": name, "kind": kind, "norm": change, "relative": change / size if size else None}


def _kind(name: str, tensor: Tensor, heads: Collection[str]) -> str:
    """What a tensor is: a weight, a head's, or of a norm or a bias; each compares with its like alone."""
    if any(name.startswith(f"{head}.") for head in heads):
        return HEAD
    return WEIGHT if tensor.ndim > 1 else NORM_OR_BIAS
