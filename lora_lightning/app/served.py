"""What `lora-lightning serve` serves: the base that an adapter, a run or a recipe names, and its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import get_object
from torch import nn

from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.app.recognizer import CTC, SEQ2SEQ
from lora_lightning.app.several_adapters import TEMPERATURE
from lora_lightning.app.trained import Trained, named
from lora_lightning.errors import UserError
from lora_lightning.files.locate import AdapterSource
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.inputs import Limits
from lora_lightning.serving.kinds import Base, Classes, Kind, Masks, Objects
from lora_lightning.serving.store import AdapterStore

TRANSDUCER = "lora_lightning.tasks.transducer.TransducerRecognizer"  # is one of CTC's by its class alone
KINDS = {  # by the class of the task; those derived from it are served alike, the first that fits
    "lora_lightning.tasks.classification.ImageClassifier": "classify",
    "lora_lightning.tasks.detection.ObjectDetector": "detect",
    "lora_lightning.tasks.segmentation.SemanticSegmenter": "segment",
    SEQ2SEQ: "texts",
    TRANSDUCER: "",
    CTC: "words",
}


def trained_of(options: Mapping[str, Any], words: Sequence[str], catalog: Catalog) -> Trained:
    """What says how the base is built: `base=`, else the words, else the first of the adapters.

    Raises:
        UserError: nothing does; every mistake in one message.
    """
    names = catalog.names()
    first = {"adapter": options["base"]} if "base" in options else {}
    if not first and names:
        first = {"adapter": str(catalog.folder(names[0]))}
    if not first and not words:
        raise UserError(
            f"adapters={options['adapters']}: holds no adapter by which the base could be built: give "
            "base=PATH or recipe=NAME."
            if "adapters" in options
            else "nothing to serve is named: give adapter=PATH, adapters=FOLDER, base=PATH or recipe=NAME."
        )
    problems: list[str] = []
    trained = named(first, words, problems)
    if trained is None or problems:
        raise UserError("\n".join(problems))
    return trained


def engine_of(
    options: Mapping[str, Any],
    words: Sequence[str],
    catalog: Catalog,
    limits: Limits,
    device: str | None = None,
) -> Engine:
    """The base built, its adapters found.

    Args:
        options: of the command `serve`, by name.
        catalog: of the adapters.
        device: where the model runs; None is as the run says.

    Raises:
        UserError: it cannot be built, or its task is not one that is served.
    """
    trained = trained_of(options, words, catalog)
    name = kind_of(trained)
    if device is not None:
        accelerator = "gpu" if device.startswith("cuda") else device.partition(":")[0]
        trainer = {**trained.config.get("trainer", {}), "accelerator": accelerator}
        trained = dataclasses.replace(trained, config={**trained.config, "trainer": trainer})
    model, facts = _base(trained)
    fabric = trained.fabric()
    base = Base(model.to(device or fabric.device), fabric, facts, trained.config)
    kind = _kind(name, base, limits)
    given = {n: options[n] for n in ("most", "pinned", "check_base") if n in options}
    store = AdapterStore(base.model, catalog, **given)
    return Engine(kind, store, facts, **{n: options[n] for n in ("batch", "max_wait_ms") if n in options})


def kind_of(trained: Trained) -> str:
    """How a task is served.

    Raises:
        UserError: it is not.
    """
    target = trained.config["task"]["_target_"]
    task = get_object(target)
    fitting = [n for n in KINDS if isinstance(task, type) and issubclass(task, get_object(n))]
    if fitting and (kind := KINDS[fitting[0]]):
        return kind
    served = ", ".join(name for name, kind in KINDS.items() if kind)
    raise UserError(f"{trained.where}: its task, {target}, is not served: give an adapter of {served}.")


def _base(trained: Trained) -> tuple[nn.Module, Mapping[str, Any]]:
    """The plain base in eval mode; of whole weights the network with them."""
    if not isinstance(trained.source, AdapterSource):
        return trained.model()
    model, facts = rebuilt_model(trained.config, trained.source, trained.facts, own=trained.own)
    facts = {name: fact for name, fact in facts.items() if name != TEMPERATURE}  # fitted with that adapter
    return model.eval(), facts  # not frozen: what a backbone leaves free belongs to its adapters


def _kind(name: str, base: Base, limits: Limits) -> Kind:
    if name in ("words", "texts"):
        from lora_lightning.serving.speech import Texts, Words

        if name == "texts":
            return Texts(base, limits)
        if "vocabulary" not in base.facts:
            raise UserError(
                "its data, which decide the vocabulary, are not on this machine: give recipe=NAME."
            )
        return Words(base, limits)
    kinds: dict[str, type[Classes] | type[Objects] | type[Masks]]
    kinds = {"classify": Classes, "detect": Objects, "segment": Masks}
    return kinds[name](base, limits)
