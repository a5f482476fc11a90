"""SemanticSegmenter: its losses, its scores against scikit-learn's and torchmetrics', its report."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import problems
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index

import lora_lightning as ll
from lora_lightning.data.mask_pictures import class_colours, indexed, overlay
from lora_lightning.data.masks import MasksDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.report.page import left
from lora_lightning.tasks.confusion import Confusions, ious, named_ious
from lora_lightning.tasks.segmentation import SemanticSegmenter
from lora_lightning.tasks.segmentation_maps import class_maps, dice_loss, pixel_loss
from lora_lightning.tasks.segmentation_pictures import log_to_wandb
from tests.data.mask_files import NAMES, PALETTE, write_pairs


def maps(count=6, classes=4, seed=0):
    """Truths with ignored pixels and a class that is never there, and guesses that are often right."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        shape = (9 + number, 12)
        truth = torch.randint(0, classes - 1, shape, generator=generator).to(torch.uint8)
        guess = torch.randint(0, classes - 1, shape, generator=generator).to(torch.uint8)
        found = torch.where(torch.rand(shape, generator=generator) < 0.6, truth, guess)
        truth[torch.rand(shape, generator=generator) < 0.1] = 255
        yield number, found, truth


def counted(pictures, classes=4):
    confusions = Confusions(classes)
    for number, found, truth in pictures:
        confusions.add(number, found, truth)
    return confusions.all()


def test_scores_are_those_of_other_libraries():
    judged = counted(maps())
    truth, found = (torch.cat([m[i].flatten() for m in maps()]) for i in (2, 1))
    known = truth != 255
    matrix = confusion_matrix(truth[known], found[known], labels=range(4))
    assert np.array_equal(judged.matrix(), matrix)
    scores = judged.scores()
    assert scores["acc"] == pytest.approx((truth[known] == found[known]).float().mean().item())
    each = jaccard_score(truth[known], found[known], labels=[0, 1, 2], average=None)
    assert ious(matrix)[:3] == pytest.approx(each) and np.isnan(ious(matrix)[3])
    assert scores["miou"] == pytest.approx(each.mean()), "a class that is nowhere does not count"
    theirs = multiclass_jaccard_index(found[known].int(), truth[known].int(), 3)
    assert scores["miou"] == pytest.approx(theirs.item())
    assert set(named_ious(matrix, [*NAMES, "never"])) == {f"iou/{name}" for name in NAMES}


def test_a_class_that_is_found_where_there_is_none_counts_as_0():
    judged = counted([(0, torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]))])
    assert judged.scores()["miou"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_picture_counts_once_and_the_order_does_not_matter():
    pictures = list(maps())
    once, again = counted(pictures), counted([*reversed(pictures), pictures[2]])
    assert np.array_equal(once.matrix(), again.matrix()) and once.intervals() == again.intervals()


def test_intervals_are_the_bootstraps_over_pictures():
    judged = counted(maps(40))
    generator, values = np.random.default_rng(1), []
    matrices = [counted([m]).matrix() for m in maps(40)]
    for _ in range(1000):
        drawn = sum(matrices[i] for i in generator.integers(40, size=40))
        values.append((np.nanmean(ious(drawn)), drawn.trace() / drawn.sum()))
    wanted = np.quantile(values, (0.025, 0.975), axis=0).T
    found = judged.intervals()
    for name, bounds in zip(("miou", "acc"), wanted, strict=True):
        assert found[name] == pytest.approx(bounds.tolist(), abs=0.004)
        assert found[name][0] < judged.scores()[name] < found[name][1]


def test_the_pairs_that_are_confused_most_and_the_worst_picture():
    judged = counted(
        [(0, torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 2, 2, 0]])), (1, *[torch.zeros(1, 4).int()] * 2)]
    )
    assert judged.confused(9) == [(2, 1, 2), (0, 2, 1)]
    assert judged.picture_miou(1) == 1 > judged.picture_miou(0)


def test_the_loss_is_the_mean_over_pixels_of_a_class():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    truth[:, 0] = 255
    assert pixel_loss(logits, truth) == pytest.approx(F.cross_entropy(logits, truth, ignore_index=255).item())
    nothing = pixel_loss(logits.requires_grad_(), torch.full_like(truth, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any(), "no pixel of any class: nothing to learn, and no NaN"


def test_dice_by_hand():
    logits = torch.full((1, 3, 1, 4), -50.0)
    logits[0, [0, 1, 1, 2], 0, [0, 1, 2, 3]] = 50.0  # certain of 0, 1, 1, 2
    truth = torch.tensor([[[0, 1, 0, 255]]])
    # Class 0: 2·1 + 1 of 1 + 2 + 1; class 1: 2·1 + 1 of 2 + 1 + 1; class 2 is not there.
    assert dice_loss(logits, truth).item() == pytest.approx(1 - 3 / 4)


class Pixels(nn.Module):
    """A small model of torchvision's convention."""

    def __init__(self, classes=3, aux=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, classes, 1)
        self.aux_classifier = nn.Conv2d(8, classes, 1) if aux else None

    def forward(self, images):
        features = self.body(images)
        out = {"out": self.classifier(features)}
        if self.aux_classifier:
            out["aux"] = self.aux_classifier(features)
        size = images.shape[-2:]
        return {n: F.interpolate(x, size, mode="bilinear", align_corners=False) for n, x in out.items()}


def test_maps_do_not_depend_on_the_batch_nor_on_the_memory(monkeypatch):
    torch.manual_seed(0)
    model = Pixels().eval()
    pictures = [torch.randn(3, *size) for size in ((16, 20), (20, 16), (16, 20))]
    sizes = [(31, 40), (40, 33), (16, 20)]
    together = class_maps(model, pictures, sizes)
    assert [tuple(m.shape) for m in together] == sizes
    for picture, size, found in zip(pictures, sizes, together, strict=True):
        (alone,) = class_maps(model, [picture], [size])
        logits = model(picture[None])["out"]
        wanted = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)[0]
        assert torch.equal(alone.long(), wanted) and torch.equal(found, alone)
    monkeypatch.setattr("lora_lightning.tasks.segmentation_maps.AT_ONCE", 1)
    assert all(map(torch.equal, class_maps(model, pictures, sizes), together))
    flipped = class_maps(model, [p.flip(-1) for p in pictures], sizes, flips=True)
    assert all(
        map(torch.equal, [m.flip(-1) for m in flipped], class_maps(model, pictures, sizes, flips=True))
    )


@pytest.fixture
def data(tmp_path):
    write_pairs(tmp_path / "photos", 16)
    return MasksDataModule(
        str(tmp_path / "photos"), class_names=NAMES, image_size=24, crop_size=24, batch_size=4, num_workers=0,
        augment="flip", val_share=0.25, test_share=0.25,
    )  # fmt: skip


@pytest.fixture
def segmenter():
    seed_everything(0, verbose=False)
    return SemanticSegmenter(Pixels(), 3, NAMES, PALETTE, optim={"lr": 0.05}, dice_weight=0.5)


def trainer(**options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1, **options,
    )  # fmt: skip


def test_it_learns_logs_and_reports(segmenter, data, tmp_path):
    lora = ll.LoRACallback(rank=4, verbose=False)
    fitter = trainer(max_epochs=12, callbacks=[lora])
    fitter.fit(segmenter, datamodule=data)
    logged = fitter.callback_metrics
    assert {"train/loss", "train/aux", "val/miou", "val/acc"} <= set(logged)
    (test,) = fitter.test(segmenter, datamodule=data, verbose=False)
    assert test["test/miou"] > 0.6 and test["test/acc"] > 0.8
    assert {f"test/iou/{name}" for name in NAMES} <= set(test)
    low, high = segmenter.intervals()["miou"]
    assert low <= test["test/miou"] <= high
    (header, rows), (_, pairs) = segmenter.tables().values()
    assert header[:2] == ["class", "iou"] and [row[0] for row in rows] == NAMES
    assert [row[1] for row in rows] == pytest.approx([test[f"test/iou/{name}"] for name in NAMES], abs=1e-6)
    assert sum(row[2] for row in pairs) == pytest.approx(1 - test["test/acc"], abs=1e-6)
    lines = segmenter.report(data, str(tmp_path))
    assert lines[0].startswith("lowest IoU %: ")
    before = segmenter.before()
    assert before["scores"]["miou"] < test["test/miou"] and before["intervals"]["miou"][1] < 0.9
    assert segmenter.confusion().names == NAMES
    sections = left(tmp_path)[1]
    assert [s.title for s in sections] == [
        "Scores on the test pictures", "Classes", "What is taken for what", "Masks in test pictures",
    ]  # fmt: skip
    page = "".join(section.html for section in sections)
    for words in ("picture", "truth", "before", "after", "mistakes"):
        assert page.count(f"<figcaption>{words}</figcaption>") == 2 * 4
    assert page.count("<img") == 2 * 4 * 5 and ">before</th>" in page and "Confused most" in page
    assert re.search(r'alt="[^"]+, after: ground \d+ %', page), (
        "what a mask shows, for those who cannot see it"
    )
    specs = [json.loads(s) for s in re.findall(r'json">(.*?)</script>', page)]
    bars, off, after = (spec["data"]["columns"] for spec in specs)
    assert bars["class"] == NAMES
    assert bars["IoU %"] == pytest.approx([100 * test[f"test/iou/{name}"] for name in NAMES], abs=1e-3)
    assert all(a <= b <= c for a, b, c in zip(bars["low"], bars["IoU %"], bars["high"], strict=True))
    assert sum(off["pixels"]) == sum(after["pixels"]) == sum(map(sum, segmenter.confusion().counts))
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 288 and sheet.height > 5 * 200
    assert segmenter.model.training and not segmenter.model.body[1].training, (
        "as they were: the norm is frozen"
    )


def test_a_page_costs_no_further_pass_over_the_test_data(segmenter, data, tmp_path):
    calls = []
    segmenter.model.register_forward_hook(lambda *_: calls.append(1))
    fitter = trainer(max_epochs=1, callbacks=[ll.LoRACallback(rank=4, verbose=False)])
    fitter.fit(segmenter, datamodule=data)
    for pictured, states in ((False, 1), (True, 2)):
        segmenter.pictured = pictured
        calls.clear()
        fitter.test(segmenter, datamodule=data, verbose=False)
        assert len(calls) % states == 0 and len(calls) >= states
        tested = len(calls)
        assert bool(segmenter.report(data, tmp_path)) == pictured == bool(segmenter.examples(data, 2))
        assert len(calls) == tested
    page = left(tmp_path)[1][-1].html
    scores = [float(x) for x in re.findall(r"after ([\d.]+)</p>", page)]
    assert len(scores) == 8 and scores[4:] == sorted(scores[:4]), "the worst come first"


def test_a_base_is_not_said_to_be_trained(segmenter, data, tmp_path):
    segmenter.now = "base"
    assert (
        segmenter.report(data, tmp_path) == [] and segmenter.confusion() is None and segmenter.before() == {}
    )
    trainer().test(segmenter, datamodule=data, verbose=False)
    segmenter.report(data, tmp_path)
    page = "".join(section.title + section.html for section in left(tmp_path)[1])
    assert not re.search(">(after|before)<|after training", page) and "<figcaption>base</figcaption>" in page
    assert list(segmenter.examples(data, 1)[0].words) == ["base"] and segmenter.before() == {}


def test_a_model_that_gives_logits_alone_and_head_lr(data):
    class Plain(nn.Sequential):
        pass

    model = Plain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    task = SemanticSegmenter(model, 3, optim={"lr": 0.01, "head_lr": 0.1})
    fitter = trainer(max_epochs=1)
    fitter.fit(task, datamodule=data)
    assert "train/aux" not in fitter.callback_metrics
    rates = {id(p): g["initial_lr"] for g in fitter.optimizers[0].param_groups for p in g["params"]}
    assert rates[id(model[2].weight)] == 0.1 and rates[id(model[0].weight)] == 0.01


def test_the_auxiliary_loss_counts_by_its_weight(monkeypatch):
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8), torch.arange(2)
    losses, model = {}, Pixels()
    for weight in (0.0, 0.5, 1.0):
        task = SemanticSegmenter(model, 3, aux_weight=weight)
        monkeypatch.setattr(task, "log", lambda *_, **__: None)
        losses[weight] = task.training_step(batch, 0)
    none, half, whole = (loss.item() for loss in losses.values())
    assert half - none == pytest.approx(whole - half, abs=1e-5) and half > none
    losses[0.0].backward()
    assert model.aux_classifier.weight.grad is not None, "used, as DDP asks of every trained parameter"
    assert not model.aux_classifier.weight.grad.any()


def test_wandbs_masks_have_their_names():
    seen = {}
    logger = SimpleNamespace(log_image=lambda key, images, masks: seen.update({key: (images, masks)}))
    truth, found = torch.tensor([[0, 255]]), torch.tensor([[0, 2]], dtype=torch.uint8)
    log_to_wandb(logger, "val/predictions", [(Image.new("RGB", (2, 1)), truth, found)], NAMES)
    ((_,), (layers,)) = seen["val/predictions"]
    assert {kind: layer["mask_data"].tolist() for kind, layer in layers.items()} == {
        "ground_truth": [[0, 255]], "predictions": [[0, 2]],
    }  # fmt: skip
    assert layers["predictions"]["class_labels"] == {0: "ground", 1: "disc", 2: "box", 255: "ignored"}


@pytest.mark.slow
def test_the_page_in_every_look(segmenter, data, tmp_path):
    fitter = trainer(max_epochs=1, callbacks=[ll.LoRACallback(rank=4, verbose=False)])
    fitter.fit(segmenter, datamodule=data)
    fitter.test(segmenter, datamodule=data, verbose=False)
    segmenter.report(data, tmp_path)
    assert problems(tmp_path / "report.html") == []


@pytest.mark.slow
def test_wandb_gets_masks_in_its_own_format(segmenter, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    logger = WandbLogger(save_dir=tmp_path, mode="offline")
    seen = []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: seen.append(metrics))
    trainer(max_epochs=1, logger=logger).fit(segmenter, datamodule=data)
    (pictures,) = (m["val/predictions"] for m in seen if "val/predictions" in m)
    assert len(pictures) == 4
    logger.experiment.log({"pictures": pictures})  # W&B checks its format when it writes
    wandb.finish()
    written = [np.array(Image.open(p)) for p in tmp_path.glob("wandb/**/mask/*.png")]
    assert len(written) == 8 and any((mask == 255).any() for mask in written)


def test_every_bad_option_is_named():
    with pytest.raises(ConfigError) as caught:
        SemanticSegmenter(Pixels(), 3, ["disc"], [0, 0], {"learning_rate": 1}, aux_weight=-1)
    assert [p.split("=")[0].split(":")[0] for p in caught.value.problems] == [
        "optim.learning_rate", "aux_weight", "class_names", "palette",
    ]  # fmt: skip


def test_hyperparameters_are_plain(segmenter):
    assert json.loads(json.dumps(dict(segmenter.hparams)))["class_names"] == NAMES


def test_colours_differ_and_a_background_is_left_as_it_is():
    colours = class_colours(["background", *map(str, range(30))])
    assert colours[0] == (0, 0, 0) and len(set(colours)) == 31
    assert class_colours(NAMES, PALETTE) == [(0, 0, 0), (200, 30, 30), (30, 30, 200)]
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    picture = Image.new("RGB", (2, 2), (100, 100, 100))
    laid = np.asarray(overlay(picture, mask, class_colours(NAMES, PALETTE), 2))
    assert (laid[0, 0] == 100).all() and (laid[1, 1] == 100).all() and laid[0, 1, 0] > 150 > laid[1, 0, 0]
    saved = indexed(mask, colours)
    assert np.array_equal(np.asarray(saved), mask)


def test_processes_count_together_and_a_picture_of_two_of_them_once(monkeypatch):
    pictures = list(maps())
    shares = [Confusions(4), Confusions(4)]
    for number, found, truth in pictures:
        shares[number % 2].add(number, found, truth)
    shares[0].add(*pictures[5])  # which fills up the first one's last batch

    def gather(into, own):
        into[:] = [share._pictures for share in shares]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    together = [share.all() for share in shares]
    monkeypatch.undo()
    alone = counted(pictures)
    for one in together:
        assert np.array_equal(one.matrix(), alone.matrix()) and one.intervals() == alone.intervals()
