"""`hparams_search=optuna`: trials that Optuna's TPE proposes, in a study that other processes may share."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.build import plain
from lora_lightning.app.console import say, short_path
from lora_lightning.app.importance import write_importance
from lora_lightning.app.run import Run
from lora_lightning.app.search_space import leaves, suggested
from lora_lightning.app.trial import Tried, shortened, tried, watched
from lora_lightning.errors import UserError
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.tables import format_table

MEDIAN_OF, WARM = 5, 1  # trials that are not pruned, and epochs of each
RANDOM = 5  # trials before TPE has something to go by
PROCESS = "process"
TRAINED_BY = ("method", "data", "model", "task", "lora", "optim", "schedule", "trainer")
LASTING = ("max_epochs", "max_steps", "precision", "limit_train_batches", "limit_val_batches")


class Pruning(pl.Callback):
    """Tells a trial the score after each validation, and ends it where Optuna says so.

    Raises:
        optuna.TrialPruned: in the validation after which the trial ends.
    """

    def __init__(self, trial: Any, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        self.trial.report(float(trainer.callback_metrics[self.monitor]), trainer.current_epoch)
        if self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned


def search(config: DictConfig) -> float | None:
    """Run trials until the study has as many as are asked for; say which is best, and how to run it.

    Returns:
        The best score.

    Raises:
        UserError: Optuna is missing, or the study is another search's.
    """
    with loading("optuna", extra="tune"):
        import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(config.run_dir)
    monitor, mode = watched(Run(config, folder, keeps=False))
    study, file = _study(config, monitor, mode)
    say(f"study {study.study_name} in {short_path(file)}: {_counted(study)} of {config.search.trials} trials")
    while _counted(study) < config.search.trials:
        trial = study.ask()
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + trial.number, n_startup_trials=RANDOM)
        trial.set_user_attr(PROCESS, _this_process())
        state, told, value = optuna.trial.TrialState.FAIL, "failed", None
        try:
            one, what = _proposed(config, trial), f"trial {trial.number + 1}/{config.search.trials}"
            found = tried(one, folder / f"trial_{trial.number}", [Pruning(trial, monitor)], what)
            value, told = found.score, _told(found)
            state = state if value is None else optuna.trial.TrialState.COMPLETE
        except optuna.TrialPruned:
            state, told = optuna.trial.TrialState.PRUNED, "pruned"
        finally:
            study.tell(trial, value if state == optuna.trial.TrialState.COMPLETE else None, state)
        say(f"  trial {trial.number}: {_words(trial.params)}: {told}")
    return _concluded(study, monitor, folder)


def _study(config: DictConfig, monitor: str, mode: str) -> tuple[Any, Path]:
    """The study and its file, made where it is not.

    Raises:
        UserError: it searches another space, or by another score.
    """
    import optuna

    options, recipe = config.search, str(HydraConfig.get().runtime.choices.get("recipe"))
    name = options.study or recipe
    file = Path(options.storage or Path("outputs") / recipe / f"{name}.db")
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}})
    pruner: Any = optuna.pruners.NopPruner()
    if options.prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_OF, n_warmup_steps=WARM)
    direction: Any = "maximize" if mode == "max" else "minimize"
    study = optuna.create_study(
        storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
    )
    about = {"space": plain(options.space), "monitor": monitor, "recipe": recipe, **_trained_by(config)}
    before = study.user_attrs.get("about")
    if before is None:
        study.set_user_attr("about", about)
    elif changed := [key for key in about if before.get(key) != about[key]]:
        raise UserError(
            f"search.study={name}: was begun in {short_path(file)} with another {' and '.join(changed)}: "
            "give another search.study, or the same as before."
        )
    return study, file


def _trained_by(config: DictConfig) -> dict[str, Any]:
    """What all trials of a study have in common, or their scores could not be compared; not where and on how
    many processors they run."""
    values = json.loads(json.dumps(plain(config)))
    values["data"].pop("num_workers", None)
    values["trainer"] = {name: values["trainer"].get(name) for name in LASTING}
    return {"search.fraction": config.search.fraction, **{name: values[name] for name in TRAINED_BY}}


def _proposed(config: DictConfig, trial: Any) -> DictConfig:
    one = shortened(config, config.search.fraction)
    OmegaConf.set_struct(one, False)
    for name, leaf in leaves(plain(config.search.space)):
        OmegaConf.update(one, name, suggested(trial, name, leaf))
    return one


def _counted(study: Any) -> int:
    """The trials that have ended, and those at which a process works that has not gone."""
    return sum(t.state.is_finished() or _lives(t.user_attrs.get(PROCESS)) for t in study.get_trials(False))


def _this_process() -> list[Any]:
    return [socket.gethostname(), os.getpid()]


def _lives(process: Any) -> bool:
    """Of another machine's process nobody can tell: it is taken to live."""
    if not process or process[0] != socket.gethostname():
        return bool(process)
    try:
        os.kill(process[1], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _told(found: Tried) -> str:
    return f"failed: {found.reason}" if found.score is None else f"{found.monitor} {found.score:.4g}"


def _words(params: dict[str, Any]) -> str:
    return " ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in params.items())


def _concluded(study: Any, monitor: str, folder: Path) -> float | None:
    """The table of trials, the picture of importance, and the command of the best."""
    trials = study.get_trials(deepcopy=False)
    names = list(dict.fromkeys(name for t in trials for name in t.params))
    say("\n" + format_table(("trial", *names, monitor, ""), list(_rows(study, trials, names))))
    if not any(t.state.name == "COMPLETE" for t in trials):
        say("\nNo trial has given a score.")
        return None
    if on_rank_zero() and (line := write_importance(study, folder)):
        say(f"\n{line}")
    words = [w for w in HydraConfig.get().overrides.task if not w.startswith(("search", "hparams_search"))]
    words += [f"{name}={value}" for name, value in study.best_params.items()]
    say(f"\nThe best: lora-lightning train {' '.join(words)}")
    return float(study.best_value)


def _rows(study: Any, trials: list[Any], names: list[str]) -> Iterator[tuple[str, ...]]:
    scored = any(t.state.name == "COMPLETE" for t in trials)
    best = study.best_trial.number if scored else None
    for t in trials:
        values = (_words({"": t.params[n]}).lstrip("=") if n in t.params else "–" for n in names)
        score = "–" if t.value is None else f"{t.value:.4g}"
        told = "best" if t.number == best else "" if t.state.name == "COMPLETE" else t.state.name.lower()
        yield str(t.number), *values, score, told
