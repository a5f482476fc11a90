"""Several adapters of one base in one model, of the paths that a command was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_lightning.app.trained import Trained, adapt
from lora_lightning.data.picture_transform import FACTS as SHOWN
from lora_lightning.errors import UserError
from lora_lightning.exporting.card import ExportCard
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.files.locate import AdapterSource, read_trained

ONE = (  # facts that belong to all of a file's outputs and inputs
    *SHOWN, "class_names", "num_classes", "target", "number_mean", "number_std", "shorter_side", "vocabulary",
)  # fmt: skip
TEMPERATURE = "temperature"


@dataclass(frozen=True)
class Several:
    """What `adapters=` names.

    Attributes:
        options: of the command, in which `adapter` is the first of them.
        sources: by name; empty where `adapters` was not given.
    """

    options: Mapping[str, Any]
    sources: dict[str, AdapterSource] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], problems: list[str]) -> Several:
        """Of a command's options; each mistake is a line more of `problems`."""
        paths: dict[str, str] = options.get("adapters", {})
        if not paths:
            return cls(options)
        if beside := [name for name in ("adapter", "ckpt") if name in options]:
            problems.append(f"adapters and {' and '.join(beside)}: give one of them.")
        if not FORMATS[options.get("format", "onnx")].adapters:
            problems.append("adapters: is of format=onnx_adapters; give it, or one adapter=PATH.")
        sources: dict[str, AdapterSource] = {}
        for name, path in paths.items():
            try:
                source = read_trained(path)
            except UserError as error:
                problems.append(str(error))
                continue
            if isinstance(source, AdapterSource):
                sources[name] = source
            else:
                problems.append(f"adapters: {path} is no adapter; give folders of adapters.")
        first = next(iter(paths.values()))
        return cls({**{k: v for k, v in options.items() if k != "ckpt"}, "adapter": first}, sources)

    def problems(self, trained: Trained) -> list[str]:
        """A line for each adapter whose outputs or inputs mean something else than the first one's."""
        first, *others = [*self.sources] or [""]
        facts = trained.facts or {}
        found = []
        for name in others:
            theirs = self.sources[name].facts() or {}
            if unlike := [key for key in ONE if key in facts and key in theirs and facts[key] != theirs[key]]:
                found.append(
                    f"adapters: {name} has other {', '.join(unlike)} than {first}; export each of them alone."
                )
        return found

    def model(self, trained: Trained, check_base: bool, merged: bool) -> tuple[nn.Module, Mapping[str, Any]]:
        """The model with all of them, in eval mode, and the facts of the first.

        Raises:
            UserError: as `Trained.model`.
        """
        names = [*self.sources]
        model, facts = trained.model(check_base, merged, names[0] if names else None)
        for name in names[1:]:
            adapt(model, self.sources[name], check_base, name)
        return model.eval(), facts

    def scale(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """What is given of the first, but for a temperature that is not that of all."""
        all_of = {(source.facts() or {}).get(TEMPERATURE, 1.0) for source in self.sources.values()}
        return {name: value for name, value in given.items() if name != TEMPERATURE or len(all_of) < 2}

    def card(self, about: ExportCard) -> ExportCard:
        """A card that names them all; scores are of one, and left out."""
        if len(self.sources) < 2:
            return about
        base = next((text for name, text in about.facts if name == "base"), "a base")
        rows = tuple((name, text) for name, text in about.facts if name not in ("trained by", "data"))
        trained = tuple(
            (f"adapter {name}", f"trained by {source.recipe() or 'a run that is not known here'}")
            for name, source in self.sources.items()
        )
        count = len(self.sources)
        return replace(
            about, title=f"{count} adapters on {base}", facts=(*rows, *trained), results=(),
            summary=f"{base}, and {count} low-rank adapters in files of their own, one for each request.",
        )  # fmt: skip
