"""RT-DETR in torchvision's convention: losses, boxes, local folders, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError

pytest.importorskip("transformers")
from transformers import DetrConfig, RTDetrImageProcessor, RTDetrV2Config, RTDetrV2ForObjectDetection

from lora_lightning.models.rtdetr import RTDetr, rtdetr

SMALL: dict[str, Any] = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 64],
    "decoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 2,
    "num_queries": 20, "num_denoising": 10, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "backbone_config": {
        "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64],
        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
    },
}  # fmt: skip


def small(num_classes: int = 3) -> RTDetr:
    torch.manual_seed(0)
    return rtdetr(num_classes, pretrained=False, image_size=64, **SMALL)


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    torch.manual_seed(1)
    images = [torch.rand(3, 50, 80), torch.rand(3, 70, 40)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 30, 30], [40, 10, 80, 50]]), "labels": torch.tensor([3, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


def test_the_losses_sum_to_the_models_own():
    model, (images, targets) = small().train(), batch()
    torch.manual_seed(2)
    losses = model(images, targets)
    assert set(losses) == {"loss_vfl", "loss_bbox", "loss_giou", "loss_denoising"}
    pixels = model.processor(images, size={"height": 64, "width": 64}, do_rescale=False, return_tensors="pt")
    labels = [
        {
            "class_labels": torch.tensor([2, 0]),
            "boxes": torch.tensor([[17.5 / 80, 0.35, 25 / 80, 0.5], [0.75, 0.6, 0.5, 0.8]]),
        },
        {"class_labels": targets[1]["labels"], "boxes": targets[1]["boxes"]},
    ]
    torch.manual_seed(2)
    own = model.model(pixel_values=pixels["pixel_values"], labels=labels).loss
    torch.testing.assert_close(sum(losses.values()), own)


def test_a_batch_without_objects_and_crowd_regions():
    model, (images, targets) = small().train(), batch()
    empty = model(images, [targets[1], targets[1]])
    assert empty["loss_bbox"].item() == 0
    torch.manual_seed(2)
    crowd = {**targets[0], "iscrowd": torch.tensor([0, 1])}
    ignored = model(images, [crowd, targets[1]])
    torch.manual_seed(2)
    without = {"boxes": targets[0]["boxes"][:1], "labels": targets[0]["labels"][:1]}
    assert ignored["loss_bbox"].item() == model(images, [without, targets[1]])["loss_bbox"].item()


def test_predictions_are_in_pixels_of_each_image():
    model, (images, _) = small().eval(), batch()
    with torch.no_grad():
        found = model(images)
        outputs = model.model(pixel_values=model._pixels(images))
    for one, image, boxes in zip(found, images, outputs.pred_boxes):
        assert {n: len(t) for n, t in one.items()} == {"scores": 20, "labels": 20, "boxes": 20}
        assert 1 <= int(one["labels"].min()) <= int(one["labels"].max()) <= 3
        assert bool((one["scores"].diff() <= 0).all())
        height, width = image.shape[-2:]
        centres = torch.stack([one["boxes"][:, [0, 2]].mean(1), one["boxes"][:, [1, 3]].mean(1)], 1)
        own = boxes[:, :2] * torch.tensor([width, height])
        assert float(torch.cdist(centres, own).amin(1).max()) < 1e-3


def test_lora_learns_and_ejects():
    """Every adapted layer gets a gradient; some steps on one batch bring the loss down."""
    model, (images, targets) = small().train(), batch()
    plan = ll.inject(model, ll.LoRAConfig(rank=4))
    assert any("class_embed" in head for head in plan.heads)
    assert any("encoder_attn.value_proj" in p.name for p in plan.layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(12):
        torch.manual_seed(3)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.7 * history[0]
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead
    with torch.no_grad():
        adapted = model.eval()(images)[0]
        ll.merge(model)
        merged = model(images)[0]
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def saved(folder: Path, model: RTDetr) -> Path:
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def test_a_local_folder_gives_the_same_model(tmp_path, capsys):
    model = small(3).eval()
    folder = saved(tmp_path, model)
    capsys.readouterr()
    again = rtdetr(3, checkpoint=str(folder), image_size=64).eval()
    images, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images))
    assert capsys.readouterr() == ("", "")


def test_other_classes_get_fresh_layers_and_no_others(tmp_path, capsys):
    model = small(3)
    folder = saved(tmp_path, model)
    capsys.readouterr()
    again = rtdetr(5, checkpoint=str(folder), image_size=64)
    before, after = model.state_dict(), again.state_dict()
    fresh = {n for n in before if before[n].shape != after[n].shape}
    assert all("class_embed" in n or "enc_score_head" in n for n in fresh)
    assert all(torch.equal(before[n], after[n]) for n in before if n not in fresh)
    assert again.model.config.num_labels == 5
    assert capsys.readouterr() == ("", "")


def test_the_processor_of_the_folder_is_used(tmp_path):
    model = small(3)
    model.processor = RTDetrImageProcessor(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    again = rtdetr(3, checkpoint=str(saved(tmp_path, model)), image_size=64)
    white = [torch.ones(3, 64, 64)]
    torch.testing.assert_close(again._pixels(white), torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(again._pixels([0 * white[0]]), -torch.ones(1, 3, 64, 64))


def test_the_second_version(tmp_path):
    model = RTDetrV2ForObjectDetection(RTDetrV2Config(num_labels=3, **SMALL))
    model.save_pretrained(tmp_path)
    again = rtdetr(3, checkpoint=str(tmp_path), image_size=64)
    assert set(again.train()(*batch())) == {"loss_vfl", "loss_bbox", "loss_giou", "loss_denoising"}


def test_folders_that_do_not_hold_it(tmp_path):
    with pytest.raises(MissingFileError, match=r"has no config\.json and no model\.safetensors"):
        rtdetr(3, checkpoint=str(tmp_path))
    folder = saved(tmp_path / "a", small(3))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError, match="cannot be loaded as RT-DETR"):
        rtdetr(3, checkpoint=str(folder))
    (folder / "config.json").write_text(json.dumps(DetrConfig().to_dict()))
    with pytest.raises(AdapterFileError, match="holds a detr; give one of rt_detr, rt_detr_v2"):
        rtdetr(3, checkpoint=str(folder))
    folder = saved(tmp_path / "b", small(3))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layers": 3}))
    with pytest.raises(
        AdapterFileError, match=r"does not fit RT-DETR as its own config\.json says.*\n.*missing"
    ):
        rtdetr(3, checkpoint=str(folder))


def test_code_in_the_folder_is_not_run(tmp_path, monkeypatch):
    """transformers asks on the terminal whether it shall run it; nobody is asked here."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = saved(tmp_path / "a", small(3))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="cannot be loaded as RT-DETR"):
        rtdetr(3, checkpoint=str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"holds adapter_config\.json: .* not loaded unasked"):
        rtdetr(3, checkpoint=str(folder))
    assert not (tmp_path / "marker").exists()


def test_offline_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingFileError) as error:
        rtdetr(3)
    for words in ("config.json, preprocessor_config.json, model.safetensors of PekingU/rtdetr_r50vd",
                  "models--PekingU--rtdetr_r50vd", "model.checkpoint=weights;"):  # fmt: skip
        assert words in str(error.value)


def test_every_bad_option_in_one_error():
    with pytest.raises(ConfigError) as error:
        rtdetr(0, image_size=100, num_querys=3)
    assert len(error.value.problems) == 3
    assert "image_size=100: give a multiple of 32. Did you mean 96?" in error.value.problems
    assert "Did you mean 'num_queries'" in str(error.value)
