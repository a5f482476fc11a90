"""The embedded corpus: whole, split honestly; and the data module's batches and messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_lightning.data import accents
from lora_lightning.data.accents import EMBEDDED, VOCABULARY, AccentsDataModule, SimilarLengths, manifest
from lora_lightning.data.speech import Utterance, collate
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError

ROWS = manifest(EMBEDDED)


def test_no_speaker_and_no_sentence_is_in_two_splits() -> None:
    for column in ("speaker", "text"):
        parts = [{r[column] for r in ROWS if r["split"] == s} for s in ("train", "val", "test")]
        assert all(parts)
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 6_000_000
    note = (EMBEDDED / "README.md").read_text()
    assert "eSpeak NG" in note
    assert "GPL-3" in note
    assert {r["accent"] for r in ROWS if r["split"] == "train"} == {"scottish", "caribbean"}


def test_every_utterance_is_in_its_file() -> None:
    made = json.loads((EMBEDDED / "corpus.json").read_text())
    assert set(made["sha256"]) == {*(r["path"] for r in ROWS), "manifest.tsv"}
    end = {}
    for row in ROWS:
        assert float(row["start"]) == end.get(row["path"], 0.0)
        assert float(row["end"]) > float(row["start"])
        end[row["path"]] = float(row["end"])


def test_the_batches() -> None:
    data = AccentsDataModule("caribbean", train_size=40, batch_size=16)
    data.setup()
    assert data.provides == {"vocabulary": VOCABULARY, "kept": ["us"]}
    assert [len(b.texts) for b in data.train_dataloader()] == [16, 16, 8]
    test = list(data.test_dataloader())
    assert {a for b in test for a in b.accents} == {"caribbean", "us"}
    for batch in test:
        assert batch.waves.dtype == torch.float32
        assert batch.waves.shape == (len(batch.texts), batch.lengths.max())
        for wave, length in zip(batch.waves, batch.lengths, strict=True):
            assert not wave[length:].any()
            assert 0.01 < wave[:length].std() < 0.3  # speech, not silence or noise
    assert set("".join(t for b in test for t in b.texts)) <= set(VOCABULARY[1:])


def test_training_batches_are_of_similar_lengths_and_random() -> None:
    lengths = torch.randint(1000, 9000, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = SimilarLengths(lengths, 32)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(256))
    longest = [max(lengths[i] for i in first[k : k + 32]) for k in range(0, 256, 32)]
    assert 32 * sum(longest) < 1.3 * sum(lengths)


def test_collate_pads_with_zeros() -> None:
    batch = collate([Utterance(torch.ones(3), "a", "1", "us", "m1"), Utterance(torch.ones(5), "b", "2")])
    assert batch.waves.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.lengths.tolist() == [3, 5]
    assert (batch.texts, batch.ids, batch.speakers) == (["a", "b"], ["1", "2"], ["m1", ""])


def test_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AccentsDataModule("scotish", kept=["uss"], train_size=0, batch_size=2.5)  # type: ignore[arg-type]
    named = [problem.partition("=")[0] for problem in caught.value.problems]
    assert named == ["accent", "kept", "train_size", "batch_size"]
    assert "Did you mean 'scottish'?" in caught.value.problems[0]
    with pytest.raises(ConfigError, match=r"us: accents has no training part.*--accents us --tested"):
        AccentsDataModule("us")


def test_a_corpus_that_is_not_there_or_was_changed(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"python -m lora_lightning\.data\.espeak_corpus"):
        AccentsDataModule(root=str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(EMBEDDED, copy)
    with open(copy / "scottish-val.opus", "r+b") as file:
        file.seek(5000)
        file.write(b"xx")
    data = AccentsDataModule(root=str(copy))
    with pytest.raises(AdapterFileError, match=r"scottish-val\.opus is missing or not the file"):
        data.setup()
    accents.utterances.cache_clear()
