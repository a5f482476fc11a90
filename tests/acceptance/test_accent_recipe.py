"""Several adapters in one run, on a tiny corpus of tones: tables, files, resume, mistakes."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lora_lightning.app.application import main
from lora_lightning.data.espeak_corpus import COLUMNS
from lora_lightning.tasks.ctc import SpeechRecognizer
from tests.terminal import beside_progress

RATE = 16_000
TONES = {"a": 300, "b": 700, "c": 1500}
TEXTS = {"train": ["ab", "bc c", "ca", "b a"], "val": ["abc", "c b"], "test": ["ba", "a cb", "cc"]}
SHIFT = {"us": 1.0, "scottish": 1.2, "caribbean": 0.8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters as tones, higher or lower by the accent."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    time = np.arange(RATE // 8) / RATE
    for accent, shift in SHIFT.items():
        for split in TEXTS if accent != "us" else ("val", "test"):
            name, end, waves = f"{accent}-{split}.flac", 0.0, []
            for i, text in enumerate(TEXTS[split]):
                tones = [np.sin(2 * np.pi * shift * TONES.get(c, 0) * time) for c in text]
                waves += [0.3 * np.concatenate(tones)]
                start, end = end, end + len(text) / 8
                cells = [f"{accent}-{split}-{i}", name, start, end, text, accent, f"{split}{i % 2}", split]
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
            soundfile.write(folder / name, np.concatenate(waves), RATE)
    with open(folder / "manifest.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    (folder / "corpus.json").write_text(json.dumps({"sha256": sums}))
    return folder


def words(corpus: Path) -> list[str]:
    return [
        "recipe=accent_espeak",
        f"data.root={corpus}",
        "model.checkpoint=null",
        "model.width=16",
        "lora.rank=2",
        "trainer.max_epochs=2",
        "trainer.check_val_every_n_epoch=1",
        "trainer.enable_progress_bar=false",
        "hydra.run.dir=run",
    ]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def test_one_adapter_each_and_then_together(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[str]] = []
    monkeypatch.setattr(SpeechRecognizer, "on_test_epoch_end", lambda task: heard.append(list(task.heard)))
    main(words(corpus))
    own, compared = ["before", "after"], [["base"], ["after"], ["after"]]  # no page shows them
    assert heard == [own, *compared] * 2
    out, err = capsys.readouterr()
    assert beside_progress(err) == ""
    for name in ("scottish", "caribbean"):
        assert f"recipe accent_espeak · adapter {name}" in out
        assert (Path("run") / name / "adapter" / "adapter_model.safetensors").is_file()
        assert "data:audio/" in (Path("run") / name / "report.html").read_text()
        results = json.loads((Path("run") / name / "results.json").read_text())
        assert [r["method"] for r in results] == ["none", "linear_probe", "lora", "full"]
        assert results[1]["trained"] == 29 * (16 + 1)  # the head alone
        for result in results:
            assert set(result["scores"]) == set(result["intervals"]) == {"wer", "cer", "wer_us"}
            low, high = result["intervals"]["wer"]
            assert low <= result["scores"]["wer"] <= high
    assert out.count("fewer %") == 2
    assert out.count("WER %, before") == 2
    assert "9 of 9 transcripts are those of the adapter by itself" in out
    rows = json.loads(Path("run/adapters.json").read_text())["rows"]
    assert [row[0] for row in rows] == ["scottish", "caribbean", "us"]  # what was adapted to comes first
    us = rows[2]
    assert us[1] == us[4]  # the base, and routed to it

    # Stopped before the second: the first is not trained again.
    made = (Path("run/scottish/results.json")).stat().st_mtime
    shutil.rmtree("run/caribbean")
    main(["resume=run"])
    out = capsys.readouterr().out
    assert "adapter scottish: is done" in out
    assert "adapter caribbean · seed 0" in out
    assert "9 of 9 transcripts" in out
    assert Path("run/scottish/results.json").stat().st_mtime == made


def test_mistakes_are_told_before_anything_is_trained(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words(corpus), "+adapters.irish=3"])
    message = capsys.readouterr().err
    assert "adapters.irish=3: give options as a mapping" in message
    with pytest.raises(SystemExit):
        main([*words(corpus), "+adapters.scottish.data.acent=us", "compare=1"])
    message = capsys.readouterr().err
    assert "adapters.scottish: data.acent=us" in message
    assert "Did you mean 'accent'?" in message
    assert message.count("compare=1") == 1
    assert not Path("run").exists()
