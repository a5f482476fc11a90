"""The benchmark of serving: every way gives the same answers, a soak sees what is wrong."""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving import soak, tables, ways
from benchmarks.serving.load import Load, drive, names_of, percentiles
from benchmarks.serving.measuring import asks, compared
from benchmarks.serving.shelves import SHAPES, filled
from lora_lightning.serving.asking import Ask, Event

DIGITS = SHAPES["digits"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(DIGITS, tmp_path_factory.mktemp("shelf"), 3)


class Answering:
    """An engine that answers at once, or with an error."""

    def __init__(self, what: str = "answer") -> None:
        self.what, self.asked = what, []

    def submit(self, ask: Ask, tell) -> None:
        self.asked.append(ask.adapter)
        tell(Event(self.what, {"adapter": ask.adapter}, batch=2))


def test_clients_ask_for_popular_names_more_often() -> None:
    zipf, uniform = (Counter(names_of(4000, 100, p, 0)) for p in ("zipf", "uniform"))
    assert zipf["a0"] / zipf["a9"] == pytest.approx(10, rel=0.4) and zipf["a0"] > 600
    assert max(uniform.values()) < 80 and len(uniform) == 100
    assert names_of(9, 100, "zipf", 1) == names_of(9, 100, "zipf", 1) != names_of(9, 100, "zipf", 2)


def test_every_request_is_asked_and_an_error_is_one() -> None:
    engine, names = Answering(), [f"a{i}" for i in range(40)]
    load = drive(engine, [Ask(n, "classify", b"") for n in names], 8)
    assert engine.asked == names and load.sizes == [2] * 40 and len(load.latencies) == 40
    with pytest.raises(RuntimeError, match="40 requests failed"):
        drive(Answering("error"), [Ask(n, "classify", b"") for n in names], 8)


def test_ratios_are_of_the_same_round() -> None:
    loads = {"mixed": [Load(1, [0.1] * 8, cost, [8]) for cost in (1.0, 10.0)],
             "other": [Load(2, [0.2] * 8, cost, [1]) for cost in (3.0, 30.0)]}  # fmt: skip
    found = compared(loads, "mixed")
    assert found["other"]["ratio"] == found["other"]["low"] == 3.0 and found["mixed"]["ratio"] == 1.0
    assert (found["mixed"]["per_second"], found["other"]["per_second"]) == (8.0, 4.0)
    assert percentiles([i / 100 for i in range(101)]) == pytest.approx({"p50": 0.5, "p95": 0.95, "p99": 0.99})


def test_every_way_gives_the_same_answers(shelf: Path) -> None:
    names = ["a0", "a1", "a2", "a1"]
    makers = {
        "mixed": lambda: ways.mixed(DIGITS, shelf, 3), "switching": lambda: ways.switching(DIGITS, shelf, 3),
        "loading": lambda: ways.loading(DIGITS, shelf), "hot": lambda: ways.hot(DIGITS, shelf, 3, 2),
        "merged": lambda: ways.a_model_each(DIGITS, shelf, 3, merged=True),
    }  # fmt: skip
    told = {}
    for way, make in makers.items():
        engine, answers = make(), {}
        for i, ask in enumerate(asks(DIGITS, names)):
            engine.submit(ask, lambda event, i=i, answers=answers: answers.update({i: event}))
        engine.close()
        assert {e.what for e in answers.values()} == {"answer"}, (way, answers)
        told[way] = [answers[i].content for i in range(len(names))]
    assert not soak.equal(told["mixed"][1], told["mixed"][3])  # another picture
    for way, answers in told.items():
        assert all(soak.equal(a, b) for a, b in zip(answers, told["mixed"], strict=True)), way


def test_a_soak_knows_what_was_there_when(shelf: Path, tmp_path: Path) -> None:
    old, new = shelf / "a0", shelf / "a1"
    changing = soak.Shelf(tmp_path / "changing", {"steady": [shelf / "a2"], "moving": [old, new]})
    begun = time.monotonic()
    assert changing.there("moving", begun, begun) == {old} and changing.there("steady", begun, begun)
    generator = random.Random(0)
    while len({span.version for span in changing.history["moving"]}) < 3:
        changing.change(generator)
    end = time.monotonic()
    assert changing.there("moving", begun, end) == {old, new, None}
    assert changing.there("moving", begun, begun - 1e-9) == {old}
    assert len(changing.there("moving", end + 100, end + 100)) == 1
    assert changing.there("steady", begun, end) == {shelf / "a2"}
    last = changing.history["moving"][-1].version
    place = tmp_path / "changing" / "moving"
    assert place.exists() == (last is not None)
    if last is not None:
        assert (place / soak.FILES[1]).read_bytes() == (last / soak.FILES[1]).read_bytes()


def test_an_answer_that_differs_is_seen() -> None:
    def classes(p: float) -> dict:
        return {"predictions": [{"label": "one", "probability": p}]}

    assert soak.equal(classes(0.5), classes(0.500009)) and not soak.equal(classes(0.5), classes(0.50002))

    def words(start: float, confidence: float, text: str = "a") -> dict:
        word = {"text": text, "start": start, "end": 1.0, "confidence": confidence}
        return {"text": text, "segments": [{"text": text, "words": [word]}]}

    assert soak.equal(words(0.5, 0.9), words(0.5, 0.901))
    for other in (words(0.532, 0.9), words(0.5, 0.903), words(0.5, 0.9, "b")):
        assert not soak.equal(words(0.5, 0.9), other)


def test_the_written_results_are_what_was_measured() -> None:
    lines = (command.RESULTS / "serving.jsonl").read_text().splitlines()
    assert (command.RESULTS / "serving.md").read_text() == tables.text([json.loads(line) for line in lines])


@pytest.mark.slow
def test_a_whole_run_and_one_that_goes_on(tmp_path: Path, shelf: Path, capsys) -> None:
    shutil.copytree(shelf, tmp_path / "shelves" / "digits")
    words = ["--shape", "digits", "--adapters", "3", "--requests", "8", "--rounds", "2"]
    words += ["--folder", str(tmp_path / "shelves"), "--out", str(tmp_path / "results")]
    command.main(words)
    text = (tmp_path / "results" / "serving.md").read_text()
    assert "over HTTP, 3 adapters" in text and "one merged model an adapter" in text
    capsys.readouterr()
    command.main(words)
    assert capsys.readouterr().out.count("\n") == 1  # a row for the page: nothing is measured twice
    command.main([*words, "--soak", "10"])
    lines = (tmp_path / "results" / "serving.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    assert found["wrong"] == 0 and found["statuses"]["200"] > 20 and len(found["memory"]) >= 2
