"""What a user names for `predict` and `evaluate`, a run's adapter or weights or a recipe: its configuration,
and its model with all that was trained in it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.fabric import Fabric
from torch import nn

from lora_lightning.adapters.eject import eject
from lora_lightning.app.command_line import command_config
from lora_lightning.app.options import checks_in, precision_of
from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.errors import AdapterFileError, ConfigError, UserError, did_you_mean
from lora_lightning.files.allowed import plain_values, section_of, target_of
from lora_lightning.files.format import write_adapter
from lora_lightning.files.locate import AdapterSource, WeightsSource, read_trained
from lora_lightning.files.origin import SECTIONS
from lora_lightning.files.random_base import BASE_FILE, is_random, kept_base
from lora_lightning.files.save_load import load_adapter
from lora_lightning.files.weights import load_into
from lora_lightning.utils.marks import show

USED = (  # options of a run
    "task.score_threshold", "trainer.accelerator", "trainer.precision", "data.batch_size", "data.num_workers",
)  # fmt: skip
RECIPE = "recipe="
SHOWN_BY = ("data.image_size", "data.crop_pct", "model.img_size", "model.image_size")
PREPROCESSING = ("input_size", "crop_pct", "mean", "std", "interpolation", "crop_mode")


@dataclass(frozen=True)
class Trained:
    """What was named.

    Attributes:
        source: the adapter or the weights; None is the recipe's base alone.
        config: the sections of SECTIONS, plain.
        own: whether the configuration is of the user's own words, which may name anything; otherwise it may
            have come with a download.
        facts: what data and task have said; None where only the data can tell.
    """

    source: AdapterSource | WeightsSource | None
    config: Mapping[str, Any]
    own: bool
    facts: Mapping[str, Any] | None

    @property
    def where(self) -> object:
        """What says it, for errors."""
        return self.source.config_file if self.source and not self.own else "the recipe"

    def model(
        self, check_base: bool = True, merged: bool = True, name: str | None = None
    ) -> tuple[nn.Module, Mapping[str, Any]]:
        """The model with the adapter merged into it, or with the weights, in eval mode; and the facts.

        Args:
            merged: False leaves the adapter beside the base's weights.
            name: of the adapter there; None is "default".

        Raises:
            UserError: it cannot be built.
            AdapterFileError: what was trained does not fit it.
        """
        source = self.source
        model, facts = rebuilt_model(self.config, source, self.facts, own=self.own)
        if isinstance(source, AdapterSource):
            with _of_random_base(source, self.config, model):
                adapt(model, source, check_base, name)
            if merged:
                eject(model, merged=True)
        elif source:
            what = f"the model that {self.where} builds"
            load_into(model, source.weights, source.path, what, "Give the recipe that it was trained by.")
        return model.eval(), facts

    def fabric(self) -> Fabric:
        """The device; full precision on a CPU, where half of it is slower."""
        trainer = {"accelerator": "auto", "precision": "32-true", **self.config.get("trainer", {})}
        here = Fabric(accelerator=trainer["accelerator"], devices=1)
        precision: Any = precision_of(trainer["precision"])
        fast = here.device.type != "cpu" and precision.endswith("mixed")
        return Fabric(
            accelerator=trainer["accelerator"], devices=1, precision=precision if fast else "32-true"
        )


def named(options: Mapping[str, Any], words: Sequence[str], problems: list[str]) -> Trained | None:
    """What the options `adapter` or `ckpt`, and words such as `recipe=NAME key=value`, name.

    Args:
        words: without a recipe they change what the run of the adapter says.
        problems: takes a line for each mistake; then there may be nothing to return.
    """
    given = [options[name] for name in ("adapter", "ckpt") if name in options]
    if len(given) > 1:
        problems.append("adapter and ckpt: give one of the two.")
    try:
        source = read_trained(given[0]) if given else None
        if any(word.startswith(RECIPE) for word in words):
            return Trained(source, command_config(words), True, source.facts() if source else None)
        if source is None:
            said = f"{' '.join(words)}: " if words else ""
            raise UserError(f"{said}give recipe=NAME, or adapter=FOLDER of a run.")
        return Trained(source, changed(_config_of(source), words), False, _facts_of(source, words))
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    return None


def _facts_of(source: AdapterSource | WeightsSource, words: Sequence[str]) -> dict[str, Any] | None:
    """What data and task have said; not how pictures were shown, where other words change that."""
    facts = source.facts()
    if facts is None or not any(word.lstrip("+").partition("=")[0] in SHOWN_BY for word in words):
        return facts
    return {name: value for name, value in facts.items() if name not in PREPROCESSING}


def _config_of(source: AdapterSource | WeightsSource) -> dict[str, Any]:
    """The sections that are used here, all plain: they may have come with a download.

    Raises:
        UserError: there are none, or they are of another kind.
    """
    config, where = source.config(), source.config_file
    if not config:
        raise UserError(f"{source.path} lies in no run of the training application: give recipe=NAME.")
    target_of(config, "task", where)
    section_of(config, "model", where)
    if source.facts() is None:
        section_of(config, "data", where)
    sections = {name: plain_values(config, name, where) or {} for name in SECTIONS}
    checks = checks_in(sections)
    for path in USED:
        section, _, name = path.partition(".")
        if not isinstance(sections[section], dict):
            raise UserError(
                f"{where}: {section}={show(sections[section])}: the file is damaged. Copy it anew."
            )
        values, check = sections[section], checks.get(path)
        if check and name in values and not check.allows(value := values[name]):
            raise UserError(
                f"{where}: {path}={show(value)}: the file is damaged: give {check.allowed} there."
            )
    return sections


def changed(config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A run's sections with some of their options replaced: `model.checkpoint=FILE`.

    Raises:
        ConfigError: one line for each word that is no such option.
    """
    problems = []
    checks = checks_in(config)
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
            key, value = override.key_or_group.lstrip("+"), override.value()
        except (HydraException, ValueError):
            problems.append(f"{word}: give key=value.")
            continue
        section, _, name = key.partition(".")
        known = [
            *(f"{s}.{n}" for s, values in config.items() for n in values if not n.startswith("_")),
            *checks,
        ]
        own = list(dict.fromkeys(k for k in known if k.partition(".")[0] in config))
        if section not in config or key not in own:
            near = did_you_mean(key, own)
            problems.append(f"{word}: there is no such option of the run.{near} Or give recipe=NAME with it.")
        elif check := checks.get(key):
            problems += check.problems(key, value, show)
        if not problems:
            config[section] = {**config[section], name: value}
    if problems:
        raise ConfigError(problems)
    return config


@contextlib.contextmanager
def _of_random_base(source: AdapterSource, config: Mapping[str, Any], model: nn.Module) -> Iterator[None]:
    """An adapter of random weights that are not beside it fits no base: say so."""
    lost = is_random(config["model"], model) and not kept_base(source.base_folders())
    try:
        yield
    except AdapterFileError as error:
        hint = f" Its base was random: copy {BASE_FILE} from its run's folder into {source.path}."
        raise AdapterFileError(f"{error}{hint if lost else ''}") from None


def adapt(model: nn.Module, source: AdapterSource, check_base: bool = True, name: str | None = None) -> None:
    """Load an adapter, from its folder or from a checkpoint.

    Args:
        name: under which; None as of `load_adapter`.

    Raises:
        AdapterFileError: it does not fit the model.
    """
    if source.path.is_dir():
        load_adapter(model, source.path, name, check_base=check_base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, source.saved)
            load_adapter(model, folder, name, check_base=check_base)
