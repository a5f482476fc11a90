"""The page with a thousand adapters, and with a recognizer that tells no times of words; without a model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import chromium, opened
from desk import listening
from served import sound
from test_serving_page import Canned, settled

from lora_lightning.serving.asking import ABOUT, Ask, Event
from lora_lightning.serving.catalog import Catalog


def test_one_of_a_thousand_adapters_is_found_by_typing() -> None:
    catalog = Catalog(fixed={f"voice-{i:03}": Path("ada") for i in range(1000)})
    engine = Canned()
    engine.store = SimpleNamespace(catalog=catalog)
    with listening(engine) as address, chromium() as browser, opened(browser, address) as page:
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "", "buffer": b"a picture"})
        settled(page)
        field = page.locator("#columns input")
        assert field.input_value() == "voice-000" and page.locator("#names option").count() == 1001
        field.click()
        assert field.input_value() == "" and field.get_attribute("placeholder") == "voice-000"
        page.keyboard.press("Tab")  # nothing is chosen
        assert field.input_value() == "voice-000"
        for name in ("voice-737", "base"):
            field.click()
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            page.locator(".answer li span", has_text=name).wait_for()
        page.keyboard.type("voice-7")
        page.keyboard.press("Enter")
        page.locator(
            "#columns .wrong", has_text="there is none of this name. Did you mean 'voice-"
        ).wait_for()


def test_a_segment_without_words_is_one_piece() -> None:
    """As Whisper's are."""
    said = {"text": "Two words, and more.", "start": 0.5, "end": 1.25, "words": []}

    class Heard(Canned):
        def submit(self, ask: Ask, tell) -> None:
            if ask.kind == ABOUT:
                return tell(Event("answer", {"kind": "transcribe"}))
            tell(Event("part", {"segment": said}))
            tell(Event("answer", {"adapter": None, "seconds": 2.0, "text": said["text"], "segments": [said]}))

    body = {"name": "a.wav", "mimeType": "audio/wav", "buffer": sound(np.zeros(32_000))}
    with listening(Heard()) as address, chromium() as browser, opened(browser, address) as page:
        page.locator("#file").set_input_files(body)
        settled(page)
        word = page.locator(".word")
        assert word.count() == 1 and word.inner_text().split("\n")[0] == said["text"]
        assert word.get_attribute("title") == "0:00.5 to 0:01.3"
        word.click()
        assert page.locator("#player").evaluate("p => p.currentTime") == pytest.approx(0.5, abs=0.5)
