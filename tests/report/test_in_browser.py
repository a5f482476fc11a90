"""Pages in a browser: drawn, without an error or a call to a network, on a screen, a telephone and paper."""

import pytest
from browser import chromium, opened, problems

from lora_lightning.report.charts import chart
from lora_lightning.report.page import Section, image, table, write_page

WICKED = "</script><b>\u2028"


def page_of(tmp_path, html):
    write_page(tmp_path / "page.html", f"A page {WICKED}", [Section("A section", html)])
    return tmp_path / "page.html"


def bars(names):
    return {
        "data": {"values": [{"class": name, "share": i / 10} for i, name in enumerate(names)]},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "share", "type": "quantitative"},
            "y": {"field": "class", "type": "nominal"},
        },
    }


@pytest.mark.slow
def test_a_chart_is_drawn_in_every_look(tmp_path):
    html = chart(bars([WICKED, "cat"]), "bars") + table(
        ["name", *"abcdefghijkl"], [[WICKED, *range(10000, 10012)]]
    )
    assert problems(page_of(tmp_path, html)) == []


@pytest.mark.slow
def test_hovering_shows_the_values_and_the_data_are_a_table(tmp_path):
    with chromium() as browser, opened(browser, page_of(tmp_path, chart(bars(["dog", WICKED]), "b"))) as page:
        page.locator(".plot svg .mark-rect path").nth(1).hover()
        assert "0.1" in page.locator("#tip").inner_text()
        assert WICKED.split("\u2028")[0] in page.locator("#tip").inner_text()
        page.locator("figure summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("figure td").all_inner_texts()[0] == "dog"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("html", "said"),
    [
        ("<script>console.error('no')</script>", "console: no"),
        ("<script>undefined.x</script>", "error:"),
        ("<img alt='' src='data:image/png;base64,AAAA'>", "a missing picture"),
        ("<img src='http://example.org/a.png' alt='a'>", "asked for http://example.org"),
        ("<div style='width:50rem'>wide</div>", "too wide"),
        ("<input type=range>", "without a label"),
        ("<p style='color:#999;background:#fff'>pale</p>", "contrast 2.8"),
        (chart(bars(["a"]) | {"mark": "nothing"}, "c"), "error"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, html, said):
    page = page_of(tmp_path, html)
    page.write_text(page.read_text().replace("Content-Security-Policy", "nothing"))  # as other pages are
    assert any(said in line for line in problems(page, ("telephone",)))


@pytest.mark.slow
def test_scripts_in_sections_do_not_run_and_nothing_is_loaded(tmp_path):
    wicked = (
        "<p id=p>as it was</p><script>document.getElementById('p').textContent = 'taken'</script>"
        "<img src=x alt=x onerror=\"document.getElementById('p').textContent = 'taken'\">"
        "<img src='http://example.org/a.png' alt='a'><a href='javascript:document.title=1'>x</a>"
    )
    said = []
    page = page_of(tmp_path, wicked + chart(bars(["a"]), "b"))
    with chromium() as browser, opened(browser, page, complaints=said) as shown:
        shown.locator("a", has_text="x").click()
        assert shown.locator("#p").inner_text() == "as it was" and shown.title().startswith("A page")
        assert shown.locator(".plot svg").count() == 1
    refused = " ".join(line for line in said if "Content Security Policy" in line)
    assert all(word in refused for word in ("inline script", "event handler", "example.org/a.png"))


def test_a_sound_picture_has_a_text():
    from PIL import Image

    assert 'alt="&lt;b&gt;"' in image(Image.new("RGB", (8, 8)), "<b>")


@pytest.mark.slow
def test_a_table_of_methods_is_seen_whole_on_a_desktop(tmp_path):
    """Long headings break before a column is out of sight, and the methods' names do not."""
    header = ["method", "test accuracy %", "top-5 %", "macro F1 %", "calibrated ECE %", "source %",
              "source, off %", "trained parameters", "% of total", "seconds", "checkpoint MB"]  # fmt: skip
    row = ["before adaptation", *["42.7 (38.7–46.7)"] * 4, "99.0", "99.0", "454,954", "18.28", "4.7", "1.32"]
    with chromium() as browser, opened(browser, page_of(tmp_path, table(header, [row]))) as page:
        beyond = "() => { const w = document.querySelector('.wide'); return w.scrollWidth - w.clientWidth; }"
        assert page.evaluate(beyond) == 0
        assert page.locator("td.name").bounding_box()["height"] < 40
