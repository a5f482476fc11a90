"""How a training shows its progress: a bar on a terminal, a line for each epoch in a file."""

from __future__ import annotations

import itertools
import re
import types
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll
from lora_lightning.app.progress import Progress, samples_of
from lora_lightning.tasks.scores import Score
from lora_lightning.utils import progress
from tests.terminal import Terminal, seen


class Task(pl.LightningModule):
    """Trains eight parameters, three with LoRA's callback; its loss is 0.5, its score 0.75."""

    scores = (Score("acc", "accuracy %"),)

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0 * self.model(batch[0]).sum() + 0.5

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/acc", 0.75)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/acc", 0.75)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def loader(count: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=4)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", enable_model_summary=False, callbacks=[Progress("LoRA"), *callbacks], **options
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, where nothing of the surroundings is known."""
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    for name in ("CI", "NO_COLOR", "JPY_PARENT_PID", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


LINE = "LoRA                epoch {}  loss 0.500  val/acc 75.0  0:00  {} trained"


def test_a_file_gets_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().fit(Task(), loader(), loader())
    out, err = capsys.readouterr()
    assert err.splitlines() == [LINE.format("1/2", 3), LINE.format("2/2", 3)]
    assert "epoch" not in out


def test_the_parameters_that_train_are_those_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ll.LoRACallback(rank=1, target_modules="all", modules_to_save=None, verbose=False)).fit(
        Task(), loader(), loader()
    )
    assert capsys.readouterr().err.splitlines()[-1] == LINE.format("2/2", 3)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, ["1/3", "2/3", "3/3"]),
        ({"val_check_interval": 0.5}, ["1/2", "1/2", "2/2", "2/2"]),
        ({"max_epochs": -1, "max_steps": 3}, ["1", "2"]),
        ({"limit_val_batches": 0}, ["1/2", "2/2"]),
        ({"accumulate_grad_batches": 2}, ["1/2", "2/2"]),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_epochs_without_a_validation_and_with_several(
    options: dict[str, Any],
    epochs: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))
    trainer(**options).fit(Task(), loader(), loader())
    assert re.findall(r"epoch (\S+)", capsys.readouterr().err) == epochs


def test_a_terminal_keeps_the_last_frame_of_each_training() -> None:
    with Terminal() as terminal:
        running = trainer()
        running.fit(Task(), loader(), loader())
        running.test(Task(), loader(), verbose=False)
    lines = seen(terminal.getvalue()).lines
    bar = "━" * 26  # of 28, that all may be told
    assert [line for line in lines if "━" in line] == [
        f"LoRA               {bar}  epoch 2/2  loss 0.500  val/acc 75.0  0:00  3 trained"
    ]
    assert lines[-1] == ""
    assert "\x1b[?25" not in terminal.getvalue()


def test_ctrl_c_leaves_a_whole_line() -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with Terminal() as terminal, pytest.raises(SystemExit):
        trainer(Interrupts()).fit(Task(), loader(), loader())
    lines = seen(terminal.getvalue()).lines
    assert [line.split("  ")[0] for line in lines if "━" in line] == ["LoRA"]
    assert progress._open == []


def test_other_ranks_show_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    trainer().fit(Task(), loader(), loader())
    assert "epoch" not in capsys.readouterr().err


def test_samples_are_those_of_the_first_part_of_a_batch() -> None:
    images = torch.ones(5, 2)
    for batch in (images, [images, torch.ones(3)], (list(images), ["a"]), {"x": images, "y": 1}):
        assert samples_of(batch) == 5
    assert [samples_of(batch) for batch in (None, [], {}, torch.tensor(1.0), (3,))] == [0, 0, 0, 1, 0]


def test_the_speed_is_that_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of training, of which the validation takes four more."""
    now = [0.0]
    ticking = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(progress, "time", ticking)
    monkeypatch.setattr("lora_lightning.app.progress.time", ticking)

    class Ticks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 5

        def on_validation_batch_end(self, *_: Any) -> None:
            now[0] += 2

    with Terminal() as terminal:
        trainer(Ticks(), max_epochs=1, num_sanity_val_steps=0).fit(Task(), loader(40), loader())
    last = seen(terminal.getvalue()).lines[-2]
    assert "0:54" in last
    assert "1.25 s each" in last or "0.8 samples/s" in last
