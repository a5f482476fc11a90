"""One who follows a page from its first block to its last, in an empty folder of their own."""

from __future__ import annotations

import csv
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import yaml
from blocks import Block, document_of
from commands import treatment_of
from pages import ROOT
from shell import Command, commands_of
from sybil import Example
from sybil.evaluators.python import PythonEvaluator

from lora_lightning.app.command_line import CommandLine

SHELLS = ("bash", "console", "sh")
NAMESPACE = "page"
ASKS = "ll.Client("
"""Python that asks a server: tests/serving/test_server.py runs it against one, here it is compiled."""
LITERAL = re.compile(r"""^print\(.*\)  # ((?:[\[{('"\d]|True|False|None).*)$""", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?")
ANYTHING = re.compile(r"…|\.\.\.")


class Reader:
    """Follows a page.

    Args:
        page: the page's path.
        printed: what was printed since it was called last.
    """

    def __init__(self, page: Path, printed: Callable[[], str]) -> None:
        self.document = document_of(page)
        self.read_printed = printed
        self.printed = ""  # by the last block
        self.exact = True  # whether its numbers are those of a reader, too
        module = types.ModuleType(NAMESPACE)  # what the page's classes are found in
        sys.modules[NAMESPACE] = module
        self.document.namespace = vars(module)

    def check(self) -> list[str]:
        """Find every misspelt command of the page without running it.

        Returns:
            What is wrong, by line.
        """
        problems = []
        for example in self.document.examples():
            block: Block = example.parsed
            if block.title and block.language != "diff":
                self.file(example)
            if block.language not in SHELLS:
                continue
            for command in commands_of(block.source, block.language == "console"):
                if command.shown is not None:  # a message, perhaps, of words that are wrong
                    continue
                treatment = treatment_of(command)
                try:
                    (
                        treatment.run
                        if command.words[1:2] == ("copy",) and treatment.run
                        else treatment.check
                    )()
                except (Exception, SystemExit) as error:
                    problems.append(f"line {example.line}: {command}\n    {error!r}"[:2000])
        return problems

    def follow(self) -> None:
        """Run everything of the page that can be run."""
        for example in self.document.examples():
            block: Block = example.parsed
            if block.title and block.language != "diff":
                self.file(example)
            KINDS[block.language](self, example)

    def file(self, example: Example) -> None:
        """The file that a block is said to be."""
        path = Path(example.parsed.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(example.parsed.source, encoding="utf-8")
        if path.suffix == ".py":
            sys.modules.pop(path.stem, None)  # another page's

    def diff(self, example: Example) -> None:
        """Change a copy of the package, which stands in the folder from the first change on: lines that begin
        with a blank or a minus stand there, once, and those with a blank or a plus take their place."""
        block: Block = example.parsed
        if not Path("lora_lightning").is_dir():
            for name in ("lora_lightning", "conf", "recipes"):
                shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(block.title or "")
        text = path.read_text(encoding="utf-8")
        for part in re.split(r"^@@.*\n", block.source, flags=re.MULTILINE):
            lines = part.splitlines(keepends=True)
            before, after = ("".join(li[1:] for li in lines if li[0] in signs) for signs in (" -", " +"))
            assert text.count(before) == 1, (
                f"line {example.line}: {path} has not these lines, once:\n{before}"
            )
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")

    def python(self, example: Example) -> None:
        """Run in the page's namespace."""
        if ASKS in example.parsed.source:
            compile(example.parsed.source, self.document.path, "exec")
            return
        self.read_printed()
        example.region.parsed = example.parsed = example.region.lexemes["source"]
        PythonEvaluator()(example)
        self.printed, self.exact = self.read_printed(), True
        for shown in LITERAL.findall(str(example.parsed)):
            assert_shown(shown, self.printed, exact=True)

    def shell(self, example: Example) -> None:
        """Run what can be run."""
        block: Block = example.parsed
        self.printed = ""
        for command in commands_of(block.source, block.language == "console"):
            self.command(command)

    def command(self, command: Command) -> None:
        """Run one, and compare what the page shows of it."""
        treatment = treatment_of(command)
        if treatment.run is None:
            return
        self.read_printed()
        try:
            treatment.run()
        except SystemExit as ended:
            if ended.code and command.shown is None:
                raise AssertionError(f"{command}\n{self.read_printed()}") from ended
        printed = self.read_printed()
        self.printed += printed
        self.exact = "train" not in " ".join(command.words[:2])
        if command.shown is not None:
            assert_shown(command.shown, printed, self.exact)

    def text(self, example: Example) -> None:
        """What the block before has printed."""
        assert_shown(example.parsed.source, self.printed, self.exact)

    def yaml(self, example: Example) -> None:
        """A recipe, or a configuration of LightningCLI, or a file that a title names."""
        block: Block = example.parsed
        values = yaml.safe_load(block.source)
        if block.title:
            FILES.get(Path(block.title).name, lambda path: None)(block.title)
            if "@package _global_" in block.source:
                CommandLine([f"recipe={block.title}"]).check()
        elif "class_path" in block.source:
            _lightning_cli(values)
        else:
            raise LookupError('say which file it is, by ```yaml title="FILE"')

    def table(self, example: Example) -> None:
        """Rows, each as wide as the first."""
        widths = {len(row) for row in csv.reader(example.parsed.source.strip().splitlines())}
        assert len(widths) == 1 and widths != {1}, widths


KINDS: dict[str, Callable[[Reader, Example], None]] = {
    "python": Reader.python,
    **dict.fromkeys(SHELLS, Reader.shell),
    **dict.fromkeys(("yaml", "yml"), Reader.yaml),
    "text": Reader.text,
    "csv": Reader.table,
    "diff": Reader.diff,
}


def assert_shown(shown: str, printed: str, exact: bool) -> None:
    """That a page shows what was printed: blanks aside, `…` stands for anything.

    Args:
        exact: numbers are compared, too.
    """
    wanted = [re.escape(_plain(part, exact)) for part in ANYTHING.split(shown)]
    found = re.search(r"[\s\S]*?".join(wanted).replace(r"\ ", r"\s*"), _plain(printed, exact))
    assert found, f"the page shows\n{shown}\nbut this was printed:\n{printed}"


def _plain(text: str, exact: bool) -> str:
    text = re.sub(r"─+", "─", text)
    text = text if exact else NUMBER.sub("0", text)
    return re.sub(r"\s+", " ", text).strip()


def _lightning_cli(values: dict) -> None:
    """The Trainer that LightningCLI makes of a file."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.instantiate_classes(parser.parse_object(values))


def _colours(path: str) -> None:
    from lora_lightning.data.mask_files import read_colours

    read_colours(Path(path))


FILES = {"colours.yaml": _colours}
