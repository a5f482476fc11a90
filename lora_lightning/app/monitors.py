"""What the callbacks of a run watch: by default the first score of its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.errors import ConfigError, did_you_mean

AUTO = "auto"
PREFIX = "val/"


def watching(callbacks: Mapping[str, Any], task: Any) -> list[dict[str, Any]]:
    """The nodes of the group `callbacks` with what they watch filled in.

    `monitor: auto` is the task's first score in validation. `mode: null` is min or max, whichever is better
    of that score; of a loss, min.

    Args:
        callbacks: the group, resolved; null nodes are left out.
        task: its `scores`, and its `monitors` if it has them: all names that it logs in validation.

    Raises:
        ConfigError: one line for each monitor that the task does not log, or of which no one knows the mode.
    """
    found: list[dict[str, Any]] = []
    problems = []
    best = {f"{PREFIX}{score.name}": score.best for score in task.scores} | {f"{PREFIX}loss": "min"}
    logged = [f"{PREFIX}{name}" for name in getattr(task, "monitors", ())]
    for name, node in callbacks.items():
        if not node:
            continue
        filled = dict(node)
        found.append(filled)
        if "monitor" not in filled:
            continue
        if filled["monitor"] == AUTO:
            filled["monitor"] = f"{PREFIX}{task.scores[0].name}"
        watched = filled["monitor"]
        if logged and str(watched).startswith(PREFIX) and watched not in logged:
            problems.append(
                f"callbacks.{name}.monitor={watched}: of these data {type(task).__name__} does not "
                f"log it.{did_you_mean(watched, logged)} Give one of {', '.join(logged)}; {AUTO} is "
                f"{logged[0]}."
            )
        elif "mode" in filled and filled["mode"] is None:
            filled["mode"] = best.get(watched) if watched else "max"
            if filled["mode"] is None:
                problems.append(f"callbacks.{name}.mode=null: give min or max: which is better of {watched}?")
    if problems:
        raise ConfigError(problems)
    return found
