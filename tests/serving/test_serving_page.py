"""The server's pages in a browser: files given in every way, answers side by side, errors, every look."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import CONTRAST, SEEN, chromium, opened
from desk import app_of, listening
from PIL import Image
from served import engine_for, save_digits, save_speech, sound, utterances
from starlette.testclient import TestClient
from test_pictures_found import save_grounds, save_shapes

from lora_lightning.report.labels import placed
from lora_lightning.serving.asking import ABOUT, Ask, Event
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.inputs import Limits
from lora_lightning.serving.page import PAGES, PARTS
from lora_lightning.serving.server import Token

WICKED = '<img src="x" onerror="document.title = 1">'
SAVE = {"classify": save_digits, "detect": save_shapes, "segment": save_grounds, "transcribe": save_speech}
SAID = re.compile(r"[\d.]+ s")  # of a column that has its answer


class Canned:
    """An engine that answers every picture alike, without a model."""

    store = SimpleNamespace(catalog=Catalog(fixed={"ada": Path("ada"), "bob": Path("bob")}))

    def submit(self, ask: Ask, tell) -> None:
        if ask.kind == ABOUT:
            return tell(Event("answer", {"kind": "classify"}))
        if ask.body == b"no picture":
            return tell(Event("error", {"message": "the file is no picture."}, 415))
        names = [WICKED, "cat", ask.adapter or "base"]
        found = [{"label": name, "probability": 0.5 / 2**i} for i, name in enumerate(names)]
        tell(Event("answer", {"adapter": ask.adapter, "predictions": found[: ask.options["top"]]}, batch=1))


def settled(page) -> list[str]:
    """What each column says, when all have an answer or an error."""
    for _ in range(600):
        said = page.locator("#columns [role=status]").all_inner_texts()
        if said and all(one not in ("", "…") for one in said):
            return said
        page.wait_for_timeout(50)
    raise AssertionError(said)


def complaints(told: list[str]) -> list[str]:
    """Without what Chromium tells of answers that are errors, and of bodies it has read to their end."""
    own = ("Failed to load resource", "failed: blob:", "stream=true")
    return [line for line in told if not any(part in line for part in own)]


def test_the_pages_need_no_token_and_load_nothing() -> None:
    app = app_of(Canned())
    app.add_middleware(Token, token="s3cret")
    client = TestClient(app)
    for address in PAGES:
        response = client.get(address)
        assert response.status_code == 200 and client.head(address).status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert set(re.findall(r"https?://[^\s\"]+", response.text)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", response.text)
    for address in ("/v1/models", "/openapi.json", "/metrics"):
        assert client.get(address).status_code == 401
        assert client.get(address, headers={"authorization": "Bearer s3cret"}).status_code == 200


def test_a_picture_is_answered_side_by_side(tmp_path: Path) -> None:
    for name, body in (("a.png", b"a picture"), ("a <b>.txt", b"no picture")):
        (tmp_path / name).write_bytes(body)
    told: list[str] = []
    with (
        listening(Canned()) as address, chromium() as browser,
        opened(browser, address, "telephone", told) as page,
    ):  # fmt: skip
        page.locator("#file").set_input_files(tmp_path / "a.png")
        for _ in range(2):
            page.locator("#compare").click()
        assert page.locator("#compare").is_disabled() and all(map(SAID.fullmatch, settled(page)))
        columns = [c.locator("li span").all_inner_texts() for c in page.locator(".answer").all()]
        assert [column[2] for column in columns] == ["ada", "bob", "base"]
        assert all(column[0].startswith("<img src=") for column in columns)
        widths = [
            b.evaluate("b => b.getBoundingClientRect().width") for b in page.locator(".answer li b").all()
        ]
        assert widths[0] == pytest.approx(2 * widths[1]) and widths[1] == pytest.approx(2 * widths[2])
        page.locator("#file").set_input_files(tmp_path / "a <b>.txt")
        assert settled(page) == ["the file is no picture."] * 3
        assert page.locator("#name").inner_text() == "a <b>.txt, 1 kB"
        assert page.locator("b", has_text=".txt").count() == 0 and page.title() == "lora_lightning"
        assert page.evaluate(SEEN) == page.evaluate(CONTRAST) == complaints(told) == []
        page.locator(".away").first.click()
        assert page.locator("#columns input").count() == 2
        drawn = crowds()
        script = (PARTS / "labels.js").read_text(encoding="utf-8")
        places = page.evaluate(f"all => {{ {script} return all.map(one => placed(...one)); }}", drawn)
    for found, one in zip(places, drawn, strict=True):  # by the two programs
        wanted = placed(*one)
        assert [p is None for p in found] == [p is None for p in wanted]
        assert [p for p in found if p] == [pytest.approx(p) for p in wanted if p]


def crowds() -> list[list]:
    """Boxes, sizes of their labels, width and height of a picture; several times."""
    draw = random.Random(0)

    def box() -> list[float]:
        x, y = draw.uniform(-5, 200), draw.uniform(-5, 150)
        return [x, y, x + draw.uniform(0, 80), y + draw.uniform(0, 80)]

    sizes = [[[draw.uniform(20, 260), draw.uniform(10, 16)] for _ in range(20)] for _ in range(10)]
    return [[[box() for _ in range(20)], one, 250.0, 200.0] for one in sizes]


def shelves(folder: Path, kind: str) -> Path:
    """Two adapters of a kind in `folder/shelf`, and a file that they are asked of."""
    (folder / "shelf").mkdir()
    for seed, name in enumerate(["ada", "bob"]):
        SAVE[kind](folder / "shelf" / name, seed)
    if kind == "transcribe":
        (folder / "a.wav").write_bytes(sound(utterances(6.0, pause=1.0)))
        return folder / "a.wav"
    from sklearn.datasets import load_digits, load_sample_image

    pixels = 16 * load_digits().images[7] if kind == "classify" else load_sample_image("flower.jpg")[::4, ::4]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "detect", "segment", "transcribe"])
def test_real_answers_read_well_everywhere(kind: str, tmp_path: Path) -> None:
    file = shelves(tmp_path, kind)
    (tmp_path / "wrong.txt").write_text("no file of this kind")
    engine = engine_for({"adapters": str(tmp_path / "shelf")}, Limits())
    with listening(engine) as address, chromium() as browser:
        for look in ("desktop", "telephone", "dark", "telephone-dark"):
            told: list[str] = []
            with opened(browser, address, look, told) as page:
                page.locator("#file").set_input_files(file)
                for _ in range(2):
                    page.locator("#compare").click()
                assert all(map(SAID.fullmatch, settled(page)))
                if kind == "detect":
                    page.locator("[data-option=score]").fill("0.02")
                    page.keyboard.press("Enter")
                    assert all(map(SAID.fullmatch, settled(page)))
                    page.wait_for_timeout(200)  # the boxes are drawn when their place has its size
                    assert apart(page)
                wanted = {"classify": ".classes li", "detect": ".view rect", "segment": ".view canvas",
                          "transcribe": ".word"}[kind]  # fmt: skip
                assert page.locator(".answer").count() == 3
                assert all(one.locator(wanted).count() for one in page.locator(".answer").all())
                assert page.evaluate(SEEN) == page.evaluate(CONTRAST) == complaints(told) == []
                page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
                page.locator("#file").set_input_files(tmp_path / "wrong.txt")
                what = "sound" if kind == "transcribe" else "picture"
                assert all(f"the file is no {what} of a format that is known" in s for s in settled(page))
                assert page.evaluate(SEEN) == page.evaluate(CONTRAST) == complaints(told) == []
    engine.close()


def apart(page) -> bool:
    """Whether no label of a box covers another, and there are some."""
    columns = page.evaluate(
        """() => [...document.querySelectorAll(".view svg")].map(svg =>
          [...svg.querySelectorAll(".name rect")].map(r => { const b = r.getBBox();
            return [b.x, b.y, b.x + b.width, b.y + b.height]; }))"""
    )
    pairs = [(p, q) for rects in columns for i, p in enumerate(rects) for q in rects[:i]]
    wide = [min(p[2], q[2]) - max(p[0], q[0]) for p, q in pairs]
    high = [min(p[3], q[3]) - max(p[1], q[1]) for p, q in pairs]
    return any(columns) and all(min(both) < 0.01 for both in zip(wide, high))


@pytest.mark.slow
def test_the_colours_of_a_mask_are_those_of_its_key(tmp_path: Path) -> None:
    file = shelves(tmp_path, "segment")
    engine = engine_for({"adapters": str(tmp_path / "shelf")}, Limits())
    with listening(engine) as address, chromium() as browser, opened(browser, address) as page:
        page.locator("#file").set_input_files(file)
        settled(page)
        drawn, key = page.evaluate(
            """() => {
              const canvas = document.querySelector(".mask"), { width, height } = canvas, seen = new Set();
              const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
              for (let i = 0; i < data.length; i += 4)
                if (data[i + 3]) seen.add(data.slice(i, i + 3).join(", "));
              return [[...seen], [...document.querySelectorAll(".found i")].map(i => i.style.background)];
            }"""
        )
        assert drawn and {f"rgb({one})" for one in drawn} <= set(key)
    engine.close()


@pytest.mark.slow
def test_words_play_where_they_are_clicked_and_sounds_are_recorded(tmp_path: Path) -> None:
    """The microphone is a file; what the server cannot decode and the browser can is made WAV."""
    file = shelves(tmp_path, "transcribe")
    engine = engine_for({"adapter": str(tmp_path / "shelf" / "ada")}, Limits())
    microphone = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                  f"--use-file-for-fake-audio-capture={file}")  # fmt: skip
    sent, submit = [], engine.submit
    engine.submit = lambda ask, tell: (sent.append(ask.body), submit(ask, tell))
    with listening(engine) as address, chromium(*microphone) as browser, opened(browser, address) as page:
        page.locator("#file").set_input_files(file)
        settled(page)
        word = page.locator(".word").nth(3)
        start = float(word.get_attribute("data-start"))
        word.focus()
        page.keyboard.press("Enter")
        assert page.locator("#player").evaluate("p => p.currentTime") == pytest.approx(start, abs=0.5)
        page.context.grant_permissions(["microphone"])
        page.locator("#record").click()
        page.wait_for_timeout(2500)
        assert re.fullmatch(r"Stop, 0:0[1-9]\.\d", page.locator("#record").inner_text())
        page.locator("#record").click()
        page.locator("#name", has_text="recording.wav").wait_for()
        assert SAID.fullmatch(settled(page)[0]) and page.locator("#record").inner_text() == "Record"
        assert sent[-1][:4] == b"RIFF" and len(sent[-1]) > 2 * 16_000 * 2
        page.evaluate(
            """async () => {
              const recorder = new MediaRecorder(await navigator.mediaDevices.getUserMedia({ audio: true }));
              const part = new Promise(done => { recorder.ondataavailable = event => done(event.data); });
              recorder.start();
              await new Promise(done => setTimeout(done, 1500));
              recorder.stop();
              const dropped = new DataTransfer();
              dropped.items.add(new File([await part], "memo.webm"));
              document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
            }"""
        )
        page.locator("#name", has_text="memo.webm").wait_for()
        assert SAID.fullmatch(settled(page)[0])
        assert sent[-2][:4] == b"\x1aE\xdf\xa3" and sent[-1][:4] == b"RIFF"
    engine.close()


@pytest.mark.slow
def test_with_a_token_and_by_keyboard_alone(tmp_path: Path) -> None:
    file, told = shelves(tmp_path, "classify"), []
    engine = engine_for({"adapters": str(tmp_path / "shelf")}, Limits())
    with (
        listening(engine, token="s3cret") as address, chromium() as browser,
        opened(browser, address, "desktop", told) as page,
    ):  # fmt: skip
        page.keyboard.type("other")  # the field has the focus
        page.keyboard.press("Enter")
        page.locator("#problem", has_text="This is not the token.").wait_for()
        page.locator("#token input").fill("s3cret")
        page.keyboard.press("Enter")
        page.locator("#work").wait_for()
        assert not page.locator("#token").is_visible() and "s3cret" not in page.url
        page.locator("a", has_text="All addresses").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.id") == "file"
        page.locator("#file").set_input_files(file)
        assert SAID.fullmatch(settled(page)[0])
        before = page.locator(".answer").inner_text()
        page.locator("#columns input").focus()
        page.keyboard.type("bob")
        page.keyboard.press("Tab")
        assert SAID.fullmatch(settled(page)[0]) and page.locator(".answer").inner_text() != before
        save_digits(tmp_path / "shelf" / "cyd", 5)  # found while the page is open
        page.wait_for_timeout(1100)
        page.evaluate("() => window.dispatchEvent(new Event('focus'))")
        page.locator('#names option[value="cyd"]').wait_for(state="attached")
        assert page.locator("#columns input").input_value() == "bob"
        page.locator("a", has_text="All addresses").click()
        page.locator("h2", has_text="POST /v1/classify").wait_for()
        assert "1 to 100000" in page.locator("td").all_inner_texts()[4]
        assert page.evaluate(SEEN) == page.evaluate(CONTRAST) == []
        assert not [line for line in complaints(told) if not line.startswith("failed")]  # left by the click
    engine.close()
