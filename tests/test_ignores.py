"""What a checker of the code is told to overlook: by its code, and with the reason on the line."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lora_lightning"
OVERLOOKED = re.compile(r"#\s*(?:type: ignore|noqa)\b")
JUSTIFIED = re.compile(r"# (?:type: ignore\[[a-z-]+(?:, [a-z-]+)*\]|noqa: [A-Z]+\d+(?:, [A-Z]+\d+)*) +# \S+")


def test_each_has_its_reason_on_the_line():
    lines = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if OVERLOOKED.search(line) and not JUSTIFIED.search(line)
    ]
    assert not lines, "\n".join(lines)
