"""What serving adapters costs, against other ways of doing it.

    python -m benchmarks.serving                         # all of it, ten minutes; goes on where it was
    python -m benchmarks.serving --soak 600 --shape digits    # at full load over HTTP, while adapters change

Memory of a thousand adapters, the first answer of a cold one, and 32 clients who each ask again when they
have their answer: mixed batches against one model that switches, one model an adapter, merged models, and a
single adapter; in one process, and over HTTP. One thread; the ways in turns, ratios of the same round. Writes
results/serving.jsonl and results/serving.md, and prints the rows of docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.serving import measuring, over_http, soak, tables, ways
from benchmarks.serving.load import CLIENTS, Load, names_of
from benchmarks.serving.shelves import BODIES, SHAPES, Shape, filled

RESULTS = Path(__file__).parents[1] / "results"
HUNDRED = 100
THOUSAND = {"vit_96": 1000, "conformer": 1000}  # adapters, where it is not a hundred
Point = dict[str, Any]
Ways = dict[str, Any]


class Ledger:
    """Points of the results by name; those that are there already are not measured again."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() and not again else []
        self.points: dict[str, Point] = {p["name"]: p for p in map(json.loads, lines)}

    def point(self, name: str, measure: Callable[[], Point]) -> None:
        if name in self.points:
            return
        self.points[name] = {"name": name, **measure()}
        print(json.dumps(self.points[name]), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(p) + "\n" for p in self.points.values()))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--folder", type=Path, default=Path("outputs/serving"), help="of the adapters")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96, help="of a way in a round")
    parser.add_argument("--adapters", type=int, help="instead of a hundred and a thousand")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="only this, of the first shape")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    ledger = Ledger(options.out / "serving.jsonl", options.again)
    ledger.point("machine", lambda: {**machine(1, "cpu"), "cores": os.cpu_count()})
    if options.soak:
        for name in options.shape:
            ledger.points.pop(f"soak {name}", None)
            ledger.point(f"soak {name}", partial(soak.soaked, name, options.folder, options.soak))
    else:
        for name in options.shape:
            measure(SHAPES[name], ledger, options)
    points = list(ledger.points.values())
    (options.out / "serving.md").write_text(tables.text(points))
    print(*tables.page_rows(points), sep="\n")  # for docs/serving.md


def measure(shape: Shape, ledger: Ledger, options: argparse.Namespace) -> None:
    """All of one shape."""
    count = options.adapters or HUNDRED
    most = options.adapters or THOUSAND.get(shape.name, HUNDRED)
    folder = filled(shape, options.folder / shape.name, most)
    given = {"requests": options.requests, "rounds": options.rounds}
    ledger.point(f"memory {shape.name}", lambda: measuring.memory(shape, folder, most))
    ledger.point(f"first {shape.name}", lambda: measuring.first_answers(shape, folder, min(count, 30)))
    several = partial(ways.mixed, shape, folder, count, read=True)
    each = partial(ways.a_model_each, shape, folder, count)
    engines: Ways = {
        "mixed": several,
        "single": several,
        "base": several,
        "switching": partial(ways.switching, shape, folder, count),
        "loading": partial(ways.loading, shape, folder),
        "models": partial(each, merged=False),
        "merged": partial(each, merged=True),
    }
    hot = partial(ways.hot, shape, folder, count, min(10, count))
    peft = partial(ways.peft_switching, shape, folder, count)
    sizes = {f"batch {n}": partial(several, batch=n) for n in (1, 2, 4, 16, 32)}
    plans: dict[str, tuple[int, str, Ways]] = {
        "uniform": (count, "uniform", engines | ({"peft": peft} if shape.name == "digits" else {})),
        "zipf": (
            count,
            "zipf",
            {n: {**engines, "hot": hot}[n] for n in ("mixed", "hot", "switching", "merged")},
        ),
        "batches": (count, "uniform", {"mixed": several, **sizes}),
    }
    if shape.large:
        plans = {
            "uniform": (
                count,
                "uniform",
                {n: engines[n] for n in ("mixed", "single", "base", "switching", "merged")},
            )
        }
    if most > count:
        kept = {n: partial(ways.mixed, shape, folder, n, read=n == most) for n in (most, 256)}
        thousand = {"mixed": kept[most], "kept 256": kept[256], "single": several}
        plans |= {f"{p} of {most}": (most, p, thousand) for p in ("uniform", "zipf")}
    for plan, (asked, popularity, compared) in plans.items():

        def point(asked: int = asked, popularity: str = popularity, compared: Ways = compared) -> Point:
            return {
                "adapters": asked,
                "ways": measuring.against(shape, compared, asked, popularity, **given),
            }

        ledger.point(f"{plan} {shape.name}", point)
    if shape.config:
        ledger.point(f"http {shape.name}", lambda: http(shape, folder, count, **given))


def http(shape: Shape, folder: Path, adapters: int, requests: int, rounds: int) -> Point:
    """Servers against each other: mixed batches, the same asked for one adapter alone, one that switches, and
    two of the first kind that share the folder, as on two machines."""
    bodies = [shape.body(n) for n in range(BODIES)]
    loads: dict[str, list[Load]] = {}
    run = partial(over_http.server, shape.name, folder, adapters=adapters)
    with run() as one, run() as other, run(way="switching") as switching:
        asked = {
            "mixed": [one.address],
            "single": [one.address],
            "switching": [switching.address],
            "two servers": [one.address, other.address],
        }
        for n in range(-1, rounds):
            names = names_of(requests, adapters, "uniform", n)
            for way, addresses in asked.items():
                given = ["a0"] * requests if way == "single" else names
                load = over_http.drive_http(addresses, shape.task, given, bodies, CLIENTS)
                if n >= 0:
                    loads.setdefault(way, []).append(load)
    return {"adapters": adapters, "ways": measuring.compared(loads, "mixed")}


if __name__ == "__main__":
    main()
