"""`resume=FOLDER`: a stopped run goes on in its folder, as it was begun, from its last checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.compose import SEARCHPATH, USERS
from lora_lightning.app.foreign import refuse_foreign, refuse_foreign_recipe, refuse_foreign_recipes
from lora_lightning.app.recipe_file import WORD as FILE_WORD
from lora_lightning.app.recipe_file import RecipeFile
from lora_lightning.errors import AdapterFileError, ConfigError, did_you_mean
from lora_lightning.report.left import FACTS, RESULTS, UPDATES
from lora_lightning.report.page import KEPT, PAGE_FILE
from lora_lightning.utils.mapping_file import NOTHING_RUN, read_values

WORD = "resume="


def resumed(arguments: Sequence[str]) -> list[str]:
    """The command line with `resume=FOLDER` written out; any other is returned as it is.

    The words that began the run come back, and its folders of recipes; those given now replace them. The run
    keeps its folder and its W&B id; `ckpt_path=last` begins anew where there is no checkpoint yet.

    Raises:
        ConfigError: FOLDER is not a run's, or what began the run is not run unasked.
    """
    given = [a for a in arguments if not a.startswith(WORD)]
    if len(given) == len(arguments):
        return given
    folder = Path(next(a for a in arguments if a.startswith(WORD)).removeprefix(WORD))
    began = folder / ".hydra" / "overrides.yaml"
    if not began.is_file():
        near = [p.parent.parent for p in folder.parent.glob("*/.hydra/overrides.yaml")]
        raise ConfigError([
            f"resume={folder}: is not a run's folder: it has no .hydra/overrides.yaml. Give one that a run "
            f"has named, such as outputs/vit_digits/DATE.{did_you_mean(str(folder), map(str, near))}"
        ])  # fmt: skip
    own = [f"hydra.run.dir={_quoted(folder)}", "ckpt_path=last"]
    replaced = {_key(word) for word in [*given, *own]}
    before = [word for word in _words(began, folder) if _key(word) not in replaced]
    refuse_foreign(folder, before, [_key(word) for word in given])
    places = _places(folder)
    before = _with_file(folder, before, places[RecipeFile.scheme(), USERS])
    return [*_folders(folder, given, places), *given, *before, *own]


def _with_file(folder: Path, words: Sequence[str], files: Sequence[str]) -> list[str]:
    """The words with the recipe by its file, where it was named so."""
    if not files or not any(word.startswith(FILE_WORD) for word in words):
        return list(words)
    refuse_foreign_recipe(folder, Path(files[0]))
    return [f"{FILE_WORD}{files[0]}" if word.startswith(FILE_WORD) else word for word in words]


def _folders(
    folder: Path, given: Sequence[str], places: Mapping[tuple[str, str], Sequence[str]]
) -> list[str]:
    """The folders of recipes of the command that began the run, unless others are given."""
    if any(_key(word) in ("--config-dir", "-cd", SEARCHPATH) for word in given):
        return []
    own, searched = (places["file", by] for by in (USERS, f"{SEARCHPATH} in command-line"))
    for recipes in (*own, *searched):
        refuse_foreign_recipes(folder, Path(recipes))
    paths = ",".join(_quoted(f"file://{path}") for path in searched)
    words = [f"{SEARCHPATH}=[{paths}]"] if searched else []
    return [*(["--config-dir", own[0]] if own else []), *words]


def _places(folder: Path) -> Mapping[tuple[str, str], list[str]]:
    """Where the command that began the run found recipes: by kind of the place and who named it."""
    places: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    about = folder / ".hydra" / "hydra.yaml"
    runtime = _read(about, folder) if about.is_file() else None
    for key in ("hydra", "runtime"):
        runtime = runtime.get(key) if isinstance(runtime, dict) else None
    found = runtime.get("config_sources") if isinstance(runtime, dict) else None
    for source in found or []:
        if isinstance(source, dict) and isinstance(runtime, dict):
            path = str(Path(str(runtime.get("cwd"))) / str(source.get("path")))
            places[str(source.get("schema")), str(source.get("provider"))].append(path)
    return places


def _read(path: Path, folder: Path) -> Any:
    try:
        return read_values(path, NOTHING_RUN)
    except AdapterFileError as error:
        raise ConfigError([f"resume={folder}: {error}"]) from None


def _words(began: Path, folder: Path) -> list[str]:
    words = _read(began, folder) or []
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise ConfigError([f"resume={folder}: {began} is damaged: it is no list of KEY=VALUE. Copy it anew."])
    return words


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """The epochs that a Trainer's checkpoint has behind it, with every batch of theirs."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch = loops.get("epoch_progress", {}).get("current", {})
    batch = loops.get("epoch_loop.batch_progress", {})
    done = int(epoch.get("processed", checkpoint.get("epoch", 0)))
    current = batch.get("current", {})
    running = epoch.get("started", done) > done
    whole = batch.get("is_last_batch") and current.get("ready") == current.get("processed")
    return done + bool(running and whole)


def is_finished(config: DictConfig, folder: Path) -> bool:
    """Whether a run of this very configuration has ended in the folder: its results are the last thing that a
    run writes, and `forget_end` removes them."""
    began = folder / "config.yaml"
    ended = [folder / name / "results.json" for name in ("", *(config.get("adapters") or ()))]
    if not (began.is_file() and all(results.is_file() for results in ended)):
        return False
    try:
        before = read_values(began, NOTHING_RUN)
    except AdapterFileError:
        return False  # whoever goes on writes it anew
    now: Any = OmegaConf.to_container(config, resolve=True)
    return isinstance(before, dict) and _without_place(before) == _without_place(now)


def refuse_finished(config: DictConfig, folder: Path) -> None:
    """
    Raises:
        ConfigError: nothing is left to do in the folder.
    """
    if is_finished(config, folder):
        epochs = config.trainer.max_epochs
        raise ConfigError([
            f"resume={folder}: the run is finished, with all its epochs behind it and its results in "
            f"{folder / 'results.json'}. To train longer give trainer.max_epochs above {epochs}."
        ])  # fmt: skip


def forget_end(folder: Path) -> None:
    """What is about to go on in the folder is not finished, and what was said of its end holds no more."""
    for name in (RESULTS, FACTS, UPDATES, KEPT, PAGE_FILE):
        (folder / name).unlink(missing_ok=True)


def _without_place(config: Mapping[Any, Any]) -> str:
    """A resolved configuration as text, without what differs from one start of a run to the next."""
    place = str(config.get("run_dir"))
    if config.get("tune"):  # found what these are
        config = {k: v for k, v in config.items() if k != "rates"}
        for section, name in (("optim", "lr"), ("lora", "rank")):
            config[section] = {k: v for k, v in config[section].items() if k != name}
    kept = {k: v for k, v in config.items() if k not in ("run_dir", "ckpt_path", "logger", "tags")}
    return json.dumps(kept, default=str, sort_keys=True).replace(json.dumps(place)[1:-1], "")


def put_metrics_aside(folder: Path) -> None:
    """csv/metrics.csv becomes metrics.1.csv, …: Lightning's logger would delete it."""
    metrics = folder / "csv" / "metrics.csv"
    if metrics.is_file():
        number = 1 + len(list(metrics.parent.glob("metrics.*.csv")))
        metrics.rename(metrics.with_name(f"metrics.{number}.csv"))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition("@")[0]


def _quoted(value: object) -> str:
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
