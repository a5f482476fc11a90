"""What loggers are told of the updates after each epoch, and of their gradients."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from small import Classifier, loader, trainer

import lora_lightning as ll
from lora_lightning.adapters import spectra


class Recorder(Logger):
    """Keeps the metrics that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    name = version = "recorder"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told.append(dict(metrics))

    def of_updates(self) -> list[dict[str, float]]:
        kept = [{n: v for n, v in told.items() if n.startswith("lora/")} for told in self.told]
        return [told for told in kept if told]


def fit(tmp_path: Path, *loggers: Logger, **options: Any) -> Classifier:
    module = Classifier()
    trainer(tmp_path, ll.LoRACallback(rank=2, **options), logger=list(loggers)).fit(module, loader())
    return module


def test_the_means_over_the_layers_are_logged_after_each_epoch(tmp_path: Path) -> None:
    recorder = Recorder()
    module = fit(tmp_path, recorder)
    told = recorder.of_updates()
    assert len(told) == 2 and told[0] != told[1]
    found = ll.spectra(module)
    wanted = {f"lora/{name}": value for name, value in found.mean().items()}
    wanted["lora/update_norm"] = sum(one.norm**2 for one in found.values()) ** 0.5
    assert told[1] == pytest.approx(wanted)
    assert 1 <= told[1]["lora/effective_rank"] <= 2 and told[1]["lora/relative_norm"] > 0


def test_base_weights_are_measured_once_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    norm_of = spectra.norm_of
    monkeypatch.setattr(spectra, "norm_of", lambda *given: measured.append("") or norm_of(*given))
    recorder = Recorder()
    module = fit(tmp_path, recorder)
    layers = len(ll.plan(Classifier(), ll.LoRAConfig(rank=2)).layers)
    assert len(recorder.of_updates()) == 2 and len(measured) == 2 * layers  # in the epochs, and for the table
    assert recorder.of_updates()[-1]["lora/relative_norm"] == pytest.approx(
        ll.spectra(module).mean()["relative_norm"]
    )


def test_each_layer_or_nothing(tmp_path: Path) -> None:
    recorder, silent = Recorder(), Recorder()
    found = ll.spectra(fit(tmp_path, recorder, spectra="layers"))
    told = recorder.of_updates()[-1]
    assert len(told) == 1 + 3 * (1 + len(found))
    for name, one in found.items():
        assert told[f"lora/stable_rank/{name}"] == pytest.approx(one.stable_rank)
    fit(tmp_path, silent, spectra="none")
    assert not silent.of_updates()
    with pytest.raises(ll.ConfigError, match="spectra='all': give one of mean, layers, none"):
        ll.LoRACallback(spectra="all")


class Gradients(Callback):
    """What the gradient of the updates is, before it is clipped."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        squares = [p.grad.square().sum() for p in ll.lora_parameters(pl_module)]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


def test_the_gradient_of_the_updates_alone_where_the_trainer_logs(tmp_path: Path) -> None:
    recorder, seen = Recorder(), Gradients()
    callbacks = (ll.LoRACallback(rank=2), seen)
    options = {"log_every_n_steps": 3, "gradient_clip_val": 1e-3}
    trainer(tmp_path, *callbacks, logger=recorder, **options).fit(Classifier(), loader())
    told = [row["lora/grad_norm"] for row in recorder.told if "lora/grad_norm" in row]
    assert len(seen.norms) == 8
    assert told == pytest.approx([seen.norms[2], seen.norms[5]])


def test_tables_of_plan_and_spectra_beside_the_metrics(tmp_path: Path) -> None:
    """In anybody's module, by the callback alone."""
    logger = CSVLogger(tmp_path, "csv", "")
    callback = ll.LoRACallback(rank=2)
    module = Classifier()
    trainer(tmp_path, callback, logger=logger).fit(module, loader())
    with open(tmp_path / "csv" / "plan.csv", encoding="utf-8", newline="") as file:
        plan = list(csv.DictReader(file))
    assert [row["layer"] for row in plan] == [layer.name for layer in callback.plan.layers]
    assert {row["rank"] for row in plan} == {"2"}
    with open(tmp_path / "csv" / "spectra.csv", encoding="utf-8", newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    for name, one in ll.spectra(module).items():
        assert float(rows[name]["effective rank"]) == pytest.approx(one.effective_rank)
        assert float(rows[name]["‖ΔW‖"]) == pytest.approx(one.norm)
