"""ObjectDetector in a Trainer: what it logs, how it scores, what its report and W&B's pictures show."""

import json
import re
import types

import pytest
import torch
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.report.page import left
from lora_lightning.tasks.average_precision import AveragePrecision, scores_of
from lora_lightning.tasks.detection import ObjectDetector
from lora_lightning.tasks.detection_pictures import MISSED, RIGHT, WRONG, found_boxes, judge

NAMES = ["disc", "box"]
COUNTS = r'<tr data-state="(\w+)">.*?</td>' + 3 * r'<td class="number">(\d+)</td>'


def target(image_id, boxes, labels, **more):
    boxes, labels = torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "image_id": image_id, **more}


def prediction(boxes, labels, scores):
    found = target(0, boxes, labels, scores=torch.tensor(scores).float())
    found.pop("image_id")
    return found


class Finder(nn.Module):
    """In eval mode finds a disc of a learned place and size in every image; in train mode two losses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, images, targets=None):
        boxes = [self.head(self.body(image).mean((1, 2))) for image in images]
        if self.training:
            distance = [(b - t["boxes"][:1] / 10).abs().mean() for b, t in zip(boxes, targets, strict=True)]
            return {"loss_box": torch.stack(distance).mean(), "loss_nothing": 0 * boxes[0].sum()}
        return [
            {"boxes": 10 * b[None], "labels": torch.tensor([1]), "scores": torch.tensor([0.9])} for b in boxes
        ]


class Scenes(LightningDataModule):
    provides = {"num_classes": 2, "class_names": NAMES}

    def __init__(self, count=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(count, 3, 24, 32, generator=generator)
        self.scenes = [(image, target(i, [[4, 5, 20, 15]], [1])) for i, image in enumerate(images)]

    def loader(self):
        return DataLoader(self.scenes, 2, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))

    train_dataloader = val_dataloader = test_dataloader = loader


def trainer(**options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1, **options,
    )  # fmt: skip


@pytest.fixture
def detector():
    seed_everything(0, verbose=False)
    return ObjectDetector(Finder(), 2, NAMES, optim={"lr": 0.1})


def test_it_learns_and_logs_every_loss_and_score_by_name(detector):
    fitter = trainer(max_epochs=40)
    fitter.fit(detector, datamodule=Scenes())
    logged = fitter.callback_metrics
    assert {"train/loss", "train/loss_box", "train/loss_nothing", "val/map", "val/map_50"} <= set(logged)
    assert logged["train/loss"] == logged["train/loss_box"] + logged["train/loss_nothing"]
    assert logged["val/map_50"] > 0.9
    (test,) = fitter.test(detector, Scenes().loader(), verbose=False)
    assert test["test/map/disc"] == test["test/map"] == test["test/map_small"]
    assert "test/map/box" not in test and "test/map_large" not in test, "there is none to find"


def test_scores_are_those_of_cocos_evaluation():
    """One right, one at an IoU of 0.62: known by hand."""
    precision = AveragePrecision(per_class=True)
    truth = [target(7, [[0, 0, 10, 10], [20, 0, 30, 10]], [1, 2])]
    found = [prediction([[0, 0, 10, 10], [20, 0, 30, 6.2]], [1, 2], [0.9, 0.8])]
    precision.update(found, truth)
    scores = scores_of(precision.compute(), NAMES)
    assert scores["map/disc"] == pytest.approx(1) and scores["map_50"] == pytest.approx(1)
    assert scores["map/box"] == pytest.approx(0.3)  # found at 0.5, 0.55 and 0.6 of ten thresholds
    assert scores["map"] == pytest.approx(0.65)


def test_an_image_seen_twice_counts_once():
    truth = [target(i, [[0, 0, 10, 10]], [1]) for i in range(2)]
    found = [prediction([[0, 0, 10, 10]], [1], [0.9]), prediction([], [], [])]
    once, twice = AveragePrecision(), AveragePrecision()
    once.update(found, truth)
    twice.update(found, truth)
    twice.update(found[:1], truth[:1])
    assert once.compute()["map"] == twice.compute()["map"] == pytest.approx(0.5, abs=0.01)


def test_the_order_of_images_does_not_move_ties():
    generator = torch.Generator().manual_seed(0)
    corners = 20 * torch.rand(30, 2, generator=generator)
    truth = [target(i, [[*c, *(c + 10)]], [1]) for i, c in enumerate(corners)]
    noise = 4 * torch.rand(30, 4, generator=generator)
    found = [prediction((t["boxes"][0] + n).tolist(), [1], [0.5]) for t, n in zip(truth, noise, strict=True)]
    scores = []
    for order in (range(30), torch.randperm(30, generator=generator).tolist()):
        precision = AveragePrecision()
        for i in order:
            precision.update([found[i]], [truth[i]])
        scores.append(precision.compute()["map"].item())
    assert scores[0] == scores[1] and 0 < scores[0] < 1


def test_area_scale_moves_the_limits_of_sizes_and_nothing_else():
    truth, found = [target(0, [[0, 0, 20, 20]], [1])], [prediction([[0, 0, 20, 18]], [1], [0.9])]
    scores = []
    for scale in (1.0, 4.0):
        precision = AveragePrecision(area_scale=scale)
        precision.update(found, truth)
        scores.append(scores_of(precision.compute(), NAMES))
    assert scores[0]["map"] == scores[1]["map"] == pytest.approx(0.9)  # an IoU of 0.9, all but 0.95
    assert "map_small" in scores[0] and "map_medium" in scores[1] and "map_small" not in scores[1]


def test_masks_are_scored_beside_boxes():
    mask = torch.zeros(1, 24, 32)
    mask[0, 2:12, 2:12] = 1
    truth = [target(0, [[2, 2, 12, 12]], [1], masks=mask.byte())]
    found = [{**prediction([[2, 2, 12, 12]], [1], [0.9]), "masks": 0.9 * mask[:, None]}]
    precision = AveragePrecision(masks=True)
    precision.update(found, truth)
    scores = scores_of(precision.compute(), NAMES)
    assert scores["map"] == scores["mask_map"] == pytest.approx(1)


def test_head_lr_is_the_rate_of_the_predicting_layers():
    detector = ObjectDetector(Finder(), 2, NAMES, optim={"lr": 0.1, "head_lr": 0.3})
    detector.trainer = types.SimpleNamespace(estimated_stepping_batches=10, gradient_clip_val=None)
    groups = detector.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): g["initial_lr"] for g in groups for p in g["params"]}
    assert rates[id(detector.model.head.weight)] == 0.3 and rates[id(detector.model.body.weight)] == 0.1


def test_every_bad_option_is_named():
    with pytest.raises(ConfigError) as caught:
        ObjectDetector(Finder(), 2, ["disc"], {"learning_rate": 1}, area_scale=0, score_threshold=50)
    assert [p.split("=")[0].split()[0] for p in caught.value.problems] == [
        "optim.learning_rate", "area_scale", "score_threshold", "class_names",
    ]  # fmt: skip


def test_the_surest_prediction_takes_an_object_and_the_next_is_a_false_positive():
    truth = target(0, [[0, 0, 10, 10], [20, 20, 30, 30]], [1, 2])
    found = prediction([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], [1, 1, 1], [0.6, 0.9, 0.8])
    verdict = judge(found, truth)
    assert verdict.right == [False, True, False] and verdict.found == [True, False]
    assert [colour for _, colour, _ in found_boxes(found, truth, NAMES)] == [MISSED, WRONG, RIGHT, WRONG]


def test_crowds_are_neither_missed_nor_false():
    truth = target(0, [[0, 0, 40, 40]], [1], iscrowd=torch.tensor([1]))
    assert judge(prediction([], [], []), truth).mistakes == 0
    found = prediction([[0, 0, 40, 38], [0, 2, 40, 40]], [1, 1], [0.9, 0.8])
    assert judge(found, truth).mistakes == 0


def test_the_report_shows_truth_before_and_after(detector, tmp_path):
    lora = ll.LoRACallback(rank=4, target_modules=["body"], verbose=False)
    fitter = trainer(max_epochs=40, callbacks=[lora])
    fitter.fit(detector, datamodule=Scenes())
    assert detector.report(Scenes(), tmp_path) == [] and not detector.confusion(), "nothing was tested"
    (scores,) = fitter.test(detector, Scenes().loader(), verbose=False)
    before, intervals = detector.before(), detector.intervals()
    assert before["scores"]["map"] == 0 and before["intervals"]["map"] == (0, 0)
    assert intervals.keys() == {"map", "map_50"} and intervals["map"][0] <= scores["test/map"]
    assert detector.confusion().names == [*NAMES, "background"]
    assert detector.confusion().counts == [[5, 0, 0], [0, 0, 0], [0, 0, 0]]
    lines = detector.report(Scenes(), str(tmp_path))
    page = "".join(section.html for section in left(tmp_path)[1])
    assert all(page.count(f"<figcaption>{s}</figcaption>") == 5 for s in ("truth", "before", "after"))
    assert page.count("<image") == 5 and page.count('<use href="#image') == 2 * 5, "each picture once"
    counted = {s: [*map(int, n)] for s, *n in re.findall(COUNTS, page)}
    assert counted == {"before": [0, 5, 5], "after": [5, 0, 0]}  # right, false, missed
    assert "a score of at least 0.5" in page
    titles = [section.title for section in left(tmp_path)[1]]
    assert titles == ["Boxes in test images", "What is taken for what", "Precision by class"]
    assert page.count("confusion matrix of boxes") == 4, "before and after, each in a label and a text"
    assert lines[0].startswith("after training: 5 right, 0 false positives, 0 missed in 5 images")
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000
    assert detector.model.training, "as it was"


def test_a_page_costs_no_further_pass_over_the_test_data(detector, tmp_path):
    calls = []
    detector.model.register_forward_hook(lambda *_: calls.append(1))
    lora = ll.LoRACallback(rank=4, target_modules=["body"], verbose=False)
    fitter = trainer(max_epochs=1, callbacks=[lora])
    fitter.fit(detector, datamodule=Scenes())
    for pictured, states in ((True, 2), (False, 1)):
        detector.pictured = pictured
        calls.clear()
        fitter.test(detector, Scenes().loader(), verbose=False)
        assert bool(detector.report(Scenes(), tmp_path)) == pictured == bool(detector.examples(Scenes(), 2))
        assert len(calls) == states * 3, "three batches"


def test_a_base_is_not_said_to_be_trained(detector, tmp_path):
    detector.now = "base"
    trainer().test(detector, Scenes().loader(), verbose=False)
    assert detector.before() == {}
    lines = detector.report(Scenes(), tmp_path)
    page = "".join(section.title + section.html for section in left(tmp_path)[1])
    assert lines[0].startswith("of the base: ") and "5 images" in lines[0]
    assert (
        ">after<" not in page
        and "after training" not in page
        and page.count("<figcaption>base</figcaption>") == 10
    )
    assert [one.words["base"] for one in detector.examples(Scenes(), 2)] == ["0 right, 1 wrong, 1 missed"] * 2


def test_wandb_gets_boxes_in_its_own_format(detector, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    # Lightning's `offline` sets a variable, which W&B no longer reads once a run was made in this process
    logger = WandbLogger(save_dir=tmp_path, mode="offline")
    seen = []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: seen.append(metrics))
    trainer(max_epochs=1, logger=logger).fit(detector, datamodule=Scenes())
    (pictures,) = (m["val/predictions"] for m in seen if "val/predictions" in m)
    assert len(pictures) == 5
    logger.experiment.log({"pictures": pictures})  # W&B checks its format when it writes
    written = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/**/*.boxes2D.json")]
    wandb.finish()
    assert {b["box_caption"] for w in written for b in w["box_data"]} == {"disc", "disc 0.90"}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_what_torchvision_cannot_compute_in_half_precision_is_refused(precision):
    from torchvision.models.detection import fcos_resnet50_fpn

    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    told = rf"trainer.precision={precision}: .* Take {precision.split('-')[0]}-mixed"
    with pytest.raises(ConfigError, match=told):
        trainer(max_epochs=1, precision=precision).fit(ObjectDetector(model, 1), datamodule=Scenes())
