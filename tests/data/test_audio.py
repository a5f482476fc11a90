"""Reading audio: formats, parts, channels, rates, and files that are none."""

import sys

import numpy as np
import pytest
import soundfile
import speech_files
import torch

from lora_lightning.data.audio import AudioError, audio_info, read_audio


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_every_format_gives_the_same_sound(tmp_path, suffix, rate):
    path = speech_files.write(tmp_path / f"a.{suffix}", 1.0, rate)
    wave = read_audio(path)
    assert wave.dtype == torch.float32 and wave.shape == (16_000,)
    expected = torch.from_numpy(speech_files.tone(1.0, 16_000)[:, 0])
    middle = slice(2000, -2000)
    assert (wave - expected)[middle].abs().max() < 0.03  # the lossy ones
    assert audio_info(path) == (1.0, rate, 1)


def test_channels_are_averaged_and_parts_are_cut(tmp_path):
    stereo = np.stack([np.full(16_000, 0.5), np.linspace(-0.5, 0.5, 16_000)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 16_000, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav")
    assert torch.allclose(whole, torch.from_numpy(stereo.mean(1)).float())
    part = read_audio(tmp_path / "a.wav", 0.25, 0.5)
    assert torch.equal(part, whole[4000:8000])
    assert torch.equal(read_audio(tmp_path / "a.wav", 0.75, 9.0), whole[12_000:])


def test_what_is_no_audio_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").touch()
    cut = speech_files.write(tmp_path / "cut.flac", 5.0)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for name in ("text.wav", "empty.wav", "cut.flac", "absent.wav"):
        with pytest.raises(AudioError, match=name):
            read_audio(tmp_path / name)
    with pytest.raises(AudioError, match=r"no sample from 2 s to its end"):
        read_audio(speech_files.write(tmp_path / "short.wav", 1.0), start=2)


def test_a_file_that_asks_for_what_is_before_it_is_damaged_and_no_more(monkeypatch) -> None:
    """libsndfile asks from within C, where Python can tell an exception to nobody but the log."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    size = b"\x00\x00\x01@\xfc\xff\xff\xff\xff"
    with pytest.raises(AudioError):
        read_audio(b"FORM\x00\x00\x02\xaeAIFFCOMM\x00\x00\x00\x12\x00\x01" + size + bytes(300))
    assert told == []
