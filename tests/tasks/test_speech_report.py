"""The page of a tested recognizer: what was adapted to first, differences without colour, sounds, sizes."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from html import escape
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import soundfile
import torch
from browser import chromium, opened, problems
from torch.utils.data import DataLoader

import lora_lightning as ll
from lora_lightning.data.speech import SAMPLE_RATE, Utterance, collate
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.report.page import PAGE_FILE, left
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.error_rates import Transcript, count_errors, error_rate
from lora_lightning.tasks.reporting import AFTER, BEFORE
from lora_lightning.tasks.speech_examples import confusion_of
from lora_lightning.tasks.speech_report import _errors, in_order, rate_rows, transcribe_all
from lora_lightning.tasks.speech_sounds import Sounds, spectrogram, words_of
from lora_lightning.tasks.speech_words import as_html, compared

LETTERS = ["_", " ", "a", "b", "c"]
NASTY = "</script><i>"


def test_differences_are_those_that_the_error_rate_counts() -> None:
    draw = random.Random(0)
    for _ in range(200):
        said, heard = (" ".join(draw.choices("abc", k=draw.randint(0, 7))) for _ in range(2))
        pairs = compared(said, heard)
        assert " ".join(p.said for p in pairs if p.said) == said
        assert " ".join(p.heard for p in pairs if p.heard) == heard
        wrong = sum(p.kind != "right" for p in pairs)
        assert wrong == count_errors([Transcript("", "", "", said, heard)])[0][0]
        assert all((p.kind == "right") == (p.said == p.heard) for p in pairs)


def test_differences_are_marked_without_colour() -> None:
    shown = as_html(compared("the hot bath now and here", "the hat now and here then"))
    assert '<span title="hot: heard hat"><b>hot</b><mark>→ hat</mark></span>' in shown
    assert '<span title="bath: left out"><b>bath</b><del>− bath</del></span>' in shown
    assert '<span title="then: put in"><b>&nbsp;</b><ins>+ then</ins></span>' in shown
    assert "<span><b>now</b><span>now</span></span>" in shown
    assert "<i>" not in as_html(compared(NASTY, "a")) and as_html([]).count("nothing") == 1


def test_what_the_model_was_adapted_to_comes_first() -> None:
    heard = {"": [Transcript(str(i), a, "", "a", "a") for i, a in enumerate(("us", "irish", "us", "welsh"))]}
    assert in_order(heard, ["us"]) == ["irish", "welsh", "us"]


def test_letters_and_words_never_cover_each_other() -> None:
    letters = [(c, 0.012 * i) for i, c in enumerate("ab c|abc abba cab")]
    assert [w for w, _ in words_of(letters)] == ["ab", "c", "abc", "abba", "cab"]
    shown = spectrogram(torch.randn(SAMPLE_RATE // 2), letters)
    texts = re.findall(r'<text x="([\d.]+)" y="(\d+)">(\w+)</text>', shown)
    assert len(texts) == 5 + 13
    for i, (x, y, word) in enumerate(texts):
        for other, line, before in texts[:i]:
            clear = float(x) >= float(other) + 6.6 * len(before) or float(other) >= float(x) + 6.6 * len(word)
            assert y != line or clear
    words, spelt = (
        [word for _, y, word in texts if y == line] for line in dict.fromkeys(t[1] for t in texts)
    )
    assert words == ["ab", "c", "abc", "abba", "cab"] and "".join(spelt) == "".join(words), "a line of each"
    assert "ab at 0.0 s, c at 0.0 s" in shown and spectrogram(torch.randn(3), []).count("<text") == 0


def test_sounds_are_small_and_as_many_as_there_is_room_for() -> None:
    sounds, wave = Sounds(60_000), 0.3 * torch.randn(3 * SAMPLE_RATE)
    player = sounds.player(wave, f'a "{NASTY}')
    assert "<i>" not in player and 'preload="none"' in player
    kind, data = re.findall(r'src="data:audio/(\w+);base64,([^"]+)"', player)[0]
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == SAMPLE_RATE and abs(len(heard) - len(wave)) < 3000 and kind in ("mpeg", "flac")
    players = [sounds.player(wave, "b") for _ in range(10)]
    assert any("left out" in p for p in players) and sum(len(p) for p in players) < 90_000


def adapted() -> SpeechRecognizer:
    torch.manual_seed(0)
    task = SpeechRecognizer(conformer_ctc(LETTERS, width=32), LETTERS, kept=["us"])
    ll.inject(task, ll.LoRAConfig(rank=2, target_modules="all"))
    for name, parameter in task.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return task


def noises() -> list[Utterance]:
    """The kept accent first, as a corpus may have it."""
    draw = torch.Generator().manual_seed(0)
    about = [("us", "m1"), ("scottish", f"f{NASTY}"), ("scottish", "m2")]
    return [
        Utterance(0.1 * torch.randn(16000 + 100 * i, generator=draw), "ab c", f"{i}{NASTY}", *about[i % 3])
        for i in range(12)
    ]


def heard_by(task: SpeechRecognizer, heard: list[Utterance], folder: Path, **options: object) -> None:
    """By a Trainer, in another order than the data's."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)  # type: ignore[arg-type]
    batches = DataLoader(heard[::-1], 4, collate_fn=collate)  # type: ignore[arg-type]
    trainer.test(task, batches, verbose=False)


def test_the_report_hears_nothing_again(tmp_path: Path) -> None:
    """It shows what the test has heard with the adapter on and off, of as many batches as were tested."""
    task, sounds = adapted(), noises()
    assert task.report(SimpleNamespace(test_set=sounds), tmp_path) == [] and not list(tmp_path.iterdir())
    heard: list[int] = []
    task.model.register_forward_pre_hook(lambda _, given: heard.append(len(given[0])))
    heard_by(task, sounds, tmp_path, limit_test_batches=2)
    assert heard == [4] * 4, "once on and once off"
    assert {len(one) for one in task.heard.values()} == {8} and task.heard[AFTER] == task.transcripts
    with ll.adapters_off(task):
        off = transcribe_all(task, sounds[::-1][:8])
    assert task.heard[BEFORE] == off and task.heard[AFTER] != off
    heard.clear()
    lines = task.report(SimpleNamespace(test_set=sounds), str(tmp_path))
    assert set(heard) == {1}, "those that are shown, for their alignment"
    assert [line.split()[1] for line in lines[0].splitlines()[2:]] == ["6", "2"]  # of the 8 that were tested
    ids = {u.id for u in sounds[::-1][:8]}
    page = "".join(section.html for section in left(tmp_path)[1])
    assert {u.id for u in sounds if f" · {escape(u.id)}</h3>" in page} == ids

    task.pictured = False
    heard.clear()
    heard_by(task, sounds, tmp_path)
    assert heard == [4] * 3 and task.before() == {} and set(task.heard) == {"after"}


def test_the_target_comes_first_and_the_source_with_the_adapter_off(tmp_path: Path) -> None:
    task = adapted()
    assert task.before() == {}
    heard_by(task, noises(), tmp_path)
    lines = task.report(SimpleNamespace(test_set=noises()), tmp_path)
    before = task.before()  # of the head: the very numbers of the table
    low, high = (f"{100 * bound:.1f}" for bound in before["intervals"]["wer"])
    assert f"{100 * before['scores']['wer']:.1f} ({low}–{high})" in lines[0].splitlines()[2]
    assert before["scores"].keys() == {"wer", "cer", "wer_us"}
    assert [line.split()[0] for line in lines[0].splitlines()[2:]] == ["scottish", "us"]
    title, sections = left(tmp_path)
    assert title == "Heard: scottish, us"
    titles = [section.title for section in sections]
    assert titles[:3] == ["Errors by accent", "Errors by speaker", "Words heard as others"]
    assert titles[3:] == ["scottish: the worst 8 of 8 utterances", "us: the worst 4 of 4 utterances"]
    assert sections[3].html.count("<article") == 8 and "us · " not in sections[3].html
    page = "".join(section.html for section in sections)
    assert "<i>" not in page.replace("<i>nothing</i>", "") and page.count("<audio") == 12
    assert re.search(r"us, which was to be kept, has a WER of [\d.]+ \([^)]*\) % after training", page)
    specs = [json.loads(s) for s in re.findall(r'json">(.*?)</script>', page)]
    accents = specs[0]["data"]["columns"]
    assert accents["accent"] == ["scottish", "scottish", "us (kept)", "us (kept)"]
    assert accents["state"] == [BEFORE, AFTER] * 2
    assert (tmp_path / PAGE_FILE).stat().st_size < 3e6


def test_a_base_is_not_said_to_be_trained(tmp_path: Path) -> None:
    task = SpeechRecognizer(conformer_ctc(LETTERS, width=32), LETTERS, kept=["us"])
    task.now = "base"
    heard_by(task, noises(), tmp_path)
    lines = task.report(SimpleNamespace(test_set=noises()), tmp_path)
    assert "WER %, base" in lines[0] and task.before() == {}
    page = "".join(section.title + section.html for section in left(tmp_path)[1])
    assert "after" not in page and "adapter" not in page and '<p class="soft">base: ' in page
    (one,) = task.examples(SimpleNamespace(test_set=noises()), 1)
    assert "heard, base" in one.words


def test_words_that_are_heard_as_others_are_counted() -> None:
    pairs = [
        ("the hot bath", "the hat bath"),
        ("the hot bath", "the hat"),
        ("a hat", "a hat oh"),
        ("a b c d", "a"),
    ]
    found = confusion_of([Transcript("", "", "", *pair) for pair in pairs], most=3)
    assert found.names == ["b", "hat", "hot", "(other words)", "(nothing)"] or found.names[:2] == [
        "bath",
        "hat",
    ]
    counts = {
        (t, p): found.counts[i][j] for i, t in enumerate(found.names) for j, p in enumerate(found.names)
    }
    assert (
        counts["hot", "hat"] == 2
        and counts["hat", "hat"] == 1
        and counts["(other words)", "(other words)"] >= 4
    )
    assert sum(map(sum, found.counts)) == 3 + 3 + 3 + 4


def test_errors_are_counted_in_words() -> None:
    assert (_errors(1, 2), _errors(0, 1)) == ("1 error in 2 words", "0 errors in 1 word")


def test_rates_of_groups_are_those_of_their_utterances() -> None:
    heard = {
        BEFORE: [Transcript("", "", "", "a b", h) for h in ("a", "b b", "c c")],
        AFTER: [Transcript("", "", "", "a b", "a b")] * 3,
    }
    rows = rate_rows(heard, "speaker", {"m": [0, 2], "f": [1]})
    assert [row["WER %"] for row in rows] == [75, 0, 50, 0]
    low, high = error_rate([heard[BEFORE][0], heard[BEFORE][2]])[1:]
    assert (rows[0]["low"], rows[0]["high"]) == (100 * low, 100 * high)


@pytest.mark.slow
def test_the_page_in_every_look_and_its_sounds_play(tmp_path: Path) -> None:
    task = adapted()
    heard_by(task, noises(), tmp_path)
    task.report(SimpleNamespace(test_set=noises()), tmp_path)
    assert problems(tmp_path / PAGE_FILE) == []
    with chromium() as browser, opened(browser, tmp_path / PAGE_FILE, "print") as page:
        assert not page.locator("audio").first.is_visible(), "paper plays nothing"
    with chromium() as browser, opened(browser, tmp_path / PAGE_FILE) as page:
        seconds = page.evaluate(
            """async () => {
              const sound = document.querySelector("audio");
              sound.load();
              await new Promise((done, failed) => { sound.onloadedmetadata = done; sound.onerror = failed; });
              return sound.duration;
            }"""
        )
        assert 0.9 < seconds < 1.5
