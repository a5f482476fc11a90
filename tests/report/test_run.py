"""The page of a run, made from what it left: what stands on it, whatever a file holds."""

import json
import re

import pytest
from left_runs import LAYERS, metrics, run

from lora_lightning.errors import UserError
from lora_lightning.report.curves import _level, _unlisted, line_chart
from lora_lightning.report.left import read_run
from lora_lightning.report.metrics import Point, in_words, read_metrics, thinned
from lora_lightning.report.page import Section, leave
from lora_lightning.report.run import write

WICKED = "</script><b>"


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def specs(page: str) -> list[dict]:
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return [json.loads(spec) for spec in found]


def test_what_stands_on_the_page_of_a_run(tmp_path):
    folder = run(tmp_path / "run")
    leave(folder, [Section("Pictures", "<p>a picture</p>")])
    page = write(folder).read_text()
    assert headings(page) == [
        "Methods", "Pictures", "Losses", "Scores in validation", "Learning rates", "Norms and ranks",
        "What changed most", "Effective ranks", "Spectra of the updates",
    ]  # fmt: skip
    assert "<h1>vit_digits: LoRA</h1>" in page
    assert "<b>40.0 %</b> <small>before (36.0–44.0)</small>" in page
    assert "<b>60.0 %</b> <small>after (56.0–64.0)</small>" in page
    told = [
        "adapted to &lt;digits&gt;", "vit, by LoRA, rank 4", "1,234 of 50,000 parameters (2.47 %)", "0.05 MB",
        "4.2 s of training, 5 min 0 s in all", "<code>lora-lightning train</code>",
    ]  # fmt: skip
    assert [words for words in told if words not in page] == []
    assert len(page) < 1_000_000


def test_a_base_that_is_only_tested_is_not_said_to_be_adapted(tmp_path):
    page = write(run(tmp_path / "run", method="none", compare=[])).read_text()
    assert "<b>40.0 %</b> <small>the base (36.0–44.0)</small>" in page
    assert '<th scope="row">tested</th><td role="cell">vit</td>' in page and '<th scope="row">on</th>' in page
    assert (
        "by before" not in page
        and "Nothing was trained" in page
        and '<th scope="row">seed</th><td role="cell">0</td>' in page
    )


def test_curves_are_of_every_method_and_layers_of_every_epoch(tmp_path):
    drawn = specs(write(run(tmp_path / "run")).read_text())
    lines = [set(s["data"]["columns"].get("of", [])) for s in drawn]
    assert lines.count({"LoRA", "linear probe"}) == 4  # losses, accuracy, rates, norms
    columns = [spec["data"]["columns"] for spec in drawn]
    heat = next(c for c in columns if "epoch" in c and "layer" in c)
    assert list(zip(heat["layer"], heat["epoch"], heat["effective rank"]))[:4] == [
        (LAYERS[0], 1, 3), (LAYERS[0], 2, 3.1), (LAYERS[0], 3, 3.2), (LAYERS[1], 1, 4),
    ]  # fmt: skip
    bars, others = (c for c in columns if "change %" in c)
    assert bars["layer"] == list(reversed(LAYERS)) and bars["change %"] == [30, 20, 10]
    assert others["layer"] == ["head.weight", "norm.weight"], (
        "which change far more, and are no layers with updates"
    )


def test_metrics_have_readable_names_and_units():
    told = {
        "map_75": "AP at IoU .75", "mask_map_small": "mask AP of small objects", "map/car": "mAP of car",
        "iou/road": "IoU of road", "wer_scottish": "WER, scottish", "ece": "calibration error",
        "aux_2": "aux 2", "loss_box_reg": "loss of the boxes",
    }  # fmt: skip
    assert {name: in_words(name) for name in told} == told
    assert [_unlisted(n) for n in ("map_75", "ece", "mapped")] == [
        (100, "AP at IoU .75"), (100, "calibration error %"), (1, "mapped"),
    ]  # fmt: skip


def test_a_level_line_has_short_numbers():
    row = {"epoch": 0, "line": "a", "of": "a", "part": ""}
    rows = [{"value": v, "step": i, **row} for i, v in enumerate([30.3111, 30.311101])]
    y = line_chart(rows, ["a"], ["a"], True)["encoding"]["y"]
    assert y["axis"]["format"] == ".4~g" and y["scale"]["domain"][0] < 30 < 31 < y["scale"]["domain"][1]
    assert _level([0.0, 0.0])["scale"]["domain"] == [-1, 1] and _level([1.0, 1.1]) == {} and _level([])


def test_a_run_that_has_not_ended_says_so(tmp_path):
    page = write(run(tmp_path / "run", ended=False)).read_text()
    assert "This run has not ended" in page and "Losses" in headings(page) and "Methods" not in headings(page)


def test_a_run_without_any_of_our_files_but_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    page = write(tmp_path).read_text()
    assert "This run has not ended" in page and "No metrics were kept" in page


def test_names_of_layers_and_classes_stay_texts(tmp_path):
    folder = run(tmp_path / "run", layers=(WICKED, "a.b"))
    facts = json.loads((folder / "report" / "run.json").read_text())
    names = ("recipe", "about", "command", "device", "model", "data", "started", "adapter")
    wicked = dict.fromkeys(names, WICKED)
    table = {"header": [WICKED, "b"], "rows": [[WICKED, WICKED]]}
    facts |= wicked | {"table": table, "plan": {"rows": [[WICKED] * 5], "notes": [WICKED]}}
    facts["labels"].append({"method": "lora", "label": WICKED})
    (folder / "report" / "run.json").write_text(json.dumps(facts))
    page = write(folder).read_text()
    assert WICKED not in page
    assert page.count("<script") == page.count("</script>") == len(specs(page)) + 3


def test_a_run_of_several_adapters_links_their_pages(tmp_path):
    folder = run(tmp_path / "two", adapters={"a": {}, "b": {}, "gone": None})
    (folder / "results.json").write_text("{}")
    run(folder / "a", accuracy=0.7)
    page = write(folder).read_text()
    assert '<a href="a/report.html">a</a>' in page and "70.0 <span>(66.0–74.0)</span>" in page
    assert "not begun" in page and "gone" not in page.split("</style>")[1].split("<script")[0]
    run(folder / "b", ended=False)
    page = write(folder).read_text()
    assert "has not ended" in page
    assert {"a", "b"} in [set(s["data"]["columns"].get("of", [])) for s in specs(page)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", "- 1", "config.yaml is damaged"),
        ("results.json", "{", "results.json cannot be read"),
        ("results.json", "{}", "results.json is damaged"),
        ("report/run.json", "[]", "run.json is damaged"),
        ("report/updates.json", "1", "updates.json is damaged"),
        ("report/sections.json", "1", "sections.json is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, said):
    (run(tmp_path / "run") / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        write(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()


def test_odd_values_leave_the_page_whole(tmp_path):
    folder = run(tmp_path / "run")
    (folder / "report" / "updates.json").write_text(
        json.dumps([1, {}, {"name": 1}, {"name": "a", "norm": None}])
    )
    facts = {
        "scores": [1, {}, {"name": "acc"}],
        "labels": 3,
        "table": [],
        "plan": 1,
        "versions": 2,
        "before": 4,
    }
    (folder / "report" / "run.json").write_text(json.dumps(facts))
    assert "acc" in write(folder).read_text()


@pytest.mark.parametrize(
    "score",
    [
        {"scale": 1e400},
        {"digits": 1e400},
        {"digits": -3},
        {"digits": 10**6},
        {"digits": 10**11},
        {"label": "\ud800"},
    ],
)
def test_scores_that_cannot_be_shown_leave_the_page_whole(tmp_path, score):
    folder = run(tmp_path / "run")
    facts = {"scores": [{"name": "acc", "label": "accuracy", "scale": 1, "digits": 1, **score}]}
    (folder / "report" / "run.json").write_text(json.dumps(facts))
    assert "acc" in write(folder).read_text() and (folder / "report.html").stat().st_size < 2_000_000


def test_numbers_too_large_for_a_float_are_left_out(tmp_path):
    folder = run(tmp_path / "run")
    huge = [{"method": "lora", "scores": {"acc": 10**400}, "trained": 10**400, "total": 1}]
    (folder / "results.json").write_text(json.dumps(huge))
    layer = {
        "name": "a",
        "norm": 10**400,
        "relative": 10**400,
        "rank": 1,
        "effective_rank": 1,
        "values": [10**400],
    }
    (folder / "report" / "updates.json").write_text(json.dumps([layer]))
    assert "10000000" not in write(folder).read_text()


def test_names_in_a_configuration_lead_nowhere_else(tmp_path):
    run(tmp_path / "other", seed=4711)
    folder = run(
        tmp_path / "run", adapters={"../other": {}, str(tmp_path / "other"): {}, ".": {}, "a": {}}, compare=3
    )
    assert list(read_run(folder).adapters) == ["a"] and list(read_run(folder).labels()) == ["lora"]


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        write(tmp_path / "nowhere")
    run(tmp_path / "run")
    for place, said in (
        (tmp_path, "is not a run's folder: it has no config.yaml."),
        (tmp_path / "run" / "report", "is not a run's folder: it has no config.yaml."),
        (tmp_path / "run" / "results.json", "is a file."),
    ):
        with pytest.raises(UserError, match=rf"{place}: {said} Give .*: is {tmp_path / 'run'} meant\?"):
            write(place)


def test_a_resumed_run_has_the_parts_of_its_metrics_after_one_another(tmp_path):
    metrics(tmp_path, name="metrics.2.csv", first=2, epochs=1)
    metrics(tmp_path, name="metrics.1.csv", epochs=3)  # its third epoch was done again
    metrics(tmp_path, name="metrics.csv", first=3, epochs=2)
    found = read_metrics(tmp_path)["val/acc"]
    assert [(p.step, p.epoch) for p in found] == [(10 * e + 9, e) for e in range(5)]


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    metrics(tmp_path)
    path = tmp_path / "csv" / "metrics.csv"
    path.write_bytes(path.read_bytes() + b'nan,inf,x\0,\n"39,1,\xff')
    assert [p.epoch for p in read_metrics(tmp_path)["train/loss"]] == [0, 1, 2]


def test_long_curves_are_means_of_neighbours():
    points = [Point(i, 0, float(i % 2)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100 and {p.value for p in few} == {0.5} and few[-1].step == 999
    assert thinned(points[:100], 100) == points[:100]
