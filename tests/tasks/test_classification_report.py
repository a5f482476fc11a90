"""The page of a tested classifier: whole, self-contained, small, and safe whatever names files have."""

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import problems
from PIL import Image
from test_classification_scores import classes, labels, numbers

from lora_lightning.report import specs
from lora_lightning.report.page import image, left, text
from lora_lightning.tasks.classification_pictures import chosen, losses, mistaken
from lora_lightning.tasks.classification_report import Outcome, tables, write_report
from lora_lightning.tasks.classification_scores import score_values, scores_of
from lora_lightning.tasks.predictions import Predictions

NASTY = '<script>alert("1")</script>\u202egpj.exe\n=1+1 & \'"'
VOID = {"meta", "img", "br"}


class Data:
    """Pictures of noise, which no format makes small; the second is gone."""

    def show(self, part, index):
        if index == 1:
            raise FileNotFoundError(index)
        noise = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(index))
        return f"{NASTY}{index}.jpg", Image.fromarray(noise.byte().numpy())


class Page(HTMLParser):
    """Checks that tags close, and keeps what there is."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.specs = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.specs if self.open and self.open[-1] == "script" else self.texts).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def written(found, folder, names=None, data=None, source=None, before=True):
    names = names or [f"kind {i}" for i in range(found.classes)]
    if before:
        found.before = found.outputs.flip(0)
    scores = scores_of(found.target, found.classes, found.temperature != 1)
    lines = write_report(Outcome(found, names, scores, source or {}), data, folder)
    _, sections = left(folder)
    Page((folder / "report.html").read_text(encoding="utf-8"))  # its tags close
    return Page("".join(f"<h2>{text(s.title, 200)}</h2>{s.html}" for s in sections)), lines


def charts(page):
    """Their specifications, by what they show."""
    labels = [a["aria-label"] for a in page.all("div") if a.get("role") == "img"]
    return dict(zip(labels, map(json.loads, page.specs), strict=True))


@pytest.mark.parametrize("make", [classes, labels, numbers])
def test_a_page_needs_nothing_else_and_fits_any_screen(make, tmp_path):
    page, _ = written(make(), tmp_path, data=Data())
    pictures = page.all("img")
    assert len(pictures) >= 20
    assert all(a["src"].startswith("data:image/") and a["alt"] for a in pictures)
    sections = "".join(section.html for section in left(tmp_path)[1])
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", sections)
    assert all(a == {"type": "application/json"} for a in page.all("script"))
    assert all(charts(page))
    assert (tmp_path / "report.html").stat().st_size < 3e6


@pytest.mark.parametrize("make", [classes, labels])
def test_names_from_files_are_texts_and_nothing_else(make, tmp_path):
    found = make()
    page, _ = written(found, tmp_path, [f"{i}{NASTY}" for i in range(found.classes)], Data())
    assert all(a == {"type": "application/json"} for a in page.all("script"))
    assert not any("<" in spec for spec in page.specs)
    shown = " ".join(page.texts)
    assert "\u202e" not in shown
    assert '<script>alert("1")</script>' in shown
    with (tmp_path / "per_class.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [f"{i}{NASTY}" for i in range(found.classes)]


def test_a_thousand_classes_stay_small(tmp_path):
    page, _ = written(classes(1500, 1000), tmp_path, data=Data())
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert len(page.all("tr")) > 1000


def test_the_source_domain_of_a_model_that_trained_in_full(tmp_path):
    page, lines = written(classes(), tmp_path, source={"source": 0.5, "source_before": 0.9})
    assert lines[0] == "Source domain: 50.0 % after training, 90.0 % before."
    shown = [word.strip() for word in page.texts if word.strip()]
    at = shown.index("source domain, accuracy %")
    assert shown[at + 1 : at + 3] == ["90.0", "50.0"]


def test_what_the_page_says_is_what_was_measured(tmp_path):
    found = classes(temperature=2.0)
    page, lines = written(found, tmp_path, source={"source": 0.5, "source_off": 0.9})
    shown = " ".join(page.texts)
    values = score_values(found)
    before = score_values(Predictions("class", found.outputs.flip(0), found.truths))
    for value in (
        values["acc"],
        before["acc"],
        values["f1"],
        values["ece"],
        values["ece_raw"],
        before["ece_raw"],
    ):
        assert f"{100 * value:.1f} " in shown
    assert "90.0" in shown and "50.0" in shown  # in the source domain
    assert "temperature 2" in shown
    assert lines[0] == "Source domain: 50.0 % with the adapter on, 90.0 % with it off, as before."
    assert lines[1].startswith("Taken for another most often: kind ")
    assert f"from {100 * values['ece_raw']:.1f} to {100 * values['ece']:.1f} %" in lines[2]
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open(encoding="utf-8")))
    assert len(rows) == 7
    first = rows[0]
    assert float(first["recall_low"]) <= float(first["recall"]) <= float(first["recall_high"])
    assert rows[6]["recall"] == "" and rows[6]["pictures"] == "0"
    table, confused = tables(found, [f"kind {i}" for i in range(7)]).values()
    assert table[0][:5] == ["class", "pictures", "precision", "recall", "f1"]
    assert confused[1][0][0].startswith("kind ")


def test_the_worst_pictures_are_chosen_each_once():
    found = classes()
    found.before = found.outputs.flip(0)
    sections = chosen(found)
    assert next(iter(sections)) == "Most confidently wrong"
    every = [i for indices in sections.values() for i in indices]
    assert len(every) == len(set(every))
    wrong, probabilities = mistaken(found), found.probabilities().amax(1)
    first = sections["Most confidently wrong"]
    assert wrong[first].all()
    assert first[0] == max(wrong.nonzero()[:, 0].tolist(), key=lambda i: float(probabilities[i]))
    assert not wrong[sections["Wrong before, right after"]].any()
    number = numbers()
    worst = chosen(number)["The greatest errors"]
    assert worst[0] == int((number.predicted - number.truths).abs().argmax())
    several = labels()
    assert (losses(several) >= 0).all()
    assert mistaken(several)[chosen(several)["Most confidently wrong"]].all()


def test_a_model_that_errs_nowhere_or_gives_no_numbers_has_a_page(tmp_path):
    right = Predictions("class", 9 * torch.eye(3), torch.arange(3))
    page, lines = written(right, tmp_path, before=False)
    assert lines == []
    assert not page.all("img")
    written(Predictions("class", torch.full((3, 3), float("nan")), torch.arange(3)), tmp_path, data=Data())
    written(Predictions("number", torch.zeros(2, 1), torch.ones(2)), tmp_path)
    written(Predictions("classes", torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long)), tmp_path)


def test_small_pictures_stay_sharp_and_big_ones_become_small():
    assert 'class="small"' in image(Image.new("RGB", (16, 16)), "digit")
    big = image(Image.effect_noise((1200, 900), 90).convert("RGB"), "noise")
    assert len(big) < 60_000
    assert image(Image.new("L", (90, 20)), NASTY).count("<") == 1


def test_a_long_name_is_shortened_in_the_middle():
    assert text("a" * 50 + "b" * 50, 20) == "a" * 13 + "…" + "b" * 6
    assert text("\x1b[31m") == "\ufffd[31m"


def test_charts_show_what_was_measured(tmp_path):
    found = classes(temperature=2.0)
    page, _ = written(found, tmp_path)
    drawn = charts(page)
    for state, outputs in (("after", found.outputs), ("before", found.outputs.flip(0))):
        cells = drawn[f"confusion matrix, {state}"]["data"]["columns"]
        counted = {
            (t, p): n for t, p, n in zip(cells["true"], cells["predicted"], cells["pictures"], strict=True)
        }
        pairs = zip(found.truths.tolist(), outputs.argmax(1).tolist(), strict=True)
        assert counted == Counter((f"kind {t}", f"kind {p}") for t, p in pairs)
    rows = {row["class"]: row for row in csv.DictReader((tmp_path / "per_class.csv").open(encoding="utf-8"))}
    bars = drawn["recall % of each class"]["data"]["columns"]
    columns = {"recall %": "recall", "low": "recall_low", "high": "recall_high", "before": "recall_before"}
    assert len(bars["class"]) == 6  # of the seventh there is no picture
    for i, name in enumerate(bars["class"]):
        for shown, kept in columns.items():
            assert bars[shown][i] == pytest.approx(100 * float(rows[name][kept]), abs=0.01)
    assert set(drawn["reliability diagram"]["layer"][0]["encoding"]["color"]["scale"]["domain"]) == {
        "as trained",
        "at temperature 2",
    }


def test_classes_of_one_name_are_told_apart():
    assert specs.apart(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    spec = specs.confusion(np.diag([1, 2]), specs.apart(["a", "a"]))
    assert [row["true"] for row in spec["data"]["values"]] == ["a", "a (2)"]


def test_numbers_are_points_on_a_scale_that_both_axes_have(tmp_path):
    found = numbers()
    page, _ = written(found, tmp_path)
    points = charts(page)["predicted over true numbers"]["layer"][0]
    assert points["encoding"]["x"]["scale"] == points["encoding"]["y"]["scale"]
    assert specs.scatter(np.arange(5000.0), {"after": np.zeros(5000)})["data"]["values"][-1]["true"] == 4999


@pytest.mark.slow
@pytest.mark.parametrize("make", [classes, labels, numbers])
def test_the_page_in_every_look(make, tmp_path):
    written(make(), tmp_path, data=Data(), source={"source": 0.5, "source_off": 0.9})
    assert problems(tmp_path / "report.html") == []
