"""Folders as runs leave them, written by hand: nothing is trained."""

import csv
import json
from pathlib import Path

import yaml

SCORES = [
    {"name": "acc", "label": "accuracy %", "scale": 100, "digits": 1, "best": "max"},
    {"name": "top5", "label": "top-5 %", "scale": 100, "digits": 1, "best": "max"},
]
LABELS = {"none": "before adaptation", "lora": "LoRA", "linear_probe": "linear probe"}
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv")


def result(method: str, accuracy: float) -> dict:
    """Of one method, as results.json has it."""
    scores = {"acc": accuracy, "top5": min(1.0, accuracy + 0.3)}
    intervals = {"acc": [accuracy - 0.04, accuracy + 0.04]}
    trained = 0 if method == "none" else 1234
    seconds = None if method == "none" else 4.2
    cost = {"trained": trained, "total": 50000, "seconds": seconds, "checkpoint_bytes": 51200}
    return {"method": method, "scores": scores, "intervals": intervals, "scratch": False, **cost}


def metrics(folder: Path, layers=(), epochs: int = 3, name: str = "metrics.csv", first: int = 0) -> None:
    """A CSV file as Lightning's logger writes it: a row of steps, a row of validation, an epoch."""
    rows = []
    for epoch in range(first, first + epochs):
        step = 10 * epoch + 9
        rows.append({"step": step - 5, "epoch": "", "lr-AdamW/head": 0.1 / (epoch + 1)})
        rows.append(
            {"step": step, "epoch": epoch, "train/loss": 2 / (epoch + 1), "lora/grad_norm": 1 + epoch}
        )
        ranks = {f"lora/effective_rank/{name}": 3 + 0.1 * epoch + i for i, name in enumerate(layers)}
        rows.append({"step": step, "epoch": epoch, "val/loss": 1.9, "val/acc": 0.5 + 0.1 * epoch, **ranks})
    (folder / "csv").mkdir(parents=True, exist_ok=True)
    with open(folder / "csv" / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path, ended: bool = True, layers=LAYERS, accuracy: float = 0.6, **config) -> Path:
    """The folder of a run of LoRA that was compared with a linear probe and the base."""
    (folder / "report").mkdir(parents=True)
    values = {"model": {"name": "vit"}, "method": "lora", "compare": ["none", "linear_probe", "lora"],
              "seed": 0, "lora": {"rank": 4}, "run_dir": str(folder), **config}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    facts = {"recipe": "vit_digits", "about": "A small ViT, adapted to <digits>",
             "command": "lora-lightning train", "model": "vit", "data": "Digits", "versions": {"torch": "2"},
             "started": "2026-01-01 10:00"}  # fmt: skip
    metrics(folder, layers)
    metrics(folder / "linear_probe")
    if ended:
        results = [result("none", 0.4), result("linear_probe", 0.5), result(values["method"], accuracy)]
        (folder / "results.json").write_text(json.dumps(results))
        table = {"header": ["method", "accuracy %"], "rows": [[LABELS[r["method"]], "50.0"] for r in results]}
        facts |= {"scores": SCORES, "table": table, "device": "CPU", "seconds": 300.0,
                  "labels": [{"method": m, "label": LABELS[m]} for m in LABELS]}  # fmt: skip
        updates = [
            {"name": name, "kind": "weight", "rank": 4,
             "effective_rank": 2.5 + i, "norm": 0.5, "relative": 0.1 * (i + 1),
             "values": [0.4, 0.2, 0.1, 0.05]}
            for i, name in enumerate(layers)
        ]  # fmt: skip
        others = (("head.weight", "head", 7.0), ("norm.weight", "norm or bias", 3.0))
        updates += [{"name": n, "kind": kind, "norm": 1.0, "relative": size} for n, kind, size in others]
        (folder / "report" / "updates.json").write_text(json.dumps(updates))
    (folder / "report" / "run.json").write_text(json.dumps(facts))
    return folder
