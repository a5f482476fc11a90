"""Streams of events over sockets: their places, and the status of an error that comes within one."""

import time
from functools import partial
from types import SimpleNamespace

import httpx
from desk import client_of, listening

from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.openai import OPENAI


class Told:
    """An engine that tells what it is given when it is let, without a model."""

    store = SimpleNamespace(catalog=Catalog())

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.tell = None

    def submit(self, ask: Ask, tell) -> None:
        self.asked.append(ask.body)
        self.tell = tell
        tell(Event("part", {"segment": {"text": "one"}}))


def test_a_stream_keeps_its_place_until_its_end_and_tells_the_status_of_an_error() -> None:
    engine, post = Told(), partial(httpx.post, content=b"a sound", timeout=20)
    with listening(engine, most=1) as address:
        url = f"{address}/v1/transcribe?stream=true"
        for end in (Event("answer", {"text": "one"}), Event("error", {"message": "gone."}, 503), None):
            with httpx.stream("POST", url, content=b"a sound", timeout=20) as response:
                lines = response.iter_lines()
                assert next(lines) == "event: part"
                assert post(url).status_code == 429  # the stream has its place
                if end:
                    engine.tell(end)
                    said = [line for line in lines if line.startswith("data")][-1]
                    assert ('"status": 503' in said) == (end.what == "error")
            eventually_free(address)
    assert len(engine.asked) == 3


def eventually_free(address: str) -> None:
    for _ in range(200):
        if "lora_requests_inside 0\n" in httpx.get(f"{address}/metrics").text:
            return
        time.sleep(0.05)
    raise AssertionError("a place did not come back")


def test_a_format_that_is_none_is_refused_before_anything_is_heard() -> None:
    engine = Told()
    form = {"files": {"file": ("a.wav", b"a sound")}, "data": {"response_format": "yaml"}}
    response = client_of(engine).post(OPENAI, **form)
    assert response.status_code == 400 and "give one of json" in response.text and engine.asked == []
