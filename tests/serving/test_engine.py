"""The engine: answers of shared batches are those of `predict`; nobody keeps others waiting."""

import json
import queue
import random
import statistics
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from served import FACTS, NAMES, digits_base, engine_for, picture, save_digits

from lora_lightning.app.cli import main
from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.inputs import BadUpload, Limits
from lora_lightning.serving.turns import Turns


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(["ada", "bob", "cyd"]):
        save_digits(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def engine(shelf: Path):
    made = engine_for({"adapters": str(shelf), "max_wait_ms": 50.0}, Limits(pixels=100_000))
    yield made
    made.close()


def ask_all(engine: Engine, asks: list[Ask]) -> list[Event]:
    """The last event of each."""
    told: list[queue.Queue[Event]] = [queue.Queue() for _ in asks]
    for ask, one in zip(asks, told, strict=True):
        engine.submit(ask, one.put)
    last = []
    for one in told:
        while (event := one.get(timeout=60)).what == "part":
            pass
        last.append(event)
    return last


def test_answers_are_those_of_predict(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    bodies = {f"{i}.png": picture(i) for i in range(4)}
    for name, body in bodies.items():
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(body)
    names = ["ada", "bob", "ada", "cyd"]
    events = ask_all(engine, [Ask(n, "classify", b, {"top": 3}) for n, b in zip(names, bodies.values())])
    assert [e.status for e in events] == [200] * 4 and max(e.batch for e in events) > 1
    for name in sorted({*names}):
        out = tmp_path / f"{name}.json"
        main(["predict", f"images={tmp_path / 'pictures'}", f"adapter={shelf / name}", f"out={out}", "top=3"])
        rows = json.loads(out.read_text())
        for who, event, row in zip(names, events, rows, strict=True):
            if who != name:
                continue
            found = event.content["predictions"]
            assert event.content["adapter"] == name
            assert [p["label"] for p in found] == [row["label"], row["label_2"], row["label_3"]]
            wanted = [row["probability"], row["probability_2"], row["probability_3"]]
            assert [p["probability"] for p in found] == pytest.approx(wanted, abs=1e-5)
    base = ask_all(engine, [Ask(None, "classify", bodies["0.png"])])[0]
    assert base.content["adapter"] is None and base.content["predictions"][0]["label"] in NAMES


def test_large_pictures_do_not_keep_the_small_ones_waiting(engine: Engine, monkeypatch) -> None:
    held, prepare = threading.Event(), engine.kind.prepare

    def slow(body, facts, options):
        if len(body) > 1000:
            assert held.wait(20)
        return prepare(body, facts, options)

    monkeypatch.setattr(engine.kind, "prepare", slow)
    large = picture(0, (5000, 10), "BMP")
    monkeypatch.setattr("lora_lightning.serving.inputs.LARGE", 20_000)
    told: queue.Queue[Event] = queue.Queue()
    for _ in range(4):
        engine.submit(Ask("ada", "classify", large), told.put)
    assert [e.status for e in ask_all(engine, [Ask("ada", "classify", picture(1, (8, 8)))] * 3)] == [200] * 3
    assert told.empty()
    held.set()
    assert [told.get(timeout=20).status for _ in range(4)] == [200] * 4


def bomb() -> bytes:
    """A PNG whose head says 50000 x 50000 pixels, which Pillow itself refuses."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    chunks = ((13, head), (0, b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk)) for length, chunk in chunks
    )


@pytest.mark.parametrize(
    ("ask", "status", "told"),
    [
        (Ask("ida", "classify", b""), 404, "Did you mean 'ada'"),
        (Ask("../ada", "classify", b""), 404, "is no name"),
        (Ask("ada", "transcribe", b""), 404, "this server does not transcribe: use /v1/classify"),
        (Ask("ada", "classify", b""), 415, "no picture"),
        (Ask("ada", "classify", b"%!PS-Adobe-3.0 EPSF-3.0\n"), 415, "no picture"),
        (Ask("ada", "classify", picture(0)[:90]), 422, "damaged"),
        (Ask("ada", "classify", picture(0, (400, 300))), 413, "400 x 300 pixels; 100,000 are allowed"),
        (Ask("ada", "classify", bomb()), 413, "too large; 100,000 pixels are allowed"),
        (Ask("ada", "classify", picture(0), until=0.0), 504, "too long"),
    ],
)
def test_what_cannot_be_answered(engine: Engine, ask: Ask, status: int, told: str) -> None:
    event = ask_all(engine, [ask])[0]
    assert (event.what, event.status) == ("error", status) and told in event.content["message"]
    assert len(event.content["message"].splitlines()) == 1


def test_an_adapter_and_a_base_without_classes(engine: Engine) -> None:
    with pytest.raises(BadUpload, match="says its classes' names") as told:
        engine.kind.prepare(picture(0), {}, {})
    assert told.value.status == 409


def test_a_batch_in_which_samples_cannot_be_told_is_run_by_adapter(engine: Engine, monkeypatch) -> None:
    bodies, names = [picture(i) for i in range(3)], ["ada", "bob", None]
    before = [e.content for e in ask_all(engine, [Ask(n, "classify", b) for n, b in zip(names, bodies)])]
    monkeypatch.setattr(
        "lora_lightning.adapters.mixed_samples.MixedSamples.dim_of",
        lambda *_: (_ for _ in ()).throw(refusal()),
    )
    events = ask_all(engine, [Ask(n, "classify", b) for n, b in zip(names, bodies)])
    for event, wanted in zip(events, before, strict=True):
        assert event.status == 200 and event.content["adapter"] == wanted["adapter"]
        for one, other in zip(event.content["predictions"], wanted["predictions"], strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def refusal() -> Exception:
    from lora_lightning.errors import UserError

    return UserError("mixed_adapters: the samples cannot be told")


def test_turns_are_fair_between_names_and_shapes() -> None:
    turns: Turns[str] = Turns(4, 0.0)
    for i in range(20):
        turns.put("many", "a", f"many{i}")
    turns.put("few", "b", "few0")
    turns.put("other", "a", "other0")
    assert turns.take() == ["many0", "other0", "many1", "many2"]
    assert turns.take() == ["few0"]
    assert turns.take() == ["many3", "many4", "many5", "many6"]
    turns.close()
    assert [len(turns.take()) for _ in range(5)] == [4, 4, 4, 1, 0]


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
def test_two_of_one_name_do_not_wait_for_the_turns_of_all_others(popularity: str) -> None:
    """32 clients who ask again when they have their answer: four batches of 8 pass until then."""
    generator, turns, waits = random.Random(0), Turns(8, 0.0), []
    weights = [1.0 if popularity == "uniform" else 1 / (i + 1) for i in range(100)]

    def ask(batch: int) -> None:
        turns.put(f"a{generator.choices(range(100), weights)[0]}", "shape", batch)

    for _ in range(32):
        ask(0)
    for batch in range(1, 500):
        for asked in turns.take():
            waits.append(batch - asked)
            ask(batch)
    assert statistics.median(waits) == 4 and statistics.quantiles(waits, n=100)[98] <= 6


def test_who_comes_into_a_flood_of_one_name_is_in_the_next_batch() -> None:
    turns: Turns[str] = Turns(8, 0.0)
    for i in range(40):
        turns.put("many", "a", f"many{i}")
    turns.take()
    for i in range(5):
        turns.put(f"few{i}", "a", f"few{i}")
    assert {f"few{i}" for i in range(5)} < {*turns.take()}


def test_one_waits_for_others_of_its_shape_no_longer_than_is_allowed() -> None:
    turns: Turns[int] = Turns(2, 0.1)
    start = time.monotonic()
    turns.put("a", "x", 1)
    assert turns.take() == [1] and 0.08 < time.monotonic() - start < 1
    turns.put("a", "x", 2)
    turns.put("b", "x", 3)
    start = time.monotonic()
    assert sorted(turns.take()) == [2, 3] and time.monotonic() - start < 0.08


def test_what_was_taken_is_answered_when_the_engine_closes(shelf: Path) -> None:
    engine = engine_for({"adapters": str(shelf), "max_wait_ms": 5000.0}, Limits())
    told: list[Event] = []
    for i in range(5):
        engine.submit(Ask("ada", "classify", picture(i)), told.append)
    engine.close()
    assert [e.what for e in told] == ["answer"] * 5


def test_one_whose_batch_ends_while_others_are_still_decoded_is_answered_when_the_engine_closes(
    shelf: Path,
) -> None:
    engine = engine_for({"adapters": str(shelf), "max_wait_ms": 1.0}, Limits())
    prepare, told = engine.kind.prepare, []

    def slow(body, *given):
        time.sleep(0.7 * (body == picture(1)))
        return prepare(body, *given)

    engine.kind.prepare = slow
    for i in range(2):
        engine.submit(Ask("ada", "classify", picture(i)), told.append)
    engine.close()
    assert [e.what for e in told] == ["answer"] * 2


def test_a_temperature_is_that_of_its_adapter_alone(tmp_path: Path) -> None:
    """The first adapter says how the base is built; it was fitted with neither the base nor the others."""
    save_digits(tmp_path / "ada", 0)
    model = save_digits(tmp_path / "bob", 1, {n: f for n, f in FACTS.items() if n != "temperature"})
    engine = engine_for({"adapters": str(tmp_path)}, Limits())
    asks = [Ask(name, "classify", picture(1), {"top": 1}) for name in (None, "bob")]
    found = [event.content["predictions"][0]["probability"] for event in ask_all(engine, asks)]
    engine.close()
    x = engine.kind.prepare(picture(1), engine.facts, {}).units[0][1][None]
    wanted = [float(m(x).detach().softmax(-1).max()) for m in (digits_base(), model)]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_the_base_alone(shelf: Path) -> None:
    engine = engine_for({"base": str(shelf / "ada")}, Limits())
    event = ask_all(engine, [Ask(None, "classify", picture(1), {"top": 10})])[0]
    engine.close()
    logits = digits_base()(engine.kind.prepare(picture(1), engine.facts, {}).units[0][1][None])
    wanted = logits.softmax(-1)[0].sort(descending=True).values
    assert [p["probability"] for p in event.content["predictions"]] == pytest.approx(
        wanted.tolist(), abs=1e-6
    )
    assert torch.isfinite(wanted).all()
