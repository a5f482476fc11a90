"""The reader of pages notices what is wrong on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from reader import Reader, assert_shown
from shell import commands_of


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def follow(text: str) -> Reader:
        Path("page.md").write_text(text, encoding="utf-8")
        reader = Reader(tmp_path / "page.md", lambda: "".join(capsys.readouterr()))
        assert reader.check() == []
        reader.follow()
        return reader

    return follow


def test_a_page_is_one_namespace_in_one_folder(follow) -> None:
    follow(
        '<!--- invisible-code-block: python\nfrom pathlib import Path\n-->\n\n```python title="own.py"\n'
        'class Own:\n    """Mine."""\n```\n\n```python\nimport own\nprint(own.Own.__doc__)\n'
        "print([Own.__module__])  # ['page']\n```\n\n```text\nMine.\n…\n```\n"
    )
    assert Path("own.py").is_file()


@pytest.mark.parametrize(
    "block",
    [
        "```python\nprint(nothing)\n```",
        "```python\nprint([1])  # [2]\n```",
        "```python\nprint('three')\n```\n\n```text\nfour\n```",
        "```bash\npython train.py lora.rnk=3\n```",
        "```bash\nlora-lightning inspect there bas=here\n```",
        "```bash\nlora-lightning predicts\n```",
        "```bash\nnone_such --option\n```",
        "```bash\npython -m benchmarks.on_paper --chek\n```",
        "```bash\npip install 'lora-lightning[recipe]'\n```",
        "```console\n$ lora-lightning recipes\nnone at all\n```",
        "```console\n$ lora-lightning copy vit_digts my.yaml\nthere is such a recipe\n```",
        "```yaml\na: 1\n```",
        '```yaml title="my.yaml"\n# @package _global_\nlora: {rnk: 1}\n```',
        "```csv\na,b\n1\n```",
        "```rust\n```",
    ],
)
def test_what_is_wrong_is_noticed(block: str, follow) -> None:
    with pytest.raises((AssertionError, LookupError, NameError, ValueError, SystemExit)):
        follow(f"# A page\n\n{block}\n")


def test_what_is_right_passes(follow) -> None:
    follow(
        "```console\n$ lora-lightning copy vit_digts my.yaml  # a slip\n… Did you mean 'vit_digits'…\n"
        "$ lora-lightning copy vit_digits my.yaml\nmy.yaml: the recipe vit_digits, …\n```\n"
    )


def test_commands() -> None:
    block = 'A=b python train.py \\\n  x="a #1" # note\n\n# alone\neval "$(lora-lightning completion bash)"'
    block += " && ls; cat f"
    assert [c.words for c in commands_of(block, console=False)] == [
        ("python", "train.py", "x=a #1"),
        ("lora-lightning", "completion", "bash"),
        ("ls",),
        ("cat", "f"),
    ]
    first, second = commands_of("$ ls a\n1\n2\n$ cat b\n", console=True)
    assert (first.words, first.shown, second.words, second.shown) == (
        ("ls", "a"),
        "1\n2\n",
        ("cat", "b"),
        None,
    )


def test_outputs() -> None:
    assert_shown("a  1.5 ──\nb", "first\na 1.5 ─────\n b last", exact=True)
    assert_shown("loss 1.5 … end", "loss 0.2, and so on, the end", exact=False)
    for shown, exact in (("a 1", True), ("a b c", False)):
        with pytest.raises(AssertionError, match="the page shows"):
            assert_shown(shown, "a 2 b", exact)
