"""The client: whatever a picture or a sound is given as, one answer; and every refusal is one error."""

import base64
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from desk import listening
from PIL import Image
from served import engine_for, picture, save_digits, save_speech, sound, utterances

import lora_lightning as ll
from lora_lightning.serving.inputs import Limits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(["ada", "bob"]):
        save_digits(folder / name, seed)
    engine = engine_for({"adapters": str(folder)}, Limits())
    yield engine
    engine.close()


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list]]:
    """The address of a server that answers so, and the headers that it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(dict(self.headers))
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def saying(status: int, body: str, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def test_a_picture_given_in_every_way_has_one_answer(digits, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(io.BytesIO(picture(1))).save(file, exif=turned)
    with listening(digits, token="s3cret") as address:
        client = ll.Client(address + "/", token="s3cret")
        assert [(m["id"], m["kind"]) for m in client.models()] == [
            (name, "classify") for name in ("base", "ada", "bob")
        ]
        given = [file, str(file), file.read_bytes(), Image.open(file)]
        answers = [client.classify(one, "ada", top=3) for one in given]
        assert all(answer == answers[0] for answer in answers) and len(answers[0]["predictions"]) == 3
        assert answers[0]["adapter"] == "ada" and client.classify(file, "base")["adapter"] is None
        with pytest.raises(ll.ServerError, match=r"ida: there is none of this name.*Did you mean") as told:
            client.classify(file, "ida")
        assert (told.value.status, told.value.retry_after) == (404, None)
        with pytest.raises(ll.ServerError, match="does not detect: use /v1/classify"):
            client.detect(file, score=0.3)
        with pytest.raises(ll.ServerError, match="give the token") as told:
            ll.Client(address).classify(file)
        assert told.value.status == 401
    with listening(digits, most=0) as address, pytest.raises(ll.ServerError, match="too many") as told:
        ll.Client(address).classify(file)
    assert (told.value.status, told.value.retry_after) == (429, 1.0)
    with pytest.raises(ll.ServerError, match=r"does not answer .*: is the server running") as told:
        ll.Client(address).classify(file)
    assert told.value.status == 0


def test_a_sound_given_in_every_way_has_one_answer(tmp_path: Path) -> None:
    save_speech(tmp_path / "ada", 0)
    wave = utterances(5.0, pause=1.0)
    file = tmp_path / "a.wav"
    file.write_bytes(sound((32767 * wave).round().clip(-32768, 32767) / 32768))
    engine = engine_for({"adapter": str(tmp_path / "ada")}, Limits())
    with listening(engine) as address:
        client = ll.Client(address)
        whole = client.transcribe(file)
        assert whole["text"] and len(whole["segments"]) > 1
        assert [*client.transcribe(file, stream=True)] == whole["segments"]
        heard = client.transcribe(torch.as_tensor(wave))
        assert heard["text"] == client.transcribe(wave, "ada")["text"] == whole["text"]
        half = client.transcribe(wave[::2].copy(), rate=8_000)
        assert half["seconds"] == pytest.approx(whole["seconds"], abs=1e-3)
        with pytest.raises(ll.ServerError, match="no sound") as told:
            client.transcribe(b"no sound", stream=True)
        assert told.value.status == 415
    engine.close()


def test_masks_are_the_bytes_of_a_picture() -> None:
    png = picture(0)
    body = '{"adapter": null, "width": 20, "height": 17, "classes": [], "mask": "%s"}'
    with answering(saying(200, body % base64.b64encode(png).decode())) as (address, _):
        assert ll.Client(address).segment(b"a picture")["mask"] == png


def test_what_a_server_may_do_wrong() -> None:
    part = 'event: part\ndata: {"segment": {"text": "one"}}\n\n'
    error = 'event: error\ndata: {"message": "a worker has ended: try again.", "status": 503}\n\n'
    with answering(saying(200, part)) as (address, _):
        heard = ll.Client(address).transcribe(b"a sound", stream=True)
        assert next(heard)["text"] == "one"
        with pytest.raises(ll.ServerError, match="broken off"):
            next(heard)
    with (
        answering(saying(200, part + error)) as (address, _),
        pytest.raises(ll.ServerError, match="a worker has ended") as told,
    ):
        list(ll.Client(address).transcribe(b"a sound", stream=True))
    assert told.value.status == 503
    with answering(saying(200, "<html>")) as (address, _), pytest.raises(ll.ServerError, match="is this its"):
        ll.Client(address).detect(b"a picture")
    with answering(saying(502, "<html>")) as (address, _), pytest.raises(ll.ServerError, match="502 Bad"):
        ll.Client(address).detect(b"a picture")
    with (
        answering(saying(200, "{}")) as (elsewhere, stolen),
        answering(saying(302, "", Location=elsewhere)) as (address, _),
        pytest.raises(ll.ServerError, match="302"),
    ):
        ll.Client(address, token="s3cret").detect(b"a picture")
    assert stolen == []


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: ll.Client("file:///etc/hostname"), "give the server's, as http"),
        (lambda: ll.Client("http://[::1"), "give the server's, as http"),
        (lambda: ll.Client(token="a\nb"), "token: is empty, or"),
        (lambda: ll.Client(token="a "), "token: is empty, or"),
        (lambda: ll.Client(token=3), "token: is empty, or"),
        (lambda: ll.Client(token=" "), "token: is empty, or"),
        (lambda: ll.Client().classify("none.png"), "picture=none.png: cannot be read"),
        (lambda: ll.Client().classify(np.zeros((3, 3))), "picture: is of the type ndarray: give a path"),
        (lambda: ll.Client().transcribe(np.zeros(3, np.int16)), "int16.*give floats"),
        (lambda: ll.Client().transcribe(np.zeros((3, 2))), r"\(3, 2\): give floats"),
        (lambda: ll.Client().transcribe(np.zeros(3), rate=16000.0), "rate=16000.0: give the samples"),
        (lambda: ll.Client().transcribe(np.zeros(3), rate=-1), "rate=-1: give the samples"),
        (lambda: ll.Client().classify(Image.new("RGB", (0, 9))), r"picture: cannot be read \(cannot write"),
        (lambda: ll.Client().classify("a\0b"), "embedded null byte"),
        (lambda: ll.Client().transcribe(3), "sound: is of the type int"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(ask: Callable, told: str) -> None:
    with pytest.raises(ll.UserError, match=told) as error:
        ask()
    assert type(error.value) is ll.UserError


def test_it_needs_neither_torch_nor_the_server() -> None:
    script = "import sys, lora_lightning as ll; ll.Client(); print(*{n.split('.')[0] for n in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "urllib" in loaded and not loaded & {"torch", "numpy", "PIL", "litserve", "fastapi", "lightning"}
