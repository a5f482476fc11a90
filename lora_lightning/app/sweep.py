"""What a job ended in, and the table in which a sweep ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lora_lightning.utils.tables import format_table

if TYPE_CHECKING:
    from lora_lightning.app.results import Result
    from lora_lightning.tasks.scores import Score


class Ended(NamedTuple):
    """A job that has ended: its overrides, and its result and scores, or the reason why there is none."""

    overrides: Sequence[str]
    result: Result | None
    scores: Sequence[Score] = ()
    reason: str = ""


def sweep_table(jobs: Sequence[Ended]) -> str:
    """Each job by the overrides in which it differs from another; below, why some have failed."""
    from lora_lightning.app.results import header  # with the metrics it loads torch

    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    scores = list(dict.fromkeys(score for job in jobs for score in job.scores if score.in_table))
    titles = header(scores)[1:]
    rows, reasons = [], []
    for job in jobs:
        name = " ".join(o.lstrip("+") for o in job.overrides if o not in shared)
        if job.result is None:
            rows.append((f"{name} (failed)", *["–"] * len(titles)))
            reasons.append(f"  {name}: {_in_a_line(job.reason)}")
        else:
            rows.append((name, *job.result.row(scores)[1:]))
    lines = [format_table(("job", *titles), rows)]
    if reasons:
        lines += ["", f"{len(reasons)} of {len(jobs)} jobs failed:", *reasons]
    return "\n".join(lines)


def _in_a_line(reason: str) -> str:
    problems = reason.partition("in the configuration:\n")[2] or reason
    return " ".join(problems.split()).removeprefix("- ")
