"""The routes: every way of an upload, what is refused and how, OpenAI's shape, events, what is counted."""

import asyncio
import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from desk import client_of
from jsonschema import validate
from served import engine_for, picture, save_digits, save_speech, sound, utterances
from starlette.requests import Request

from lora_lightning.app.serve import serve
from lora_lightning.errors import UserError
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.described import ANSWERS, ERRORS, KINDS
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.inputs import Limits
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.openai import OPENAI
from lora_lightning.serving.routes import Manners, Routes
from lora_lightning.serving.uploads import RefusedError, read_upload

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(["ada", "bob"]):
        save_digits(folder / "digits" / name, seed)
    save_speech(folder / "voices" / "ada", 0)
    return folder


@pytest.fixture(scope="module")
def digits(shelf: Path):
    engine = engine_for({"adapters": str(shelf / "digits")}, Limits())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def voices(shelf: Path):
    engine = engine_for({"adapters": str(shelf / "voices")}, Limits(seconds=30))
    yield engine
    engine.close()


def message(response) -> str:
    """Of an error: one line."""
    assert response.headers["content-type"] == "application/json"
    text = response.json()["error"]["message"]
    assert len(text.splitlines()) == 1
    return text


def test_three_ways_of_an_upload_give_one_answer(digits) -> None:
    client, body = client_of(digits), picture(3)
    ways = [
        {"content": body, "headers": {"content-type": "image/png"}},
        {"content": body},
        {"content": body, "headers": {"content-type": "application/x-www-form-urlencoded"}},  # of curl
        {"files": {"file": ("a.png", body, "text/plain")}},
        {"json": {"file": base64.b64encode(body).decode()}},
    ]
    answers = [client.post("/v1/classify?adapter=ada&top=3", **way) for way in ways]
    assert [a.status_code for a in answers] == [200] * 5
    assert all(a.json() == answers[0].json() for a in answers)
    assert answers[0].json()["adapter"] == "ada" and len(answers[0].json()["predictions"]) == 3
    form = client.post("/v1/classify", files={"file": ("a", body)}, data={"adapter": "bob", "top": "2"})
    assert form.json()["adapter"] == "bob" and len(form.json()["predictions"]) == 2
    assert client.post("/v1/classify", content=body).json()["adapter"] is None  # of two none is meant
    assert client.post("/v1/classify?adapter=base", content=body).json()["adapter"] is None


@pytest.mark.parametrize(
    ("path", "way", "status", "told"),
    [
        ("/v1/classify?adapter=ida", {"content": b"x"}, 404, "Did you mean 'ada'"),
        ("/v1/classify?adapter=..%2Fada", {"content": b"x"}, 404, "is no name"),
        ("/v1/classify", {"content": b""}, 400, "the file is empty"),
        ("/v1/classify", {"content": b"x"}, 415, "no picture"),
        ("/v1/classify?top=0", {"content": b"x"}, 400, "top: give a whole number from 1"),
        ("/v1/classify?top=nan", {"content": b"x"}, 400, "top: give"),
        ("/v1/classify?stream=true", {"content": b"x"}, 400, "'stream': classify has no such option"),
        ("/v1/classify?topp=3", {"content": b"x"}, 400, "adapter, top, threshold. Did you mean 'top'?"),
        ("/v1/classify", {"json": {"file": "eA==", "score": 1}}, 400, "'score': classify has no such"),
        ("/v1/classify", {"content": bytes(300_000)}, 413, "more than 200,000 bytes"),
        ("/v1/classify", {"content": b"{", "headers": JSON}, 400, "no JSON"),
        ("/v1/classify", {"content": b"[" * 99_999, "headers": JSON}, 400, "no JSON"),
        ("/v1/classify", {"json": ["a"]}, 400, "has no file"),
        ("/v1/classify", {"json": {"file": "eA==", "x": [{}] * 1001}}, 400, "too many values"),
        ("/v1/classify", {"json": {"file": "~"}}, 400, "no base64"),
        ("/v1/classify", {"json": {"file": "eA==", "adapter": 3}}, 400, "adapter: give a name"),
        ("/v1/classify", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "form"),
        ("/v1/classify", {"files": {"a": ("a", b"x"), "b": ("b", b"y")}}, 400, "one file"),
        ("/v1/detect", {"content": b"x"}, 404, "use /v1/classify"),
        ("/v1/nothing", {"content": b"x"}, 404, "Not Found: GET /docs"),
        ("/v1/classify/", {"content": b"x"}, 404, "Not Found: GET /docs"),
    ],
)  # fmt: skip
def test_what_is_refused(digits, path: str, way: dict, status: int, told: str, shelf: Path) -> None:
    response = client_of(digits, most_bytes=200_000).post(path, **way)
    assert response.status_code == status, response.text
    assert told in message(response) and str(shelf) not in response.text


def test_there_are_so_many_places(digits) -> None:
    client = client_of(digits, most=0)
    response = client.post("/v1/classify", content=picture(0))
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert "too many requests" in message(response)


def test_an_answer_that_takes_too_long(digits) -> None:
    response = client_of(digits, timeout=-1.0).post("/v1/classify", content=picture(0))
    assert response.status_code == 504 and "too long" in message(response)


def test_what_a_server_tells_of_itself(digits) -> None:
    client = client_of(digits)
    assert client.get("/health").text == "ok\n" and client.get("/ready").status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        head = client.head(path)
        assert head.status_code == 200 and head.text == ""
    models = client.get("/v1/models").json()
    assert [m["id"] for m in models["data"]] == ["base", "ada", "bob"]
    assert {m["kind"] for m in models["data"]} == {"classify"}
    client.post("/v1/classify?adapter=ada", content=picture(0))
    client.post("/v1/classify?adapter=ida", content=picture(0))
    text = client.get("/metrics").text
    assert 'lora_requests_total{route="/v1/classify",status="200"} 1\n' in text
    assert 'lora_requests_total{route="/v1/classify",status="404"} 1\n' in text
    assert 'lora_request_seconds_bucket{le="+Inf"} 2\n' in text and "lora_batch_size_count 1\n" in text
    assert "lora_requests_inside 0\n" in text


def test_every_route_is_described(digits) -> None:
    client = client_of(digits)
    document = client.get("/openapi.json").json()
    assert "$ref" not in json.dumps(document) and "components" in document
    assert document["security"] == [{"token": []}, {}]
    paths = document["paths"]
    kinds = [f"/v1/{kind}" for kind in KINDS]
    assert [*paths] == [*kinds, OPENAI, "/v1/models", "/health", "/ready", "/metrics"]
    for kind, path in zip(KINDS, kinds):
        asked = paths[path]["post"]
        names = {one["name"]: one["schema"] for one in asked["parameters"]}
        assert [*names] == ["adapter", *KINDS[kind]]
        for body in asked["requestBody"]["content"].values():
            assert body["schema"]["description"]
        assert set(asked["responses"]) == {"200", *map(str, ERRORS)}
    assert [*paths["/metrics"]["get"]["responses"]["200"]["content"]] == ["text/plain"]
    form = paths[OPENAI]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert [*form] == ["file", "model", "response_format", "stream"]
    answers = paths["/v1/classify"]["post"]["responses"]
    body = client.post("/v1/classify?adapter=ada", content=picture(1)).json()
    validate(body, answers["200"]["content"]["application/json"]["schema"])
    assert body["predictions"]
    refused = client.post("/v1/classify", content=b"x")
    validate(refused.json(), answers[str(refused.status_code)]["content"]["application/json"]["schema"])
    shape = paths["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    validate(client.get("/v1/models").json(), shape)


def test_speech_in_openais_shape(voices) -> None:
    client, body = client_of(voices), sound(utterances(4.0, pause=1.0))
    whole = client.post("/v1/transcribe", content=body).json()
    assert whole["adapter"] == "ada" and whole["text"]
    validate(whole, ANSWERS["transcribe"])

    def ask(**fields: str):
        path = "/v1/audio/transcriptions"
        return client.post(path, files={"file": ("a.wav", body)}, data={"model": "ada", **fields})

    assert ask().json() == {"text": whole["text"]}
    assert ask(response_format="text").text == whole["text"] + "\n"
    assert ask(response_format="srt").text.startswith("1\n00:00:")
    assert ask(response_format="vtt").text.startswith("WEBVTT\n\n00:00:")
    verbose = ask(response_format="verbose_json").json()
    assert verbose["duration"] == whole["seconds"] and [s["text"] for s in verbose["segments"]] == [
        s["text"] for s in whole["segments"]
    ]
    assert [w["word"] for w in verbose["words"]] == whole["text"].split()
    refused = ask(response_format="yaml")
    assert refused.status_code == 400 and "response_format: give one of json" in message(refused)
    refused = ask(model="whisper-1")
    assert refused.status_code == 404 and "whisper-1: there is none" in message(refused)


def test_segments_are_told_as_they_are_heard(voices) -> None:
    client, body = client_of(voices), sound(utterances(6.0, pause=1.5))
    whole = client.post("/v1/transcribe", content=body).json()
    assert len(whole["segments"]) > 1
    response = client.post("/v1/transcribe?stream=true", content=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.splitlines() for block in response.text.strip().split("\n\n")]
    parts = [json.loads(data[6:])["segment"] for name, data in events if name == "event: part"]
    assert [p["text"] for p in parts] == [s["text"] for s in whole["segments"]]
    assert events[-1][0] == "event: answer" and json.loads(events[-1][1][6:])["text"] == whole["text"]
    form = {"model": "ada", "stream": "true"}
    lines = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", body)}, data=form).text.split(
        "\n\n"
    )
    deltas = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(d["delta"] for d in deltas[:-1]) == whole["text"]
    assert deltas[-1] == {"type": "transcript.text.done", "text": whole["text"]}
    refused = client.post("/v1/transcribe?stream=1", content=body)
    assert refused.status_code == 400 and "stream: give true or false" in message(refused)
    refused = client.post("/v1/transcribe?stream=true", content=b"x")
    assert refused.status_code == 415 and "no sound" in message(refused)


def test_a_slow_upload_is_given_up() -> None:
    async def slowly():
        await asyncio.sleep(5)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(RefusedError, match="too slow") as told:
        asyncio.run(read_upload(Request(scope, slowly), 100, 0.05))
    assert told.value.status == 408


def test_who_leaves_frees_the_place() -> None:
    gate, ended = Gate(1, 1), []

    async def never(upload):
        try:
            async with gate.turn("ada"):
                await asyncio.sleep(60)
        finally:
            ended.append(True)

    messages = iter([{"type": "http.request", "body": b"x", "more_body": False}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def ask():
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        desk = SimpleNamespace(gate=gate, metrics=Metrics())
        routes = Routes(desk, Catalog(), Manners())
        return await routes._counted("/v1/classify", Request(scope, receive), never), desk

    response, desk = asyncio.run(ask())
    assert response.status_code == 499 and ended == [True] and (gate.free, gate.inside) == (1, 0)
    assert desk.metrics.requests == {("/v1/classify", 499): 1}


def test_an_empty_token_is_no_open_server(tmp_path: Path, monkeypatch) -> None:
    for token in ("", " "):
        monkeypatch.setenv("LORA_LIGHTNING_TOKEN", token)
        with pytest.raises(UserError, match="LORA_LIGHTNING_TOKEN: is set and empty"):
            serve({"adapters": str(tmp_path)}, [])


@pytest.mark.parametrize("token", ["secret\n", " secret", "geheimnis-ä"])
def test_a_token_that_nobody_can_send_is_refused(token: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_LIGHTNING_TOKEN", token)
    with pytest.raises(UserError, match="no header brings") as told:
        serve({"adapters": str(tmp_path)}, [])
    assert token.strip() not in str(told.value)


def test_options_that_name_what_is_not_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LORA_LIGHTNING_TOKEN", raising=False)
    monkeypatch.setattr("litserve.connector.check_cuda_with_nvidia_smi", lambda: 0)
    with pytest.raises(UserError, match="device=cuda: this machine shows no such device"):
        serve({"adapters": str(tmp_path), "device": "cuda"}, [])
    with pytest.raises(UserError, match="pinned: adapter=ida: there is none"):
        serve({"adapters": str(tmp_path), "pinned": ["ida"]}, [])
