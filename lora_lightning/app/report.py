"""`lora-lightning report`: the page of a run anew, or of several runs side by side, from what they left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.app.console import short_path
from lora_lightning.app.prediction_files import problems_of_file
from lora_lightning.errors import UserError
from lora_lightning.report.left import read_run
from lora_lightning.report.run import write
from lora_lightning.report.side_by_side import write_together


def report(paths: Sequence[str], options: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        paths: folders of runs; of one its own report.html is made, unless `out` says otherwise.
        options: of the command, by name.

    Returns:
        A line that says where it is.

    Raises:
        UserError: every mistake in one message.
    """
    folders = [Path(path).expanduser() for path in paths]
    out = Path(options["out"]).expanduser() if "out" in options else None
    problems = []
    if out is None and len(folders) > 1:
        problems.append("the page of several runs lies in none of their folders: give out=FILE.html.")
    if out is not None:
        problems += problems_of_file("out", out, (".html",), bool(options.get("overwrite")))
    for folder in folders:
        try:
            read_run(folder)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if out is not None and len(folders) > 1:
        write_together(folders, out)
        return f"{short_path(out)}: {len(folders)} runs side by side"
    run = read_run(folders[0])
    unfinished = "" if run.ended else ", which has not ended"
    return f"{short_path(write(folders[0], out))}: the page of {short_path(folders[0])}{unfinished}"
