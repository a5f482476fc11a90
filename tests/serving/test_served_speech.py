"""Speech served: the words of `transcribe`, whoever shares the batch, and segments as they are heard."""

import io
import json
import queue
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from served import engine_for, save_speech, sound, utterances

from lora_lightning.app.cli import main
from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.inputs import BadUpload, Limits, wave_of


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices")
    for seed, name in enumerate(["ada", "bob"]):
        save_speech(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def engine(shelf: Path):
    made = engine_for({"adapters": str(shelf), "max_wait_ms": 200.0}, Limits(seconds=60))
    yield made
    made.close()


def test_words_are_those_of_transcribe(engine, shelf: Path, tmp_path: Path) -> None:
    waves = {"a.wav": utterances(4.0), "b.wav": utterances(5.0, pause=1.5), "c.wav": utterances(3.0)}
    for name, wave in waves.items():
        (tmp_path / name).write_bytes(sound(wave))
    told: dict[tuple[str, str], queue.Queue[Event]] = {}
    for name in waves:
        for adapter in ("ada", "bob"):
            one = told.setdefault((name, adapter), queue.Queue())
            engine.submit(
                Ask(adapter, "transcribe", (tmp_path / name).read_bytes(), {"stream": True}), one.put
            )
    for adapter in ("ada", "bob"):
        out = tmp_path / adapter
        main(["transcribe", str(tmp_path), f"adapter={shelf / adapter}", "format=json", f"out={out}"])
        for row in map(json.loads, [file.read_text() for file in sorted(out.iterdir())]):
            *parts, last = all_of(told[Path(row.pop("path")).name, adapter])
            answer = dict(last.content)
            assert answer.pop("adapter") == adapter and row["text"]
            assert nearly(answer) == nearly(row)
            assert nearly({"segments": [e.content["segment"] for e in parts]}) == nearly(
                {"segments": row["segments"]}
            )


def all_of(told: queue.Queue[Event]) -> list[Event]:
    events = [told.get(timeout=60)]
    while events[-1].what == "part":
        events.append(told.get(timeout=60))
    return events


def nearly(content: dict) -> dict:
    """With probabilities to 2 digits: they are rounded to 3, and differ in the sixth."""
    return json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 2))


def test_silence_and_what_is_no_sound(engine) -> None:
    told: queue.Queue[Event] = queue.Queue()
    engine.submit(Ask(None, "transcribe", sound(np.zeros(16_000, np.float32))), told.put)
    event = told.get(timeout=60)
    assert event.content == {"adapter": None, "seconds": 1.0, "text": "", "segments": []}


def wav(rate: int, channels: int = 1, samples: int = 100, claimed: int | None = None) -> bytes:
    data = bytes(2 * channels * samples)
    size = len(data) if claimed is None else claimed
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, channels, rate,
                       2 * rate * channels, 2 * channels, 16)  # fmt: skip
    return head + b"data" + struct.pack("<I", size) + data


def flac(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(8_000 * seconds), np.float32), 8_000, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 415),
        (b"RIFF", 415),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 415),
        (flac(61.0), 413),  # a few kB
        (sound(np.zeros(0, np.float32)), 413),
        (wav(44_101), 422),  # a filter of gigabytes
        (wav(16_000, channels=200), 422),
        (sound(utterances(2.0), "FLAC")[:5000], 422),
    ],
)
def test_limits_are_looked_at_before_anything_is_decoded(body: bytes, status: int) -> None:
    with pytest.raises(BadUpload) as told:
        wave_of(body, Limits(seconds=60))
    assert told.value.status == status and len(str(told.value).splitlines()) == 1


def test_every_form_of_a_sound_is_read() -> None:
    wave = utterances(1.0)
    for form in ("WAV", "FLAC", "OGG", "MP3"):
        assert abs(len(wave_of(sound(wave, form), Limits())) - len(wave)) < 3000
    assert len(wave_of(wav(8_000, claimed=2**31), Limits())) == 200  # as much as there is
