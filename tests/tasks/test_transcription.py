"""Transcription of long recordings: chunks that change nothing, words where they are, every format."""

import json
import math

import pytest
import soundfile
import torch
from torch import nn

from lora_lightning.app import cli
from lora_lightning.tasks.listening import to_srt
from lora_lightning.tasks.transcription import Transcriber

VOCABULARY = ["<blank>", " ", "a", "b", "c"]
PITCHES = {" ": 400, "a": 800, "b": 1200, "c": 1600}  # Hz, whole periods in a window
RATE, WINDOW, HOP = 16_000, 400, 320


class Tones(nn.Module):
    """Hears each letter as a tone of its own: an output every 20 ms from 25 ms, as wav2vec 2.0."""

    def __init__(self) -> None:
        super().__init__()
        t = torch.arange(WINDOW) / RATE
        waves = [f(2 * math.pi * p * t) for p in PITCHES.values() for f in (torch.sin, torch.cos)]
        self.weight = nn.Parameter(torch.stack(waves)[:, None] / WINDOW)
        self.heard: list[tuple[int, ...]] = []

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.heard.append(tuple(waves.shape))
        y = torch.conv1d(waves[:, None], self.weight, stride=HOP)  # (batch, 2 * letters, frames)
        energy = y.view(len(waves), len(PITCHES), 2, -1).square().sum(2).sqrt()
        logits = torch.cat([torch.full_like(energy[:, :1], 0.15), energy], 1).transpose(1, 2) * 60
        return logits, (lengths - WINDOW) // HOP + 1


def spoken(text: str, silence: float = 0.0) -> torch.Tensor:
    """Each letter a tone of 80 ms and 40 ms of silence; `/` is a second of silence."""
    t = torch.arange(int(0.08 * RATE)) / RATE
    parts = [torch.zeros(int(silence * RATE))]
    for c in text:
        tone = [torch.zeros(RATE)] if c == "/" else [torch.sin(2 * math.pi * PITCHES[c] * t)]
        parts += [*tone, torch.zeros(int(0.04 * RATE))]
    return torch.cat(parts)


def test_words_stand_where_they_are_said():
    result = Transcriber(Tones(), VOCABULARY)(spoken("ab cab", silence=0.5))
    assert result.text == "ab cab" and len(result.segments) == 1
    first, second = result.segments[0].words
    assert first.start == pytest.approx(0.5, abs=0.03) and first.end == pytest.approx(0.5 + 0.2, abs=0.05)
    assert second.start == pytest.approx(0.5 + 0.36, abs=0.03)
    assert second.end == pytest.approx(0.5 + 0.68, abs=0.05) and 0.5 < second.confidence <= 1


def test_chunks_change_nothing():
    text = "ab cab bac " * 12 + "abc"
    wave = spoken(text)
    whole = Transcriber(Tones(), VOCABULARY, chunk=60.0)
    parts = Transcriber(Tones(), VOCABULARY, chunk=1.0, overlap=0.4, batch=3)
    assert whole.hop == parts.hop == HOP
    assert torch.allclose(whole.log_probs(wave), parts.log_probs(wave), atol=1e-5)
    assert parts(wave).text == whole(wave).text == text
    assert max(shape[1] for shape in parts.model.heard[2:]) == RATE  # the first two measured the hop


class WrongAtEnds(Tones):
    """Hears nothing right where it does not know what comes before and after."""

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, frames = super().forward(waves, lengths)
        for row, count in zip(logits, frames.tolist()):
            row[:5] = row[count - 5 :] = 0.0
        return logits, frames


def test_what_lies_near_the_ends_of_a_chunk_is_not_used():
    wave = spoken("ab cab bac " * 9 + "abc")
    expected = Transcriber(Tones(), VOCABULARY, chunk=60.0).log_probs(wave)[5:-8]
    found = Transcriber(WrongAtEnds(), VOCABULARY, chunk=1.0, overlap=0.4).log_probs(wave)[5:-8]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("samples", [400, 15_999, 16_000, 16_001, 25_600, 25_601, 48_000])
def test_every_length_gives_every_output(samples):
    wave = torch.randn(samples)
    parts = Transcriber(Tones(), VOCABULARY, chunk=1.0, overlap=0.4)
    assert torch.allclose(parts.log_probs(wave), Transcriber(Tones(), VOCABULARY).log_probs(wave), atol=1e-5)


def test_several_recordings_are_heard_together_and_kept_apart():
    waves = [spoken("ab"), spoken("c" * 20), torch.zeros(0), torch.zeros(RATE), spoken("ba ab " * 8)]
    together = Transcriber(Tones(), VOCABULARY, chunk=1.0, overlap=0.4, batch=4)
    results = list(together.all(waves))
    assert [r.text for r in results] == ["ab", "c" * 20, "", "", ("ba ab " * 8).strip()]
    assert [r.seconds for r in results] == [round(len(w) / RATE, 3) for w in waves]
    assert max(shape[0] for shape in together.model.heard) == 4


def test_segments_end_at_pauses_and_are_not_too_long():
    result = Transcriber(Tones(), VOCABULARY, longest=3.0)(spoken("ab cab/ba " + "cab abc " * 9))
    texts = [s.text for s in result.segments]
    assert texts[0] == "ab cab" and len(texts) > 3
    assert all(s.end - s.start <= 3.0 for s in result.segments)
    assert " ".join(texts) == "ab cab ba " + ("cab abc " * 9).strip()


def test_subtitles():
    blocks = to_srt(Transcriber(Tones(), VOCABULARY)(spoken("ab/c", silence=0.5))).split("\n\n")
    assert len(blocks) == 2 and blocks[0].startswith("1\n00:00:00,5") and blocks[0].endswith("\nab")
    assert " --> 00:00:0" in blocks[1] and blocks[1].startswith("2\n00:00:01,7")


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lightning.app.transcribe.recognizer", lambda *_: (Tones(), VOCABULARY))
    for name, text in (("one.wav", "ab cab"), ("deep/two.flac", "cab/abc"), ("deep/two.ogg", "b")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, spoken(text, 0.3).numpy() * 0.9, RATE)
    return tmp_path / "in"


def test_plain_text_of_files_and_folders(recordings, capsys):
    cli.main(["transcribe", str(recordings / "one.wav"), "recipe=x"])
    assert capsys.readouterr().out == "ab cab\n"
    cli.main(["transcribe", str(recordings), "recipe=x"])
    lines = capsys.readouterr().out.splitlines()
    heard = {"deep/two.flac": "cab abc", "deep/two.ogg": "b", "one.wav": "ab cab"}
    assert lines == [f"{recordings / name}\t{text}" for name, text in heard.items()]


def test_json_and_subtitles_into_a_folder(recordings, tmp_path, capsys):
    cli.main(["transcribe", str(recordings / "one.wav"), "recipe=x", "format=json"])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "ab cab" and [w["text"] for w in found["segments"][0]["words"]] == ["ab", "cab"]
    cli.main(["transcribe", str(recordings), "recipe=x", "format=srt", f"out={tmp_path / 'out'}"])
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.srt"))
    assert written == ["deep/two.flac.srt", "deep/two.ogg.srt", "one.srt"]
    assert (tmp_path / "out" / "one.srt").read_text().startswith("1\n00:00:00,3")
    cli.main(["transcribe", str(recordings / "one.wav"), "recipe=x", f"out={tmp_path / 'text.txt'}"])
    assert (tmp_path / "text.txt").read_text() == "ab cab\n"


def test_a_damaged_file_is_named_when_the_others_are_done(recordings, capsys):
    (recordings / "bad.mp3").write_bytes(b"no audio")
    with pytest.raises(SystemExit) as end:
        cli.main(["transcribe", str(recordings), "recipe=x"])
    captured = capsys.readouterr()
    assert end.value.code == 2 and len(captured.out.splitlines()) == 3
    assert "bad.mp3: is no audio file that libsndfile reads" in captured.err


def test_every_mistake_at_once(recordings, capsys):
    with pytest.raises(SystemExit):
        cli.main(["transcribe", str(recordings / "ones.wav"), "format=str", "overlap=15", "beam=0"])
    said = capsys.readouterr().err
    for part in (
        "one.wav'?", "Did you mean 'srt'", "give adapter=FOLDER", "half of chunk=20", "beam=0",
    ):  # fmt: skip
        assert part in said, part
    with pytest.raises(SystemExit):
        cli.main(["transcribe", str(recordings / "one.wav"), "recipe=x", "device=tpu9"])
    assert "device=tpu9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["transcribe", str(recordings), "chunk=long", "adaptor=x"])
    said = capsys.readouterr().err
    assert "chunk=long: give a number" in said and "Did you mean 'adapter'" in said
