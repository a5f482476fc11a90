"""`lora-lightning compress`: what a run has trained, or a recipe's base, by smaller plain layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.app.compress_options import BUDGETS
from lora_lightning.app.compressing import compress_task
from lora_lightning.app.evaluate import score_rows, tester
from lora_lightning.app.evaluation_data import data_or_problems
from lora_lightning.app.rebuild import compression_of
from lora_lightning.app.shrink import folder_problem
from lora_lightning.app.trained import Trained, named
from lora_lightning.compression.rebuild import save_compressed
from lora_lightning.errors import UserError
from lora_lightning.files.origin import Origin
from lora_lightning.methods.shortening import one_limit
from lora_lightning.utils.tables import format_table, printable

RECIPE = "recipe="


def compress(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Write a compressed model, tested before and after.

    Args:
        options: of the command `compress`, by name.
        words: `recipe=NAME key=value …`, where no run says how the model is built.

    Returns:
        What became of each layer, and every score before and after.

    Raises:
        UserError: every mistake in one message, before the model is built; no layer can be compressed.
        WriteError: the folder cannot be written.
    """
    budgets = {name: options.get(name) for name in BUDGETS}
    out = Path(options["out"]).expanduser()
    problems = [p for p in (one_limit(**budgets), folder_problem(out, bool(options.get("overwrite")))) if p]
    trained = named(options, words, problems)
    data = None
    if trained and trained.source and compression_of(trained.source):
        problems.append(
            f"adapter={options['adapter']}: was compressed already; give the run of the whole model."
        )
    elif trained:
        data = data_or_problems(trained, [], problems)
    if problems or trained is None or data is None:
        raise UserError("\n".join(dict.fromkeys(problems)))
    task, test = tester(trained, data, bool(options.get("check_base", True)), pictured=False)
    before = score_rows(task, test())
    told = compress_task(task, data, {**budgets, "batches": options.get("batches")})
    task.eval()
    after = score_rows(task, test())
    save_compressed(task.model, told, out, _origin(trained, words, data))
    rows = zip(before, after, strict=True)
    scores = format_table(
        ("score on the test data", "before", "after"), [(name, old, new) for (name, old), (_, new) in rows]
    )
    return printable(f"{told}\n\n{scores}\n\n{out}: lora-lightning predict or evaluate adapter={out}")


def _origin(trained: Trained, words: Sequence[str], data: Any) -> Origin:
    if trained.source:
        return trained.source.origin()
    recipe = next(word.partition("=")[2] for word in words if word.startswith(RECIPE))
    return Origin.of_run(recipe, trained.config, trained.facts or dict(getattr(data, "provides", {})))
