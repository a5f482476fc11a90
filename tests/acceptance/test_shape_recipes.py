"""The recipes of drawn shapes on a tiny budget: the table, the pictures, the adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora_lightning as ll
from lora_lightning.app.application import main
from lora_lightning.data.shapes import ShapesDataModule
from lora_lightning.models.base_file import SHIPPED
from lora_lightning.models.detection import detector
from lora_lightning.tasks.detection import ObjectDetector
from tests.terminal import beside_progress

SMALL = [
    "data.train_size=16", "data.val_size=6", "data.test_size=8", "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize("recipe", ["fcos_shapes", pytest.param("fasterrcnn_shapes", marks=pytest.mark.slow)])
def test_a_run_ends_with_the_table_and_pictures(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"recipe={recipe}", *SMALL])
    out, err = capsys.readouterr()
    assert beside_progress(err) == ""
    head, _, *rows = out[out.index("method ") :].splitlines()[:6]
    assert [row.split("  ")[0] for row in rows] == [
        "before adaptation", "linear probe", "LoRA", "full fine-tuning",
    ]  # fmt: skip
    scores = ["test mAP", "AP50", "AP medium", "AP large"]  # these few pictures have no small object
    assert re.split(" {2,}", head)[:5] == ["method", *scores]
    run = tmp_path / "run"
    results = {r["method"]: r for r in json.loads((run / "results.json").read_text())}
    assert (
        results["linear_probe"]["trained"] == {"fcos_shapes": 5770, "fasterrcnn_shapes": 3875}[recipe]
    )  # the heads'
    assert results["linear_probe"]["trained"] < results["lora"]["trained"] < results["full"]["trained"]
    assert all(0 <= r["scores"]["map"] <= r["scores"]["map_50"] <= 1 for r in results.values())
    sheet = Image.open(run / "contact_sheet.png")
    assert sheet.width > 1000 and sheet.height > 800
    page = (run / "report.html").read_text()
    assert page.count('<svg class="boxes"') == 2 * 3 * 8 and page.count("<figcaption>before<") == 2 * 8
    assert "false positives, " in out
    task = ObjectDetector(
        detector(recipe.replace("shapes", "small"), 4, checkpoint=recipe), **ShapesDataModule.provides
    )
    ll.load_adapter(task, run / "adapter")


def test_shipped_bases_find_the_shapes_of_their_own_domain() -> None:
    """A few pictures; the cards beside the weights have the scores of all."""
    shipped = sorted(p.stem for p in SHIPPED.glob("*_shapes.safetensors"))
    assert "fcos_shapes" in shipped
    data = ShapesDataModule("source", test_size=12)
    for name in shipped:
        task = ObjectDetector(
            detector(name.replace("shapes", "small"), 4, checkpoint=name), **data.provides
        ).eval()
        with torch.no_grad():
            for images, targets in data.test_dataloader():
                task.test_precision.update(task(images), targets)
        assert task.test_precision.compute()["map_50"] > 0.85
    assert sum(p.stat().st_size for p in SHIPPED.glob("*_shapes.safetensors")) < 8e6


def test_every_mistake_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = ["lora.detector_part=nek", "data.side=8", "task.area_scale=0", "data.domain=targt"]
    with pytest.raises(SystemExit) as caught:
        main(["recipe=fcos_shapes", *mistakes])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert all(m in err for m in mistakes) and err.count("Did you mean") == 2
