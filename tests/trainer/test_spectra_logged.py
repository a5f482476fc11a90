"""What loggers are told of the updates after each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from small import Classifier, loader, trainer

import lora_lightning as ll


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
    wanted = ll.spectra(module).mean()
    assert told[1] == pytest.approx({f"lora/{name}": value for name, value in wanted.items()})
    assert 1 <= told[1]["lora/effective_rank"] <= 2 and told[1]["lora/relative_norm"] > 0


def test_each_layer_or_nothing(tmp_path: Path) -> None:
    recorder, silent = Recorder(), Recorder()
    found = ll.spectra(fit(tmp_path, recorder, spectra="layers"))
    told = recorder.of_updates()[-1]
    assert len(told) == 3 * (1 + len(found))
    for name, one in found.items():
        assert told[f"lora/stable_rank/{name}"] == pytest.approx(one.stable_rank)
    fit(tmp_path, silent, spectra="none")
    assert not silent.of_updates()
    with pytest.raises(ll.ConfigError, match="spectra='all': give one of mean, layers, none"):
        ll.LoRACallback(spectra="all")
