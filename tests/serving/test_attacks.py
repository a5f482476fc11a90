"""Uploads damaged at random: each gets an answer or a refusal of one line, and the server goes on."""

import base64
import json
import random
import struct
import time
from pathlib import Path

import pytest
from desk import client_of
from served import engine_for, picture, save_digits, save_speech, sound, utterances
from starlette.testclient import TestClient

from lora_lightning.serving.inputs import Limits

FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")
SOUNDS = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU")
GROWTH = 64 * 2**20  # bytes, of thousands of uploads
HEADERS = ({}, {"content-type": "image/png"}, {"content-type": "audio/wav"}, {"content-type": "text/plain"})


def mutated(body: bytes, chance: random.Random) -> bytes:
    """With bytes changed, cut off, repeated, put in, or exchanged with others."""
    data = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        at, way = chance.randrange(len(data) + 1), chance.randrange(6)
        if way == 0 and data:
            data[at % len(data)] = chance.randrange(256)
        elif way == 1 and at < len(data):
            data[at : at + 4] = chance.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"]
            )
        elif way == 2:
            del data[at:]
        elif way == 3:
            data[at:at] = data[: chance.randrange(64)]
        elif way == 4:
            data[at:at] = chance.randbytes(chance.randrange(64))
        else:
            del data[at : at + chance.randrange(32)]
    return bytes(data)


def request_of(body: bytes, chance: random.Random) -> dict:
    """In one of the ways of an upload; of forms and JSON the outside is damaged, too."""
    way = chance.randrange(4)
    if way == 0:
        boundary = "x1"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
        whole = head + body + f"\r\n--{boundary}--\r\n".encode()
        whole = mutated(whole, chance) if chance.random() < 0.5 else whole
        return {"content": whole, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}
    if way == 1:
        text = json.dumps({"file": base64.b64encode(body).decode(), "top": "2", "adapter": "ada"}).encode()
        text = mutated(text, chance) if chance.random() < 0.5 else text
        return {"content": text, "headers": {"content-type": "application/json"}}
    return {"content": body, "headers": chance.choice(HEADERS)}


def attack(client: TestClient, path: str, bodies: list[bytes], count: int, where: Path) -> dict[int, int]:
    """Answers by their status."""
    chance, found, memory = random.Random(0), {}, 0
    for n in range(count):
        if n == count // 4:  # pools, caches and libraries are there
            memory = resident_memory()
        body = chance.choice(bodies)
        body = mutated(body, chance) if chance.random() < 0.9 else body
        since = time.monotonic()
        response = client.post(path, **request_of(body, chance))
        assert time.monotonic() - since < 20
        found[response.status_code] = found.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404, 413, 415, 422), (response.text, body)
        if response.status_code != 200:
            message = response.json()["error"]["message"]
            assert len(message.splitlines()) == 1 and str(where) not in message and "/" not in message[:1]
    assert count < 1000 or resident_memory() - memory < GROWTH, (memory, resident_memory())
    print(f"{count} uploads: {dict(sorted(found.items()))}, {memory} -> {resident_memory()} bytes")
    return found


def resident_memory() -> int:
    """Bytes of this process."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    save_digits(folder / "digits" / "ada", 0)
    save_speech(folder / "voices" / "ada", 0)
    return folder


@pytest.mark.parametrize("count", [60, pytest.param(7000, marks=pytest.mark.slow)])
def test_pictures(shelf: Path, count: int) -> None:
    engine = engine_for({"adapters": str(shelf / "digits"), "max_wait_ms": 0.0}, Limits(pixels=10**6))
    bodies = [picture(i, form=form) for i, form in enumerate(FORMS)]
    client = client_of(engine, most_bytes=100_000, timeout=20.0)
    whole = client.post("/v1/classify", content=bodies[0]).json()
    found = attack(client, "/v1/classify?adapter=ada", bodies, count, shelf)
    assert found[200] > count / 20 and sum(found.values()) == count and len(found) > 2
    assert client.post("/v1/classify", content=bodies[0]).json() == whole
    engine.close()


@pytest.mark.parametrize("count", [25, pytest.param(3000, marks=pytest.mark.slow)])
def test_sounds(shelf: Path, count: int) -> None:
    engine = engine_for({"adapters": str(shelf / "voices"), "max_wait_ms": 0.0}, Limits(seconds=10))
    bodies = [sound(utterances(0.5), form) for form in SOUNDS]
    client = client_of(engine, most_bytes=200_000, timeout=20.0)
    whole = client.post("/v1/transcribe", content=bodies[0]).json()
    found = attack(client, "/v1/transcribe?adapter=ada", bodies, count, shelf)
    assert found[200] > count / 20 and sum(found.values()) == count and len(found) > 2
    assert client.post("/v1/transcribe", content=bodies[0]).json() == whole
    engine.close()


def wav(rate: int = 16_000, channels: int = 1, bits: int = 16, form: int = 1, said: int | None = None,
        data: bytes = bytes(3200)) -> bytes:  # fmt: skip
    """A WAV whose head says what it likes; `said` is the length of the data by it."""
    said = len(data) if said is None else said
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", form, channels, rate, rate * block % 2**32, block % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", said) + data
    return b"RIFF" + struct.pack("<I", min(len(body), 2**32 - 1)) + body


LYING = {
    "longer": (wav(said=2**31 - 2), (200, 413, 415, 422)),
    "longest": (wav(said=2**32 - 1), (200, 413, 415, 422)),
    "shorter": (wav(said=2), (200, 413, 422)),
    "no samples": (wav(data=b""), (413, 415, 422)),
    "silent for a day": (wav(rate=1, data=bytes(2 * 86_400)), (413, 415, 422)),
    "1 Hz": (wav(rate=1), (413, 415, 422)),
    "0 Hz": (wav(rate=0), (413, 415, 422)),
    "10 MHz": (wav(rate=10_000_000), (413, 415, 422)),
    "a prime rate": (wav(rate=15_991), (413, 415, 422)),
    "32 channels": (wav(channels=32), (200, 413, 415, 422)),
    "no channels": (wav(channels=0), (413, 415, 422)),
    "65535 channels": (wav(channels=65_535), (413, 415, 422)),
    "3 bits": (wav(bits=3), (200, 413, 415, 422)),
    "NaN": (wav(form=3, bits=32, data=struct.pack("<f", float("nan")) * 8000), (422,)),
    "infinite": (wav(form=3, bits=32, data=struct.pack("<f", float("inf")) * 8000), (422,)),
    "huge": (wav(form=3, bits=32, data=struct.pack("<f", 3e38) * 8000), (422,)),
    "an unknown form": (wav(form=0x7777), (415, 422)),
}


def test_sounds_that_lie(shelf: Path) -> None:
    """Heads that say other lengths, channels and rates than there are, and numbers that are none."""
    engine = engine_for({"adapters": str(shelf / "voices"), "max_wait_ms": 0.0}, Limits(seconds=10))
    client = client_of(engine, most_bytes=200_000, timeout=20.0)
    whole = client.post("/v1/transcribe", content=sound(utterances(0.5))).json()
    memory, bodies = resident_memory(), dict(LYING)
    for form in ("FLAC", "OGG", "MP3"):
        file = sound(utterances(0.5), form)
        for share in (0.02, 0.3, 0.9):
            bodies[f"{form} {share}"] = (file[: round(share * len(file))], (200, 413, 415, 422))
    for what, (body, allowed) in bodies.items():
        since = time.monotonic()
        response = client.post("/v1/transcribe?adapter=ada", content=body)
        assert response.status_code in allowed, (what, response.text)
        assert time.monotonic() - since < 10, what
        assert "NaN" not in response.text and "Infinity" not in response.text, what
    assert resident_memory() - memory < GROWTH
    assert client.post("/v1/transcribe", content=sound(utterances(0.5))).json() == whole
    engine.close()
