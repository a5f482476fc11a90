"""The program that makes corpora: what it writes, and that nothing else imports it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning.data.accents import AccentsDataModule, manifest
from lora_lightning.data.espeak_corpus import SPEAKERS, WORDS, main, sentences, split_of

PACKAGE = Path(__file__).parents[2] / "lora_lightning"
SIZES = {"train": 30, "val": 10, "test": 20}


def test_sentences_are_split_alike_in_every_corpus() -> None:
    plans = [
        list(sentences(["us", "scottish"], SIZES, SPEAKERS, WORDS.split(), ["us"], seed)) for seed in (0, 1)
    ]
    for plan in plans:
        assert len({s.text for s in plan}) == len(plan) == 30 + 60
        assert all(split_of(s.text) == s.split for s in plan)
        assert {s.split for s in plan if s.accent == "us"} == {"val", "test"}
        assert all(s.speaker in SPEAKERS[s.split] for s in plan)
    trained = {s.text for plan in plans for s in plan if s.split == "train"}
    assert not trained & {s.text for plan in plans for s in plan if s.split == "test"}


def test_nothing_else_imports_the_synthesizer() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.name != "espeak_corpus.py":
            found = re.search(r"^\s*(?:import|from)\s.*espeak", file.read_text(), re.MULTILINE)
            assert found is None, f"{file}: {found}"


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists"):
        main([str(tmp_path)])


@pytest.mark.skipif(not importlib.util.find_spec("espeakng_loader"), reason="needs the extra espeak")
def test_a_small_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    words = tmp_path / "words.txt"
    words.write_text("Kettle lamp\nbutter sugar sea")
    options = ["--accents", "rp", "--train", "4", "--val", "1", "--test", "2", "--words", str(words)]
    command = [sys.executable, "-m", "lora_lightning.data.espeak_corpus", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert "eSpeak NG" in done.stdout
    rows = manifest(folder)
    assert [row["split"] for row in rows].count("train") == 4
    assert set(" ".join(row["text"] for row in rows).split()) <= {"kettle", "lamp", "butter", "sugar", "sea"}
    data = AccentsDataModule("rp", kept=[], root=str(folder))
    data.setup()
    for utterance in [*data.train_set, *data.val_set, *data.test_set]:
        assert 0.5 < len(utterance.wave) / 16_000 < 4
        assert utterance.wave.abs().max() > 0.1
