"""An adapter as it is uploaded: its two files without this machine's paths, a card, what trackers are told.
Nothing else ever is uploaded, unless the base's random weights are asked for."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_lightning.app.base_names import Base, base_of_origin
from lora_lightning.app.card import Card, text_of
from lora_lightning.app.methods import ADAPTING
from lora_lightning.app.rebuild import builder_of
from lora_lightning.app.results import Result
from lora_lightning.errors import UserError
from lora_lightning.files.allowed import BUILDERS, TARGET, checked_facts
from lora_lightning.files.fingerprint import short
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.locate import ADAPTER, AdapterSource, read_trained
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE
from lora_lightning.files.publish import write_public
from lora_lightning.files.random_base import BASE_FILE
from lora_lightning.tasks.classification_scores import scores_of
from lora_lightning.tasks.scores import Score

CARD = "README.md"
RESULTS = "results.json"
TESTED = (ADAPTER, "checkpoints/best.ckpt")  # what of a run its results are of


@dataclass(frozen=True)
class Upload:
    """What of an adapter is uploaded.

    Attributes:
        files: name there -> file here.
        metadata: plain values about it: base, ranks, training, scores before and after.
        base: name and metadata of the base, of which no file is uploaded.
        changed: what of the configuration names a file or folder of this machine, of which the last name
            alone is uploaded: option -> how it was.
        lacking: why it cannot be used elsewhere as it is; empty where it can.
    """

    files: dict[str, Path]
    metadata: dict[str, Any]
    base: dict[str, Any]
    changed: dict[str, str] = field(default_factory=dict)
    lacking: str = ""


@contextlib.contextmanager
def upload_of(
    path: str | Path,
    to: str = "",
    results: Sequence[Result] | None = None,
    scores: Sequence[Score] | None = None,
    with_base: bool = False,
    license: str | None = None,
) -> Iterator[Upload]:
    """The adapter of a folder, a run or a Trainer's checkpoint, ready to be uploaded within this context.

    Args:
        to: the address under which it will be found, for its card; empty where that is not known.
        results: of its run; None reads those that the run has left.
        scores: by which they are judged; None asks the run's task.
        with_base: the random weights too that it is added to, where such are kept.
        license: of the adapter, for its card, such as apache-2.0.

    Raises:
        UserError: there is no adapter.
        AdapterFileError: it is damaged.
    """
    source = read_trained(path)
    if not isinstance(source, AdapterSource):
        raise UserError(f"{path}: holds all weights of a network, and no adapter. Give an adapter.")
    kept = next((f for folder in source.base_folders() if (f := folder / BASE_FILE).is_file()), None)
    with tempfile.TemporaryDirectory(prefix="lora-upload-") as name:
        folder = Path(name)
        changed = write_public(source, folder)
        names = [CONFIG_FILE, TENSOR_FILE]
        if kept and with_base:
            shutil.copyfile(kept, folder / BASE_FILE)
            names.append(BASE_FILE)
        origin, _ = source.origin().public()
        card = card_of(source, origin, to, results, scores, license, tuple(names))
        base, before, after = card.base, card.before, card.after
        (folder / CARD).write_text(text_of(card), encoding="utf-8")
        yield Upload(
            {file: folder / file for file in (*names, CARD)},
            {
                **_about(source, base),
                "scores": after.get("scores", {}),
                "scores_before": before.get("scores", {}),
            },
            {"name": base.name, "metadata": _about_base(source.saved, base)},
            changed,
            "" if with_base or not kept else f"its base is random weights, which stay in {kept}",
        )


def card_of(
    source: AdapterSource,
    origin: Origin,
    to: str = "",
    results: Sequence[Result] | None = None,
    scores: Sequence[Score] | None = None,
    license: str | None = None,
    files: tuple[str, ...] = (),
) -> Card:
    """What the card of an adapter tells.

    Args:
        origin: without this machine's paths.
        to, results, scores, license: as in `upload_of`.
        files: beside the card.
    """
    base = base_of_origin(origin.config, source.saved.base_class)
    found = [asdict(r) for r in results] if results is not None else _results(source)
    before, after = _before_and_after(found, source)
    shown_by = _scores(origin) if scores is None else scores
    return Card(to, source.saved, origin, source.recipe(), base, before, after, shown_by, license, files)


def _about(source: AdapterSource, base: Base) -> dict[str, Any]:
    saved = source.saved
    ranks = sorted({layer.rank for layer in saved.plan.layers})
    return {
        "recipe": source.recipe(),
        "format": "peft" if saved.foreign else "lora_lightning",
        "base": base.name,
        **_about_base(saved, base),
        "ranks": ranks,
        "layers": len(saved.plan.layers),
        "parameters": sum(t.numel() for t in saved.tensors.values()),
        "training": dict(saved.training),
    }


def _about_base(saved: SavedAdapter, base: Base) -> dict[str, Any]:
    return {
        "base_class": saved.base_class,
        "fingerprint": short(saved.fingerprint) if saved.fingerprint else "",
        "base_licence": base.licence,
        "base_hub": base.hub,
    }


def _scores(origin: Origin) -> Sequence[Score]:
    """Those of the task, if it is one of this package; none where it is not known."""
    node = origin.config.get("task")
    target = node.get(TARGET) if isinstance(node, Mapping) else None
    if target not in BUILDERS["task"]:
        return ()
    facts = checked_facts(origin.facts, "facts")
    if target.endswith(".ImageClassifier"):
        classes = facts.get("num_classes", len(facts.get("class_names", ())))
        return scores_of(facts.get("target", "class"), classes, False, facts.get("number_std", 1.0))
    return tuple(builder_of(target).scores)


def _results(source: AdapterSource) -> list[Mapping[str, Any]]:
    """Of the run whose adapter this is, as it was tested; none where there are none, or of a kind that nobody
    knows."""
    run = source.run
    if run is None or source.path.absolute() not in [(run / name).absolute() for name in TESTED]:
        return []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((run / RESULTS).read_text(encoding="utf-8"))
        return [r for r in found if _is_result(r)] if isinstance(found, list) else []
    return []


def _is_result(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(k, {}), dict) for k in ("scores", "intervals")
    )


def _before_and_after(
    found: Sequence[Mapping[str, Any]], source: AdapterSource
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The results of the base and of the adapter; empty where they are not known."""
    by_method = {result.get("method"): result for result in found}
    method = source.method()
    own = method if method in by_method else next((m for m in ADAPTING if m in by_method), "")
    return by_method.get("none", {}), by_method.get(own, {}) if own in ADAPTING else {}
