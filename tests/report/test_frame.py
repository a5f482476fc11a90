"""The frame of a page: one file without a network, in which texts are texts."""

import base64
import hashlib
import json
import re

import pytest

from lora_lightning.errors import UserError
from lora_lightning.report.charts import chart, compact, embedded
from lora_lightning.report.page import PAGE_FILE, Section, leave, left, table, write_page

WICKED = "</script><b onclick='x()'>\u2028<!--<script>"
SPEC = {
    "data": {"values": [{"class": WICKED, "share": 0.12345678}, {"class": "cat", "share": float("nan")}]},
    "mark": "bar",
    "encoding": {"x": {"field": "share", "type": "quantitative"}, "y": {"field": "class"}},
}


def test_a_page_without_a_chart_has_no_script(tmp_path):
    write_page(tmp_path / "page.html", "A & B", [Section("Heads <i>", table(["a"], [[WICKED]]))])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "<title>A &amp; B</title>" in page and "<h2>Heads &lt;i&gt;</h2>" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert len(page) < 20_000


def test_a_page_with_charts_holds_the_libraries_once(tmp_path):
    write_page(tmp_path / "page.html", "Two", [Section("Charts", chart(SPEC, "one") + chart(SPEC, WICKED))])
    page = (tmp_path / "page.html").read_text()
    scripts = re.findall(r"<script(?: type=\"application/json\")?>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 + 3 and page.count("<script") == 5 and page.count("</script") == 5
    assert json.loads(scripts[0])["data"]["columns"]["class"] == [WICKED, "cat"]
    assert len(page) < 1_000_000
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)""", page.split("<script", 1)[0])


def test_numbers_are_short_and_never_nan():
    assert json.loads(embedded(compact(SPEC)))["data"]["columns"]["share"] == [0.123457, None]
    assert "<" not in embedded({"a": WICKED})


def test_sections_that_are_left_make_a_page_and_come_back(tmp_path):
    sections = [Section("Classes", chart(SPEC, "bars")), Section("Worst", "<p>1</p>")]
    leave(tmp_path, sections, "Pictures")
    assert "<h1>Pictures</h1>" in (tmp_path / PAGE_FILE).read_text()
    assert left(tmp_path) == ("Pictures", sections)
    assert left(tmp_path / "elsewhere") == ("", [])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"title": 1}', '{"title": "", "sections": [1]}']
)
def test_damaged_sections_are_refused_by_name(tmp_path, text):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "sections.json").write_text(text)
    with pytest.raises(UserError, match=r"sections\.json (is damaged|cannot be read).*Delete it"):
        left(tmp_path)


def test_the_policy_allows_the_scripts_of_the_page_alone(tmp_path):
    write_page(
        tmp_path / "page.html", "\ud800", [Section("\ud800", chart(SPEC, "one") + "\ud800<script>x()")]
    )
    page = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    ours = re.findall(r"<script>(.*?)</script>", page[page.index("</main>") :], re.DOTALL)
    digests = [
        "'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'" for s in ours
    ]
    assert len(ours) == 3 and all(digest in policy for digest in digests)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 4
