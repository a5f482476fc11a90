"""What of an adapter is uploaded: its files without this machine's paths, a true card, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import mlp

import lora_lightning as ll
from lora_lightning.app.upload import upload_of
from lora_lightning.app.wandb_artifact import artifact_name, log_adapter
from lora_lightning.errors import UserError
from lora_lightning.files.locate import read_any
from lora_lightning.files.weights import write_weights

SECRET = "/home/somebody/private"
CONFIG: dict[str, Any] = {
    "model": {
        "_target_": "lora_lightning.models.timm.timm_model",
        "name": "resnet18",
        "pretrained": True,
        "checkpoint": None,
        "saved": f"local-dir:{SECRET}/model",
        "deep": {"list": [f"{SECRET}/a.safetensors", "timm/vit"]},
    },
    "data": {"_target_": "lora_lightning.data.digits.DigitsDataModule", "domain": "target"},
    "task": {"_target_": "lora_lightning.tasks.classification.ImageClassifier"},
}
FACTS = {"class_names": ["cat | <b>", "dog`\n# x"], "num_classes": 2}
RESULTS = [
    {"method": "none", "scores": {"acc": 0.5, "f1": 0.4}, "intervals": {"acc": [0.4, 0.6]}},
    {"method": "lora", "scores": {"acc": 0.9, "f1": 0.8}, "intervals": {"acc": [0.85, 0.95]}},
]


@pytest.fixture(params=["lora_lightning", "peft"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a run with its adapter and more than is to be uploaded."""
    folder = tmp_path / "run"
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    origin = {"recipe": "mine", "config": CONFIG, "facts": FACTS}
    ll.save_adapter(model, folder / "adapter", format=request.param, origin=origin)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "method": "lora"}))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "adapter" / "notes.txt").write_text(SECRET)
    (folder / "adapter" / "optimizer.pt").write_bytes(b"no")
    write_weights(folder / "base.safetensors", mlp().state_dict(), {})
    return folder


def test_only_the_adapter_and_its_card_go_and_no_path(run: Path) -> None:
    about = run / "adapter" / "adapter_config.json"
    if "peft_type" in (values := json.loads(about.read_text())):  # PEFT writes the base's folder there
        about.write_text(json.dumps({**values, "base_model_name_or_path": f"{SECRET}/base"}))
    with upload_of(run, "hf:me/mine") as upload:
        assert set(upload.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        everything = b"".join(path.read_bytes() for path in upload.files.values())
        assert SECRET.encode() not in everything and b"somebody" not in everything
        assert SECRET not in json.dumps([upload.metadata, upload.base])
        assert f"local-dir:{SECRET}/model" in upload.changed.values()
        assert f"stay in {run / 'base.safetensors'}" in upload.lacking
        saved = read_any(upload.files["README.md"].parent)
        assert saved.origin.config["model"]["saved"] == "local-dir:model"
        assert saved.origin.config["model"]["deep"]["list"] == ["a.safetensors", "timm/vit"]
        assert saved.tensors.keys() == read_any(run / "adapter").tensors.keys()
        gone = upload.files["README.md"].parent
    assert not gone.exists()
    with upload_of(run / "adapter", with_base=True) as upload:
        assert "base.safetensors" in upload.files and not upload.lacking


def test_the_card_is_the_hubs_and_true(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    with upload_of(run, "hf:me/mine@v1", license="mit") as upload:
        text = upload.files["README.md"].read_text()
    card = hub.ModelCard(text)
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found == {"accuracy %": 90.0, "macro F1 %": 80.0}
    assert card.data.model_name == "mine" and card.data.license == "mit"
    assert (
        card.data.base_model == "timm/resnet18.a1_in1k" and card.data.pipeline_tag == "image-classification"
    )
    assert "| accuracy % | 50.0 (40.0–60.0) | 90.0 (85.0–95.0) |" in text
    assert "apache-2.0" in text and 'll.load_adapter(model, "hf:me/mine@v1")' in text
    assert ("PeftModel.from_pretrained(base, " in text) == (card.data.library_name == "peft")
    assert "<b>" not in text and "cat \\| \\<b\\>" in text and "\n# x" not in text
    assert upload.metadata["scores"]["acc"] == 0.9 and upload.metadata["scores_before"]["acc"] == 0.5


def test_results_are_told_of_what_was_tested_alone(run: Path) -> None:
    shutil.copytree(run / "adapter", run / "smaller")
    with upload_of(run / "smaller") as upload:
        assert "## Results" not in upload.files["README.md"].read_text() and upload.metadata["scores"] == {}
    (run / "results.json").write_text('[{"method": "lora", "scores": [1]}, 3]')
    with upload_of(run) as upload:
        assert "## Results" not in upload.files["README.md"].read_text()


def test_weights_are_no_adapter(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", mlp().state_dict(), {})
    with pytest.raises(UserError, match="no adapter"), upload_of(tmp_path):
        pass


def test_of_a_run_of_wandb_the_base_is_what_it_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    calls: list[tuple[str, Any, Any]] = []

    class Online:
        offline = False

        def use_artifact(self, artifact: Any) -> None:
            calls.append(("used", artifact, None))

        def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
            calls.append(("logged", artifact, aliases))
            return artifact

    with upload_of(run) as upload:
        log_adapter(Online(), upload, "mine", ["best", "last"])
    (_, base, _), (_, logged, aliases) = calls
    assert (
        base.type == "base-model" and base.name == "resnet18" and list(base.manifest.entries) == ["base.json"]
    )
    assert logged.name == "mine" and logged.type == "model" and aliases == ["best", "last"]
    assert set(logged.manifest.entries) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert logged.metadata["base"] == "resnet18" and logged.metadata["scores"]["acc"] == 0.9
    assert artifact_name("a b/c (d)") == "a-b-c-d"
