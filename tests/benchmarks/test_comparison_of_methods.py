"""The comparison of methods: which runs each gets, that nothing is done twice or lost, and what is noise."""

import json
import math
import os
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch

from benchmarks import whisper_files
from benchmarks.methods import report, suites
from benchmarks.methods.catalog import METHODS, Method
from benchmarks.methods.commands import _short_of_tests, _validated, words
from benchmarks.methods.ledger import Ledger
from benchmarks.methods.picture import curves, panels
from benchmarks.methods.pooled import pooled
from benchmarks.methods.search import Budget, Cell, carry_out, choice, grid
from benchmarks.methods.statistics import Interval, difference, exceeds_noise, interval, quantile
from benchmarks.methods.suites import Task
from benchmarks.methods.training import built, centre, same_size, train

TINY = Task(
    "tiny",
    ("recipe=vit_digits", "data.train_size=32", "trainer.max_epochs=1", "lora.rank=4"),
    "acc",
    source=("source", "source_off"),
)
LORA = Cell("tiny", "lora", 1e-2, "max", Budget((0, 1), (10, 11)))


class Trainings:
    """Trainings that give made scores, the best of them at a rate; and those that were asked for."""

    def __init__(self, best: float, stop_after: int = 10**9) -> None:
        self.asked, self.best, self.left = [], best, stop_after

    def __call__(self, stage: str, lr: float, seed: int) -> dict:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append((stage, lr, seed))
        val = 90 - 10 * abs(math.log10(lr / self.best)) + 0.01 * seed
        found = {"val": val, "cpu_seconds": 2.0, "trained": 5, "saved_bytes": 0, "state_bytes": 0, "rank": 4}
        return found | ({"test": 80.0 + seed, "source": 90.0} if stage == "final" else {})


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "runs.jsonl", tmp_path / "claims")


def test_a_rate_is_the_best_of_five_and_the_table_rests_on_other_seeds(ledger):
    trainings = Trainings(1e-2)
    assert carry_out(LORA, ledger, trainings) == 1e-2
    assert grid(1e-2) == [2.2e-3, 4.6e-3, 1e-2, 2.2e-2, 4.6e-2]
    tried = [("tune", lr, seed) for lr in grid(1e-2) for seed in (0, 1)]
    assert trainings.asked == [*tried, ("final", 1e-2, 10), ("final", 1e-2, 11)]


@pytest.mark.parametrize(("best", "rate", "rates"), [(0.1, 0.1, 7), (4.6e-4, 4.6e-4, 8), (1e3, 1.0, 9)])
def test_a_best_rate_at_an_edge_has_more_beyond_it(ledger, best, rate, rates):
    assert carry_out(LORA, ledger, Trainings(best)) == pytest.approx(rate, rel=0.05)
    found = choice(ledger.runs().values(), "max", (0, 1))
    assert len(found.tried) == rates and found.inside == (best < 1e3)


def test_a_task_without_trials_of_its_own_takes_the_rate_of_another(ledger):
    small, trainings = replace(LORA, task="small", rates_of="tiny"), Trainings(1e-2)
    assert carry_out(small, ledger, trainings) is None and not trainings.asked  # not chosen yet
    carry_out(LORA, ledger, Trainings(2.2e-2))
    assert carry_out(small, ledger, trainings) == 2.2e-2
    assert trainings.asked == [("final", 2.2e-2, 10), ("final", 2.2e-2, 11)]
    task = replace(TINY, budget=LORA.budget, rates_of="tiny")
    (row,) = report.rows("small", task, ledger.runs().values())
    assert row.cells[1] == "0.022" and row.cells[-1] == "of tiny"


def test_what_was_killed_goes_on_and_nothing_is_trained_twice(ledger):
    whole = Trainings(2.2e-2)
    carry_out(LORA, Ledger(ledger.path.with_name("whole.jsonl"), ledger.claims), whole)
    asked = []
    for stop in (3, 4, 10**9):
        part = Trainings(2.2e-2, stop)
        try:
            carry_out(LORA, ledger, part)
        except KeyboardInterrupt:
            with ledger.path.open("a") as file:
                file.write('{"task": "tiny", "method": "lora", "st')  # a line that a kill cut short
        asked += part.asked
    assert asked == whole.asked
    lines = ledger.path.read_text().splitlines()
    assert len(lines) == len(asked) and all(json.loads(line) for line in lines)


def test_a_part_of_the_work_belongs_to_one_process_until_that_dies(ledger):
    code = f"""
from pathlib import Path
from benchmarks.methods.ledger import Ledger
ledger = Ledger(Path({str(ledger.path)!r}), Path({str(ledger.claims)!r}))
with ledger.claimed("suite", "task", "lora") as own:
    print(own, flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
    )
    assert other.stdout.readline().strip() == "True"
    with ledger.claimed("suite", "task", "lora") as own:
        assert not own
    with ledger.claimed("suite", "task", "full") as own:
        assert own
    other.kill()
    other.communicate()
    with ledger.claimed("suite", "task", "lora") as own:
        assert own


def test_a_refusal_is_written_once_and_asked_again(ledger):
    asked = []

    def refused(stage, lr, seed):
        asked.append(lr)
        return {"refused": "lora.init=x: there is none."}

    for _ in range(2):
        assert carry_out(LORA, ledger, refused) is None
    assert len(asked) == 2 and len(ledger.path.read_text().splitlines()) == 1
    (row,) = [r for r in report.rows("tiny", TINY, ledger.runs().values()) if r.name == "lora"]
    assert "refused: lora.init=x" in row.cells[2] and row.score is None
    assert carry_out(LORA, ledger, Trainings(1e-2)) == 1e-2


def test_intervals_are_those_of_student():
    assert [round(quantile(n), 3) for n in (1, 2, 4, 30)] == [12.706, 4.303, 2.776, 2.042]
    values = [1.0, 2.0, 4.0]
    half = 4.303 * stdev(values) / 3**0.5
    found = interval(values)
    assert found.mean == mean(values) and found.half == pytest.approx(half, rel=1e-3)
    assert exceeds_noise(interval([1.0])) is None and exceeds_noise(found) is False


def test_a_difference_is_paired_by_seed_and_covers_the_truth_as_often_as_it_says():
    own, other = {1: 70.0, 2: 60.0, 3: 80.1}, {1: 69.0, 2: 59.0, 3: 79.0, 4: 10.0}
    found = difference(own, other)
    assert found.mean == pytest.approx(31 / 30) and exceeds_noise(found)  # though seeds differ by 20
    assert difference({1: 1.0}, {2: 1.0}) is None
    draws = np.random.default_rng(0).normal(0, 1, (2000, 3))
    alarms = [exceeds_noise(interval(list(row))) for row in draws]
    assert 0.03 < mean(alarms) < 0.07


def test_the_table_says_what_exceeds_the_noise(ledger, tmp_path, monkeypatch):
    task = Task("tiny", TINY.words, "acc", budget=LORA.budget)
    monkeypatch.setitem(suites.SUITES, "small", {"tiny": task})
    carry_out(LORA, ledger, Trainings(1e-2))
    far = Cell("tiny", "full", 1e-3, "max", LORA.budget)
    carry_out(far, ledger, lambda *key: Trainings(1e-3)(*key) | {"test": 50.0 + key[2], "cpu_seconds": 3.0})
    report.write("small", ledger, tmp_path)
    text = (tmp_path / "methods_small.md").read_text()
    assert "| LoRA | 0.01 | 90.5 ± 6.4 |  |  | 5 | 1.00 |" in text
    assert "| full fine-tuning | 0.001 | 60.5 ± 6.4 | -30.0 ± 0.0 | worse | 5 | 1.50 |" in text
    assert (tmp_path / "methods_small.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "methods_small_few.png").exists()
    for shots in (5, 10):
        part = Task(f"{shots}", TINY.words, "acc", budget=LORA.budget, curve=("digits a class", shots))
        suites.SUITES["small"][f"tiny_{shots}"] = part
        carry_out(replace(LORA, task=f"tiny_{shots}"), ledger, Trainings(1e-2))
        full = replace(far, task=f"tiny_{shots}")
        carry_out(full, ledger, lambda *key, by=shots: Trainings(1e-3)(*key) | {"test": 70.0 + by + key[2]})
    report.write("small", ledger, tmp_path)
    text = (tmp_path / "methods_small.md").read_text()
    assert "## digits a class, all together" in text
    assert "| full fine-tuning | 4 | -2.5 ± 4.6 | -2.5 ± 31.8 |  |  |" in text
    assert (tmp_path / "methods_small_few.png").read_bytes().startswith(b"\x89PNG")


def test_differences_over_a_curve_are_of_pairs_and_of_amounts():
    five, ten = (
        {"a": {1: 3.0, 2: 5.0}, "b": {1: 1.0, 2: 2.0, 3: 9.0}},
        {"a": {1: 9.0}, "b": {1: 4.0}, "c": {1: 0.0}},
    )
    pairs, amounts, count = pooled([five, ten], "a", "b")
    assert (pairs, count) == (interval([2.0, 3.0, 5.0]), 3)
    assert amounts == interval([2.5, 5.0])
    assert pooled([five, ten], "c", "b") is None and pooled([five], "a", "b") is None
    assert pooled([five, {"a": {1: 1.0}, "b": {2: 1.0}}], "a", "b") is None


def _row(name, score):
    return report.Row(name, name, Interval(score, score - 1, score + 1), None, {}, ())


def test_a_curve_shows_methods_of_two_points_or_more_by_the_amount():
    ten, five = (replace(TINY, curve=("a class", shots)) for shots in (10, 5))
    before = _row("before", 1)
    found = {ten: [before, _row("lora", 9), _row("pissa", 8)], five: [before, _row("lora", 7)]}
    of = curves(found | {TINY: [_row("lora", 5)]})
    assert list(of) == ["a class"] and list(of["a class"]) == ["lora"]
    assert [(shots, score.mean) for shots, score in of["a class"]["lora"]] == [(5, 7), (10, 9)]
    assert curves({ten: found[ten]}) == {}


def test_a_panel_compares_methods_that_no_curve_shows():
    ten, five = (replace(TINY, curve=("a class", shots)) for shots in (10, 5))
    both = [_row("lora", 9), _row("full", 8)]
    alone = replace(TINY, label="alone")
    one_seed = [replace(row, score=interval([row.score.mean])) for row in both]
    found = {ten: [*both, _row("pissa", 8)], five: both, TINY: [_row("before", 1), *both], alone: both[:1]}
    found[replace(TINY, label="one seed")] = one_seed
    assert {task: [row.name for row in rows] for task, rows in panels(found).items()} == {
        ten: ["lora", "full", "pissa"],
        TINY: ["lora", "full"],
    }


def test_memory_that_a_run_does_not_tell_is_no_zero():
    assert report._kept({"saved_bytes": 2**20, "state_bytes": 2**19}) == "1.5"
    assert report._kept({"cpu_seconds": 2.0}) == ""


def test_a_recording_without_a_sample_is_in_no_manifest(tmp_path):
    whole, empty, long = (tmp_path / f"{name}.wav" for name in ("whole", "empty", "long"))
    for path, seconds in ((whole, 1), (empty, 0), (long, 11)):
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(b"\0\0" * 8000 * seconds)
    rows = [(path, "words", "level", "train") for path in (whole, empty, long)]
    whisper_files.write_manifest(tmp_path / "some.csv", rows)
    lines = (tmp_path / "some.csv").read_text().splitlines()
    assert lines == ["path,text,speaker,split", f"{whole},words,level,train"]


def test_every_task_has_every_method_in_an_order_without_repeats():
    for suite, tasks in suites.SUITES.items():
        pairs = suites.cells(suite, list(tasks), list(METHODS), METHODS)
        assert len(set(pairs)) == len(pairs) and {task for task, _ in pairs} == set(tasks)
        assert {"lora", "full"} <= {method for task, method in pairs if task == next(iter(tasks))}


def test_a_method_is_trained_as_the_application_trains_it():
    found = train(TINY, METHODS["lora"], "final", 1e-2, 10)
    assert 0 < found["val"] < 100 and 0 < found["test"] < 100 and not found["stopped"]
    assert found["source_off"] > 95 and found["source"] != found["source_off"]
    run = built(TINY, METHODS["lora"], 1e-2, 10)
    assert (
        found["trained"]
        == run.prepared.trained
        == sum(update.numel() for update in _adapted(run) if update.requires_grad)
    )
    assert found["state_bytes"] >= 12 * found["trained"] and found["saved_bytes"] > 1e5


def _adapted(run):
    import lora_lightning as ll

    ll.inject(run.task, run.prepared.adapting)
    return list(run.task.parameters())


def test_methods_of_the_same_size_and_those_that_are_refused():
    method = Method("attention", ("lora.target_modules=[qkv]",), match=True)
    rank, wanted = same_size(TINY, method), built(TINY, METHODS["lora"], 1e-2, 0).prepared.trained
    assert built(TINY, method, 1e-2, 0).prepared.trained <= wanted
    larger = Method("more", (*method.words, f"lora.rank={rank + 1}"))
    assert built(TINY, larger, 1e-2, 0).prepared.trained > wanted
    assert centre(TINY, METHODS["rslora"]) == METHODS["rslora"].rate * centre(TINY, METHODS["lora"])
    assert "lora.init=nothing" in train(TINY, Method("x", ("lora.init=nothing",)), "tune", 1e-2, 0)["refused"]


@pytest.mark.slow
def test_pefts_own_method_trains_beside_ours():
    pytest.importorskip("peft")
    options = {"init_lora_weights": "pissa"}
    told = train(TINY, Method("PiSSA of every layer", method="peft", peft=options), "tune", 1e-2, 0)
    assert "PEFT: Unknown initialization" in told["refused"]
    linear = ("lora.exclude_modules=[patch_embed.proj]",)
    run = built(TINY, Method("PiSSA by PEFT", linear, "peft", peft=options), 1e-2, 0)
    base = built(TINY, Method("LoRA", linear), 1e-2, 0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert run.prepared.trained == base.prepared.trained
    assert torch.allclose(run.task.eval()(images), base.task.eval()(images), atol=1e-4)
    assert any(p.abs().sum() > 0 for n, p in run.task.named_parameters() if ".lora_B." in n)
    by_data = built(TINY, Method("EVA by PEFT", linear, "peft", peft={"init_lora_weights": "eva"}), 1e-2, 0)
    factors = [p for n, p in by_data.task.named_parameters() if ".lora_A." in n]
    assert {a.shape[0] for a in factors} == {base.config.lora.rank}
    assert all(torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4) for a in factors)


def test_a_trial_by_commands_hears_few_tests(tmp_path):
    header, rest = "path,text,speaker,split", ["a.wav,hm,s,train", "b.wav,ha,t,val"]
    tests = [f"{i}.wav,ho,u,test" for i in range(9)]
    (tmp_path / "czech.csv").write_text("\n".join([header, *tests, *rest]) + "\n")
    option, path = _short_of_tests(f"data.manifest={tmp_path}/czech.csv").split("=")
    assert option == "data.manifest"
    assert Path(path).read_text().splitlines() == [header, *tests[:4], *rest]


def test_a_trial_by_commands_is_shorter_where_its_task_says_so(tmp_path):
    (tmp_path / "czech.csv").write_text("path,text,speaker,split\n")
    hour, minute = suites.SUITES["real"]["czech"], suites.SUITES["real"]["czech_1"]
    trial, run = (set(words(hour, METHODS["lora"], stage, 1e-3, 0, tmp_path)) for stage in ("tune", "final"))
    short, whole = f"data.manifest={tmp_path}/czech_trial.csv", f"data.manifest={tmp_path}/czech.csv"
    assert trial - run == {short, *hour.trial} and run - trial == {whole}
    trial, run = (
        set(words(minute, METHODS["lora"], stage, 1e-3, 0, tmp_path)) for stage in ("tune", "final")
    )
    assert trial - run == {short} and run - trial == {whole}


def test_what_a_run_by_commands_has_validated_is_the_checkpoint_that_it_tests(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,val/wer,lr\n1,,0.1\n2,0.5,\n4,0.25,\n6,0.75,\n")
    assert _validated(tmp_path) == 25.0
    (tmp_path / "csv" / "metrics.csv").write_text("step,val/wer,lr\n1,,0.1\n")
    assert _validated(tmp_path) is None
