"""Boxes and masks served: those of the adapted models, each adapter its own."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from desk import client_of
from jsonschema import validate
from PIL import Image
from safetensors.torch import save_file
from served import engine_for, picture, varied
from torch import nn

import lora_lightning as ll
from lora_lightning.models.detection import detector
from lora_lightning.models.timm_segmentation import timm_segmenter
from lora_lightning.serving.described import ANSWERS
from lora_lightning.serving.inputs import Limits

TRAINER = {"accelerator": "cpu", "precision": "32-true"}
SHAPES = ["disc", "box", "triangle", "star"]
GROUNDS = {
    "num_classes": 3, "class_names": ["ground", "plant", "weed"], "shorter_side": 32,
    "mean": [0.5] * 3, "std": [0.25] * 3,
}  # fmt: skip
SMALL = {"name": "vit_tiny_patch16_224", "embed_dim": 48, "num_heads": 2, "depth": 2, "head_width": 16}


def config_of(model: str, task: str, data: str, **options) -> dict:
    return {
        "model": {"_target_": f"lora_lightning.models.{model}", **options},
        "data": {"_target_": f"lora_lightning.data.{data}"},
        "task": {"_target_": f"lora_lightning.tasks.{task}"},
        "trainer": TRAINER,
    }


def save(model: nn.Module, folder: Path, seed: int, config: dict, facts: dict) -> nn.Module:
    ll.inject(model, ll.LoRAConfig(rank=2))
    varied(model, seed)
    ll.save_adapter(model, folder, origin={"recipe": "own", "config": config, "facts": facts})
    return model.eval()


def save_shapes(folder: Path, seed: int, names: list[str] | None = SHAPES) -> nn.Module:
    options = {"name": "fcos_small", "checkpoint": "fcos_shapes"}
    config = config_of("detection.detector", "detection.ObjectDetector", "shapes.ShapesDataModule", **options)
    facts = {"num_classes": len(SHAPES), **({"class_names": names} if names else {})}
    return save(detector(num_classes=len(SHAPES), **options), folder, seed, config, facts)


def save_grounds(folder: Path, seed: int, **more) -> nn.Module:
    file = folder.parent / "base.safetensors"
    if not file.exists():
        whole = timm_segmenter(num_classes=3, **SMALL)
        save_file({n: t.contiguous() for n, t in whole.state_dict().items()}, file)
    base = timm_segmenter(num_classes=3, checkpoint=str(file), **SMALL)
    options = {**SMALL, "checkpoint": str(file)}
    config = config_of(
        "timm_segmentation.timm_segmenter", "segmentation.SemanticSegmenter", "masks.MasksDataModule",
        **options,
    )  # fmt: skip
    return save(base, folder, seed, config, {k: v for k, v in {**GROUNDS, **more}.items() if v is not None})


@torch.no_grad()
def test_boxes_are_those_of_the_adapted_model(tmp_path: Path) -> None:
    models = {name: save_shapes(tmp_path / name, seed) for seed, name in enumerate(["ada", "bob"])}
    engine = engine_for({"adapters": str(tmp_path)}, Limits())
    client, body = client_of(engine), picture(1, (128, 96))
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(body))))
    image = pixels.permute(2, 0, 1).float() / 255
    answers = []
    for name, model in models.items():
        answer = client.post(f"/v1/detect?adapter={name}&score=0.02", content=body).json()
        found = model([image])[0]
        sure = found["scores"] >= 0.02
        assert sure.any() and (answer["width"], answer["height"]) == (128, 96)
        scores = [p["score"] for p in answer["predictions"]]
        assert scores == pytest.approx(found["scores"][sure].tolist(), abs=1e-5)
        boxes = torch.tensor([p["box"] for p in answer["predictions"]])
        torch.testing.assert_close(boxes, found["boxes"][sure], rtol=1e-4, atol=1e-3)
        labels = [SHAPES[n - 1] for n in found["labels"][sure].tolist()]
        assert [p["label"] for p in answer["predictions"]] == labels
        answers.append(answer["predictions"])
        validate(answer, ANSWERS["detect"])
    assert answers[0] != answers[1]
    fewer = client.post("/v1/detect?adapter=ada&score=0.999", content=body).json()
    assert fewer["predictions"] == []
    refused = client.post("/v1/segment?adapter=ada", content=body)
    assert refused.status_code == 404 and "use /v1/detect" in refused.json()["error"]["message"]
    strip = client.post("/v1/detect?adapter=ada", content=picture(1, (5000, 1)))
    assert strip.status_code == 422 and "50 times as long as wide" in strip.json()["error"]["message"]
    engine.close()


@torch.no_grad()
def test_masks_are_those_of_the_adapted_model(tmp_path: Path) -> None:
    models = {name: save_grounds(tmp_path / name, seed) for seed, name in enumerate(["ada", "bob"])}
    save_grounds(tmp_path / "sizeless", 3, shorter_side=None)
    engine = engine_for({"adapters": str(tmp_path), "base": str(tmp_path / "sizeless")}, Limits())
    client, body = client_of(engine), picture(1, (48, 32))
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(body)))).permute(2, 0, 1)
    image = (pixels.float() / 255 - 0.5) / 0.25  # its shorter side is the 32 of the facts
    for name, model in models.items():
        answer = client.post(f"/v1/segment?adapter={name}", content=body).json()
        mask = np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
        logits = model(image[None])
        wanted = (logits if isinstance(logits, torch.Tensor) else logits["out"])[0].argmax(0).numpy()
        assert mask.shape == (32, 48) and (mask == wanted).mean() > 0.999  # but for ties
        assert [c["label"] for c in answer["classes"]] == GROUNDS["class_names"]
        shares = [float((mask == c["value"]).mean()) for c in answer["classes"]]
        assert [c["share"] for c in answer["classes"]] == pytest.approx(shares)
        validate(answer, ANSWERS["segment"])
    refused = client.post("/v1/segment?adapter=sizeless", content=body)
    assert refused.status_code == 409 and "how pictures were shown" in refused.json()["error"]["message"]
    strip = client.post("/v1/segment?adapter=ada", content=picture(1, (5000, 1)))
    assert strip.status_code == 422 and "50 times as long as wide" in strip.json()["error"]["message"]
    engine.close()
