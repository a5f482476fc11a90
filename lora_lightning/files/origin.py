"""Where trained weights come from: what builds their model again, and what data and task said of themselves.

It travels with the weights, in an adapter's description or a file's metadata, so that these alone are enough
to predict with. Whoever reads it has it from a file of anyone's: `lora_lightning.files.allowed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError, UserError
from lora_lightning.files.allowed import checked_facts

SECTIONS = ("model", "data", "task", "trainer")  # of a run's configuration
PLACES = ("root", "table", "manifest", "source", "images", "masks", "annotations", "folder", "path", "file")
LOCAL_MODEL = re.compile(r"(local[-_]dir:)(.+)", re.DOTALL)  # a folder that timm has saved
OF_TRAINER = ("accelerator", "precision")  # what of the last one travels
# Begins a file or folder of one machine, and ends one; "timm/vit_tiny" is a name.
HERE = re.compile(r"file:|~|/|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\")
WEIGHTS_FILE = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Origin:
    """Plain values, fit for JSON.

    Attributes:
        recipe: of the application; empty where there was none.
        config: the sections of the run's configuration that build model, data and task, and how it ran.
        facts: what data and task said: the classes' names, what is done to a picture, the temperature.
    """

    recipe: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.config or self.facts)

    def to_dict(self) -> dict[str, Any]:
        """What is known, without what is not."""
        return {name: value for name, value in asdict(self).items() if value}

    def public(self) -> tuple[Origin, dict[str, str]]:
        """The same for other machines: of files and folders of this one the last name alone is left. And what
        was shortened: option -> how it was."""
        changed: dict[str, str] = {}
        return replace(self, config=_without_places(self.config, "", changed)), changed

    @classmethod
    def of_run(cls, recipe: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Origin:
        """What travels of a run.

        Args:
            config: plain values, with no references in them.
            facts: plain values.
        """
        sections = {name: config[name] for name in SECTIONS if isinstance(config.get(name), Mapping)}
        if "data" in sections:
            sections["data"] = {k: v for k, v in sections["data"].items() if not _is_path(k, v)}
        if "trainer" in sections:
            sections["trainer"] = {k: v for k, v in sections["trainer"].items() if k in OF_TRAINER}
        if "model" in sections:
            sections["model"] = {k: _found_from_anywhere(v) for k, v in sections["model"].items()}
        return cls.of({"recipe": recipe, "config": sections, "facts": dict(facts)})

    @classmethod
    def of(cls, given: Origin | Mapping[str, Any] | None) -> Origin:
        """What whoever saves weights says of them.

        Raises:
            ConfigError: it is of another kind, or holds more than plain values.
        """
        if given is None or isinstance(given, Origin):
            return given or cls()
        try:
            made = cls.read(json.loads(json.dumps(given)))
            checked_facts(made.facts, "origin")
            return made
        except UserError as error:
            raise ConfigError([str(error)]) from None
        except (TypeError, ValueError, RecursionError) as error:
            names = ", ".join(one.name for one in fields(cls))
            told = f"give a mapping of {names}, the last two with plain values."
            raise ConfigError([f"origin={given!r}: {told} ({error})"]) from None

    @classmethod
    def read(cls, values: object) -> Origin:
        """The inverse of `to_dict`, of values from a file, whose insides are looked at when they are used.

        Raises:
            TypeError: they are of another kind.
        """
        if not isinstance(values, Mapping) or not values.keys() <= set(cls.__dataclass_fields__):
            raise TypeError("its origin is of another kind")
        made = cls(**values)
        if not (
            isinstance(made.recipe, str) and isinstance(made.config, dict) and isinstance(made.facts, dict)
        ):
            raise TypeError("its origin is of another kind")
        return made


def without_place(text: str) -> str:
    """A file or folder of this machine by its last name, with what stands before it (`local-dir:`); any other
    text as it is."""
    found = LOCAL_MODEL.fullmatch(text)
    kind, place = found.groups() if found else ("", text)
    if not (found or HERE.match(place) or place.endswith(WEIGHTS_FILE)):
        return text
    return kind + re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _without_places(value: Any, option: str, changed: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v, f"{option}.{k}".lstrip("."), changed) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v, f"{option}.{i}", changed) for i, v in enumerate(value)]
    if isinstance(value, str) and (short := without_place(value)) != value:
        changed[option] = value
        return short
    return value


def is_place(option: str, value: Any) -> bool:
    """Whether an option of the data names a file or folder: `data.root`, `data.test_images`."""
    return isinstance(value, str) and option.rpartition("_")[2] in PLACES


def _is_path(option: str, value: Any) -> bool:
    """Whether an option of the data says where they lie, which is nobody else's business."""
    if isinstance(value, list):
        return any(_is_path(option, one) for one in value)
    return is_place(option, value) or (isinstance(value, str) and ("/" in value or value.startswith("~")))


def _found_from_anywhere(value: Any) -> Any:
    """A file or folder of weights by its whole path, so that the base is found from another folder."""
    if not isinstance(value, str):
        return value
    if found := LOCAL_MODEL.fullmatch(value):
        return f"{found[1]}{Path(found[2]).expanduser().absolute()}"
    return str(Path(value).expanduser().absolute()) if _holds_weights(value) else value


def _holds_weights(name: str) -> bool:
    """Whether a word is a file, or a folder with a model in it: one may also be called as a model is."""
    path = Path(name).expanduser()
    try:
        return bool(path.suffix and path.is_file()) or (path / "config.json").is_file()
    except (OSError, ValueError):  # too long for a name
        return False
