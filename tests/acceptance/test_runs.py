"""Whole runs on a tiny budget: what is on the screen, and what lies in the run folder."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torchvision.datasets import CIFAR10

from lora_lightning import load_adapter, quantize
from lora_lightning.app.application import main
from lora_lightning.app.rebuild import merge_files, rebuilt_model
from lora_lightning.files.locate import read_source
from lora_lightning.models.timm import timm_model
from tests.terminal import beside_progress

ROOT = Path(__file__).parents[2]
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
SMALL = ["data.train_size=64", "trainer.max_epochs=1", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def metrics(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_the_main_job_compares_four_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(SMALL)
    out, err = capsys.readouterr()
    assert beside_progress(err) == ""
    run = tmp_path / "run"
    methods = ["before adaptation", "linear probe", "LoRA", "full fine-tuning"]
    table = out[out.index("method ") :].splitlines()[2:6]
    assert [line.split("  ")[0] for line in table] == methods
    results = {r["method"]: r for r in json.loads((run / "results.json").read_text())}
    assert results["none"]["trained"] == 0
    assert results["linear_probe"]["trained"] == 96 * 10 + 10
    assert results["linear_probe"]["trained"] < results["lora"]["trained"] < results["full"]["trained"]
    assert results["full"]["trained"] == results["full"]["total"] == results["none"]["total"]
    assert results["lora"]["checkpoint_bytes"] * 4 < results["full"]["checkpoint_bytes"]
    truncate_list = out[out.index("In run:") :].splitlines()[1:]
    assert truncate_list
    for line in truncate_list:
        assert (run / line.split()[0]).exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["seed"] == 0
    page = (run / "report.html").read_text()
    assert all(f'<td class="name">{name}</td>' in page for name in methods if name != "LoRA")
    assert all(f"<h2>{head}</h2>" in page for head in ("Methods", "Losses", "What changed most", "Classes"))
    facts = json.loads((run / "report" / "run.json").read_text())
    assert facts["command"] == " ".join(["lora-lightning train", *map(shlex.quote, SMALL)]).replace(
        " hydra.run.dir=run", ""
    )
    assert "model.blocks.*.attn.qkv" in out
    assert "trainable: " in out
    assert "\x1b" not in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_the_adapter_gives_the_tested_model(tmp_path: Path) -> None:
    main([*SMALL, "compare=[]", "logger=none"])
    model = timm_model("vit_tiny_patch16_224", checkpoint="vit_digits", **VIT)
    load_adapter(model, tmp_path / "run" / "adapter")
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    state = model.state_dict()
    trained = {k.removeprefix("model."): v for k, v in best.items() if k.startswith("model.") and v.numel()}
    assert trained
    assert len(trained) < len(state) / 1.5
    for name, value in trained.items():
        assert torch.equal(state[name], value), name


def test_a_quantized_base_is_merged_as_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*SMALL, "logger=none", "lora.quantize=int8"])
    results = {r["method"]: r for r in json.loads((tmp_path / "run" / "results.json").read_text())}
    assert results["full"]["trained"] == results["full"]["total"]  # the others keep their floats
    assert "frozen in int8: 16 weights, 0.456 MB instead of 1.77" in capsys.readouterr().out
    merge_files(tmp_path / "run" / "adapter", tmp_path / "merged.safetensors")
    merged = timm_model("vit_tiny_patch16_224", checkpoint=str(tmp_path / "merged.safetensors"), **VIT)
    model = timm_model("vit_tiny_patch16_224", checkpoint="vit_digits", **VIT)
    quantize(model, "int8")
    load_adapter(model, tmp_path / "run" / "adapter")
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(merged.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    source = read_source(tmp_path / "run" / "adapter")  # as `predict` and `transcribe` build it
    rebuilt = rebuilt_model(source.config(), source, {"num_classes": 10})[0]
    load_adapter(rebuilt, tmp_path / "run" / "adapter")
    assert torch.equal(rebuilt.eval()(x), model(x))


def test_every_seed_is_repeatable(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(["debug=fast", f"seed={seed}", "logger=csv", f"hydra.run.dir={folder}"])
    losses = [
        [row["train/loss"] for row in metrics(tmp_path / f / "csv" / "metrics.csv") if row["train/loss"]]
        for f in "abc"
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] != losses[2]


def test_a_sweep_runs_each_value_and_ends_with_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["debug=fast", "-m", "lora.rank=2,4", "hydra.sweep.dir=sweep", "trainer.enable_progress_bar=false"])
    out = capsys.readouterr().out
    last = out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in last[2:4]] == ["lora.rank=2", "lora.rank=4"]
    for job, rank in (("0", 2), ("1", 4)):
        assert yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())["lora"]["rank"] == rank
        config = json.loads((tmp_path / "sweep" / job / "adapter" / "adapter_config.json").read_text())
        assert config["config"]["rank"] == rank


def test_resume_goes_on_where_the_run_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "compare=[]"])
    last = "ckpt_path=run/checkpoints/last.ckpt"
    main([*SMALL[:1], "trainer.max_epochs=2", "compare=[]", last, "hydra.run.dir=more"])
    out, err = capsys.readouterr()
    assert "resumed from run/checkpoints/last.ckpt" in out
    assert "epoch 2/2" in err
    rows = metrics(tmp_path / "more" / "csv" / "metrics.csv")
    assert {row["epoch"] for row in rows if row["val/acc"]} == {"1"}
    for words, told in [
        (["trainer.max_epochs=1"], "trainer.max_epochs above 1"),
        (
            ["trainer.max_epochs=2", "lora.rank=2"],
            "ckpt_path=run/checkpoints/last.ckpt: the checkpoint does not fit",
        ),
        (["trainer.max_epochs=2", "method=full"], "made by another configuration"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main([*SMALL[:1], "compare=[]", last, "hydra.run.dir=bad", *words])
        assert caught.value.code == 2
        assert told in capsys.readouterr().err


def test_the_last_checkpoint_is_of_the_last_epoch_the_best_or_not(tmp_path: Path) -> None:
    epochs = set()
    for mode in ("max", "min"):  # one of which has its best epoch before the last
        words = ["trainer.max_epochs=3", "compare=[]", f"hydra.run.dir={mode}"]
        main([SMALL[0], *words, f"callbacks.checkpoint.mode={mode}"])
        checkpoints = tmp_path / mode / "checkpoints"
        best, last = (torch.load(checkpoints / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
        assert (last["epoch"], last["global_step"]) == (2, 6)
        epochs.add(best["epoch"])
    assert epochs != {2}


def test_every_logger_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(
        [
            "debug=fast",
            "compare=[none,linear_probe,lora,full]",
            "logger=many",
            "hydra.run.dir=run",
            "trainer.enable_progress_bar=false",
        ]
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"val/acc", "test/acc", "train/loss"} <= set(events.Tags()["scalars"])
    assert {"plan/text_summary", "results/text_summary"} <= set(events.Tags()["tensors"])
    rows = metrics(tmp_path / "run" / "csv" / "metrics.csv")
    assert any(row["test/acc"] for row in rows)
    assert any(value for row in rows for key, value in row.items() if key.startswith("lr-"))
    assert yaml.safe_load((tmp_path / "run" / "csv" / "hparams.yaml").read_text())["parameters"]["total"] > 0
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_pretraining_ends_with_weights_that_a_recipe_takes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"recipe=pretrain_{kind}_digits", *SMALL, "logger=none"])
    file = tmp_path / "run" / "model.safetensors"
    shipped = ROOT / "lora_lightning" / "models" / "weights" / f"{kind}_digits.safetensors"
    made, kept = load_file(file), load_file(shipped)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in kept.items()}
    assert "(100 %)" in capsys.readouterr().out
    words = ["debug=fast", f"model.checkpoint={file}", "hydra.run.dir=adapted", "logger=none"]
    main([f"recipe={kind}_digits", *words])
    assert (tmp_path / "adapted" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("debug", ["overfit", "profile"])
def test_debug(debug: str, tmp_path: Path) -> None:
    main([f"debug={debug}", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=run"])
    assert (tmp_path / "run" / "fit-profile.txt").exists() == (debug == "profile")


def test_cifar_offline_names_everything_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SystemExit) as caught:
        main(["recipe=vit_cifar", "logger=none", "trainer=cpu"])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    for words in ("cifar-10-batches-py", "data.download=true", "data.root=", "vit_base", "model.checkpoint="):
        assert words in message
    assert "Traceback" not in message


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in CIFAR-10's own files, with the checksums that torchvision will look for."""
    sums = {}
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]):
        data = np.random.default_rng(seed).integers(0, 256, (20, 3072), dtype=np.uint8)
        content: dict[str, Any] = {"data": data, "labels": [i % 10 for i in range(20)]}
        if name == "batches.meta":
            content = {"label_names": [f"class {i}" for i in range(10)]}
        file = folder / "cifar-10-batches-py" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums.pop("batches.meta")})
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums.pop("test_batch")]])
    monkeypatch.setattr(CIFAR10, "train_list", [list(item) for item in sums.items()])


def test_cifar_with_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe as it is, mixed precision and mixup included, with a small ViT saved on disk."""
    write_cifar10(tmp_path / "sets", monkeypatch)
    small = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    base = timm_model("vit_base_patch16_224", num_classes=1000, **small)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    words = [
        "model.name=vit_base_patch16_224",
        "model.checkpoint=base.safetensors",
        "data.root=sets",
        "logger=csv",
    ]
    words += [f"+model.{name}={value}" for name, value in small.items()]
    words += ["data.val_share=0.2", "data.batch_size=16", "data.num_workers=0", "trainer=cpu", "debug=fast"]
    main(["recipe=vit_cifar", *words, "compare=[none,linear_probe,lora,full]", "hydra.run.dir=run"])
    results = {r["method"]: r for r in json.loads((tmp_path / "run" / "results.json").read_text())}
    assert results["lora"]["trained"] < results["lora"]["total"]
    rows = metrics(tmp_path / "run" / "csv" / "metrics.csv")
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    )


def test_help_is_a_page_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    handler = signal.getsignal(signal.SIGINT)  # which train.py changes
    try:
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert caught.value.code == 0
    page = capsys.readouterr().out
    for words in (
        "lora-lightning train recipe=resnet_digits",
        "recipe: accent_espeak",
        "rank: ",
        "--multirun",
    ):
        assert words in page
    assert "Powered by Hydra" not in page
    assert all(len(line) <= 100 for line in page.splitlines())
