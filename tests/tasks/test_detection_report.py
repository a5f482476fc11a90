"""The page of a tested detector: what a slider shows, where labels stand, curves against pycocotools."""

import json
import re

import numpy as np
import pytest
import torch
from browser import chromium, opened, problems
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lora_lightning.report.page import PAGE_FILE, left
from lora_lightning.tasks.average_precision import AveragePrecision, class_precisions
from lora_lightning.tasks.detection_boxes import boxes_of, row
from lora_lightning.tasks.detection_confusion import detections_of
from lora_lightning.tasks.detection_curves import Counts, corners
from lora_lightning.tasks.detection_examples import _example
from lora_lightning.tasks.detection_pictures import MISSED, RIGHT, TRUTH, WRONG, Example, confident, judge
from lora_lightning.tasks.detection_report import Findings, write_report

NASTY = '</script><b x="1">&'
NAMES = ["disc", f"box{NASTY}", "a very long name of a class", "never"]
THRESHOLDS = (0.05, 0.3, 0.5, 0.77, 1.0)


def scene(seed, masks=False):
    """An image with objects of which some are crowds, and predictions near them and elsewhere, in heaps."""
    draw = torch.Generator().manual_seed(seed)

    def boxes(count):
        corner = torch.rand(count, 2, generator=draw) * torch.tensor([60.0, 40.0])
        return torch.cat([corner, corner + 4 + 24 * torch.rand(count, 2, generator=draw)], 1)

    truth = {
        "boxes": boxes(6),
        "labels": torch.randint(1, 4, (6,), generator=draw),
        "iscrowd": (torch.rand(6, generator=draw) < 0.15).long(),
        "image_id": torch.tensor(seed),
    }
    near = truth["boxes"].repeat(3, 1) + 2.5 * torch.randn(18, 4, generator=draw)
    found = {
        "boxes": torch.cat([near, boxes(6)]),
        "labels": torch.cat([truth["labels"].repeat(3), torch.randint(1, 4, (6,), generator=draw)]),
        "scores": torch.rand(24, generator=draw),
    }
    if masks:
        for one in (truth, found):
            one["masks"] = torch.zeros(len(one["boxes"]), 70, 90)
            for mask, (x1, y1, x2, y2) in zip(
                one["masks"], one["boxes"].clamp(0).long().tolist(), strict=True
            ):
                mask[y1:y2, x1:x2] = 1
        truth["masks"] = truth["masks"].byte()
        found["masks"] = found["masks"][:, None]
    before = {**found, "scores": torch.rand(24, generator=draw)}
    return Example(torch.rand(3, 70, 90, generator=draw), truth, {"before": before, "after": found})


@pytest.mark.parametrize("seed", range(8))
def test_a_slider_shows_what_is_judged_at_its_threshold(seed):
    """Verdicts are made once, of all predictions, and hold at every threshold."""
    example = scene(seed)
    shown = boxes_of(example.found["after"], example.truth, NAMES)
    counts = Counts(["after"])
    counts.add(Example(example.image, example.truth, {"after": example.found["after"]}))
    for threshold in THRESHOLDS:
        verdict = judge(confident(example.found["after"], threshold), example.truth)
        wanted = verdict.right.count(True), verdict.right.count(False), verdict.found.count(False)
        kinds = [one.kind for one in shown if one.on(threshold)]
        assert tuple(map(kinds.count, ("right", "wrong", "missed"))) == wanted
        assert counts.at("after", threshold) == wanted


def rectangles(svg):
    """Of the labels."""
    found = re.findall(r'<path d="M([\d.]+) ([\d.]+)h([\d.]+)v(\d+)h-[\d.]+z"/>', svg)
    return [(float(x), float(y), float(x) + float(w), float(y) + float(h)) for x, y, w, h in found]


@pytest.mark.parametrize("seed", range(8))
def test_no_label_covers_another_at_any_threshold(seed):
    page = row(scene(seed), NAMES, 0.05, 0)
    views = page.split("</svg>")[:-1]
    assert len(views) == 3
    for view in views:
        labels = rectangles(view)
        assert len(labels) >= 5
        for i, (a, b, c, d) in enumerate(labels):
            assert not any(
                min(c, g) - max(a, e) > 0.11 and min(d, h) - max(b, f) > 0.11 for e, f, g, h in labels[:i]
            )  # places are written to a tenth


def test_labels_can_be_read_on_their_colours():
    """Black on each: a contrast of 4.5 at least (WCAG 2.2, 1.4.3)."""
    for colour in (TRUTH, RIGHT, WRONG, MISSED):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        assert (
            sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05
        ) / 0.05 >= 4.5


def test_names_are_texts_and_masks_lie_over_what_they_cover():
    page = row(scene(1, masks=True), NAMES, 0.3, 0)
    assert "<b" not in page and "&lt;b" in page and "a very long nam…" in page
    assert page.count('class="mask"') == 6 + 24 + 24 and page.count("<image id=") == 1
    words = re.findall(r'aria-label="test image 1, (\w+): (\d+) (\w+)', page)
    assert [w[0] for w in words] == ["truth", "before", "after"] and words[0][1:] == ("6", "objects")


def test_precisions_by_recall_are_cocos():
    """pycocotools counts the same boxes by itself."""
    images = [scene(seed) for seed in range(6)]
    ours = AveragePrecision(curves=True)
    for one in images:
        ours.update([one.found["after"]], [one.truth])
    found = class_precisions(ours.compute(), 4)
    assert found.shape == (10, 101, 4) and np.isnan(found[:, :, 3]).all()

    def rows(one, picture, seed):
        for i, (x1, y1, x2, y2) in enumerate(picture["boxes"].tolist()):
            crowd = int(picture["iscrowd"][i]) if "iscrowd" in picture else 0
            more = {"score": float(picture["scores"][i])} if "scores" in picture else {"iscrowd": crowd}
            wide, high = x2 - x1, y2 - y1
            label = int(picture["labels"][i])
            yield {
                "image_id": seed,
                "category_id": label,
                "bbox": [x1, y1, wide, high],
                "area": wide * high,
                **more,
            }

    truth = COCO()
    objects = [r for seed, one in enumerate(images) for r in rows(one, one.truth, seed)]
    truth.dataset = {
        "images": [{"id": seed} for seed in range(6)],
        "categories": [{"id": i} for i in (1, 2, 3)],
        "annotations": [{**r, "id": i + 1} for i, r in enumerate(objects)],
    }
    truth.createIndex()
    theirs = COCOeval(
        truth,
        truth.loadRes([r for s, one in enumerate(images) for r in rows(one, one.found["after"], s)]),
        "bbox",
    )
    theirs.evaluate()
    theirs.accumulate()
    assert found[:, :, :3] == pytest.approx(theirs.eval["precision"][:, :, :, 0, -1], abs=1e-6)


def test_a_curve_by_hand():
    """Two objects; of three predictions, by score, right, wrong, right: 1 up to a recall of 0.5, then 2/3."""
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([1, 1])}]
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 1, 1])}]
    precision = AveragePrecision(curves=True)
    precision.update(found, truth)
    curve = class_precisions(precision.compute(), 1)[0, :, 0]
    assert corners(curve) == [(0, 100), (50, 100), (100, pytest.approx(200 / 3))]


def seen(count=14, masks=False):
    """What a test of a model that is not adapted gives."""
    examples = [scene(seed, masks) for seed in range(count)]
    findings, precision = Findings(0.4), AveragePrecision(masks, per_class=True, curves=True)
    for i in range(0, count, 4):
        some = examples[i : i + 4]
        truths, found = [e.truth for e in some], [e.found["after"] for e in some]
        findings.add([e.image for e in some], truths, {"after": found})
        precision.update(found, truths)
    return examples, findings, {"after": detections_of(precision, NAMES, 0.4)}


def written(folder, count=14, masks=False):
    examples, findings, tested = seen(count, masks)
    folder.mkdir(exist_ok=True)
    return write_report(findings, tested, NAMES, folder), examples


def test_the_page_names_its_threshold_and_counts_at_each(tmp_path):
    lines, examples = written(tmp_path)
    boxes, _, precision = left(tmp_path)[1]
    assert "a score of at least 0.4 " in boxes.html and "<label hidden>" in boxes.html, "no script: no slider"
    (steps,) = (json.loads(s) for s in re.findall(r'json">(\{"after.*?)</script>', boxes.html))
    verdicts = [judge(confident(e.found["after"], 0.4), e.truth) for e in examples]
    wanted = [sum(v.right.count(r) for v in verdicts) for r in (True, False)]
    wanted.append(sum(v.found.count(False) for v in verdicts))
    assert steps["after"][40] == wanted and len(steps["after"]) == 101
    assert lines[0].startswith(f"after training: {wanted[0]} right, {wanted[1]} false positives")
    assert boxes.html.count("<image id=") == 14, "each picture once, though it may stand under both headings"
    assert precision.html.count('class="chart"') == 1 + 3, "of three classes there are objects"
    assert (tmp_path / PAGE_FILE).stat().st_size < 2e6 and (tmp_path / "contact_sheet.png").is_file()


def test_a_report_of_one_process_of_several_asks_no_other(tmp_path, monkeypatch):
    """The first alone makes it: what it gathered, it would wait for, or find the other gone."""
    _, findings, tested = seen(2)

    def gather(*_):
        raise AssertionError("gathers")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    write_report(findings, tested, NAMES, tmp_path)
    assert len(left(tmp_path)[1]) == 3


def test_what_is_kept_of_a_test_is_little():
    """Of many images the first and the worst, of each the surest boxes, masks as bits; 200 are judged."""
    examples, findings = [scene(seed, masks=True) for seed in range(5)], Findings(0.4, first=3)
    for _ in range(41):
        found = [e.found["after"] for e in examples]
        findings.add([e.image for e in examples], [e.truth for e in examples], {"after": found})
    kept = findings.kept
    assert kept.count == findings.counts.images == 200 and len(kept.first) == 3
    mistakes = [judge(confident(e.found["after"], 0.4), e.truth).mistakes for e in examples]
    worst = sorted(range(200), key=lambda i: -mistakes[i % 5])[:12]
    assert [(m, place) for m, place, _ in kept.worst] == [(mistakes[i % 5], i) for i in worst]
    assert kept.first[0].found["after"]["masks"].dtype == torch.bool


def test_trackers_are_told_how_many():
    one = scene(1)
    single = Example(one.image, {name: t[:1] for name, t in one.truth.items() if name != "image_id"}, {})
    assert [_example(e, 0, NAMES).words["truth"] for e in (one, single)] == ["6 objects", "1 object"]


def test_masks_have_curves_of_their_own(tmp_path):
    written(tmp_path, 2, masks=True)
    *_, precision = left(tmp_path)[1]
    assert "<h3>Boxes</h3>" in precision.html and "<h3>Masks</h3>" in precision.html


@pytest.mark.slow
def test_the_slider_in_a_browser(tmp_path):
    _, examples = written(tmp_path)
    with chromium() as browser, opened(browser, tmp_path / PAGE_FILE) as page:
        assert page.locator(".threshold label").is_visible()
        for threshold in ("0.7", "0.05", "1"):
            page.locator(".threshold input").fill(threshold)
            wanted = judge(confident(examples[0].found["after"], float(threshold)), examples[0].truth)
            first = page.locator(".views").first.locator("svg").nth(1)
            shown = [first.locator(f".{k}:not(.off) rect").count() for k in ("right", "wrong", "missed")]
            assert shown == [wanted.right.count(True), wanted.right.count(False), wanted.found.count(False)]
            told = "{} right, {} false, {} missed".format(*shown)
            assert first.get_attribute("aria-label") == f"test image 1, after: {told}"
            assert page.locator(".boxes .off:not([aria-hidden])").count() == 0
            assert page.locator(".boxes [aria-hidden]:not(.off)").count() == 0


@pytest.mark.slow
def test_the_page_in_every_look(tmp_path):
    written(tmp_path, masks=True)
    assert problems(tmp_path / PAGE_FILE) == []
    with chromium() as browser, opened(browser, tmp_path / PAGE_FILE, "print") as page:
        tops = page.evaluate("""() => {
          const views = document.querySelector(".views");  // of a model that is not adapted: two
          views.append(views.lastElementChild.cloneNode(true));
          return [...views.children].map(figure => figure.offsetTop);
        }""")
        assert len(tops) == 3 and len(set(tops)) == 1, "truth, before and after stand side by side"
        assert not page.locator(".threshold input").is_visible()
