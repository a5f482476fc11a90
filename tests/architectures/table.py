"""What "auto" does on each architecture, as data for the snapshot and as a table for people.

python -m tests.architectures.table [--snapshot] [--write]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import lora_lightning as ll

from .zoo import ZOO

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "architectures.md"


def plan_of(name: str) -> ll.Plan:
    """The plan for a model without memory; some cannot be built so."""
    try:
        with torch.device("meta"):
            model = ZOO[name].build()
    except NotImplementedError:
        model = ZOO[name].build()
    return ll.plan(model, ll.LoRAConfig(rank=2))


def summary(plan: ll.Plan) -> dict[str, Any]:
    """Numbers of adapted layers by family, the heads, and what is left and why; fit for JSON."""
    skipped: dict[str, int] = {}
    for name, reason in plan.skipped.items():
        key = f"{_family(name)}: {reason}"
        skipped[key] = skipped.get(key, 0) + 1
    return {
        "adapted": dict(sum((Counter({name: count}) for name, count, *_ in plan.families()), Counter())),
        "heads": plan.heads,
        "skipped": skipped,
    }


def _family(name: str) -> str:
    return re.sub(r"\d+\.", "*.", name)


def rows() -> dict[str, tuple[dict[str, Any], ll.Plan]]:
    """For each architecture the summary and the plan."""
    found = {}
    for name in ZOO:
        plan = plan_of(name)
        found[name] = summary(plan), plan
    return found


def markdown(planned: dict[str, tuple[dict[str, Any], ll.Plan]]) -> str:
    """A row for each architecture, and under the table what its updates are known not to do."""
    lines = [
        '# What `target_modules="auto"` chooses',
        "",
        "Small variants with random weights at rank 2, by `python -m tests.architectures.table --write`.",
        "`*` stands for a number.",
        "",
        "| architecture | weights found | adapted | heads trained in full | left frozen, and why |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for name, (found, plan) in planned.items():
        left = [key if count == 1 else f"{key} (×{count})" for key, count in found["skipped"].items()]
        heads = [h if n == 1 else f"{h} (×{n})" for h, n in _counted(plan.heads).items()]
        total = len(plan.layers) + len(plan.skipped) + len(plan.heads)
        lines.append(
            f"| {name} | {total} | {len(plan.layers)} | {'; '.join(heads) or 'none'} "
            f"| {'; '.join(left) or 'nothing'} |"
        )
    lines += ["", "## Adapted layers by family", ""]
    for name, (found, _) in planned.items():
        families = ", ".join(f"`{family}` ×{count}" for family, count in found["adapted"].items())
        lines.append(f"- **{name}**: {families}")
    lines += ["", "## Exceptions and looser tolerances", ""]
    lines += [f"- **{name}**, {line}" for name in ZOO for line in _known(name)]
    return "\n".join(lines) + "\n"


def _counted(names: list[str]) -> dict[str, int]:
    families = [_family(f"{name}.").removesuffix(".") for name in names]
    return {family: families.count(family) for family in families}


def _known(name: str) -> list[str]:
    architecture = ZOO[name]
    modes = {"train": architecture.dead_in_train, "eval": architecture.dead_in_eval}
    lines = [
        f"no update in {mode} of `{part}`: {why}"
        for mode, parts in modes.items()
        for part, why in parts.items()
    ]
    lines += [f"{check} to {limit:g}: {why}" for check, (limit, why) in architecture.tolerances.items()]
    return lines + [f"no {check}: {why}" for check, why in architecture.impossible.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--snapshot", action="store_true", help="rewrite snapshot.json; review its difference"
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    planned = rows()
    if options.snapshot:
        text = json.dumps({name: found for name, (found, _) in planned.items()}, indent=1)
        (HERE / "snapshot.json").write_text(text + "\n")
    if options.write:
        RESULTS.write_text(markdown(planned))
    else:
        print(markdown(planned))


if __name__ == "__main__":
    main()
