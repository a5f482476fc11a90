"""The results as a page."""

from __future__ import annotations

from typing import Any

from benchmarks.serving.shelves import SHAPES

Point = dict[str, Any]
SAID = {
    "mixed": "this library: mixed batches",
    "single": "the same server, asked for one adapter alone",
    "base": "the base alone, in the same batches",
    "switching": "one model, `set_adapter` for each",
    "loading": "one model, `load_adapter` for each",
    "peft": "one model, PEFT's `set_adapter` for each",
    "models": "one model an adapter",
    "merged": "one merged model an adapter",
    "hot": "mixed batches, the first ten adapters as merged copies",
    "kept 256": "mixed batches, 256 of them kept",
    "two servers": "mixed batches, two servers with one folder",
}
HEAD = """# Serving adapters

`python -m benchmarks.serving`: {clients} clients, each of whom asks again when it has its answer; adapters
of rank 8 in every layer, with heads of their own; batches of 8. All ways read, wait and encode alike, in
turns, on one thread, and answer the requests of a batch for one adapter together. "Time" is the processor's
for the same requests (over HTTP the clock's), relative to mixed batches: median and quartiles over the rounds
of one run.
Latencies and requests a second are those of this machine: {device}, {cores} cores, torch {torch}.
"""


def text(points: list[Point]) -> str:
    """Markdown."""
    named = {p["name"]: p for p in points}
    lines = [HEAD.format(clients=32, **named["machine"])]
    lines += _memory(named)
    for shape in SHAPES.values():
        for name, point in named.items():
            kind, _, of = name.rpartition(" ")
            if of == shape.name and "ways" in point:
                lines += [f"## {shape.about}: {_title(kind, point)}", "", *_ways(point["ways"]), ""]
    for name, point in named.items():
        if name.startswith("soak"):
            lines += _soak(SHAPES[name.partition(" ")[2]].about, point)
    return "\n".join(lines)


PAGE = ("base", "single", "switching", "merged")  # columns of docs/serving.md


def page_rows(points: list[Point]) -> list[str]:
    """The rows of docs/serving.md: memory of an adapter and its first answer, the ways' times relative to
    mixed batches, the p99 relative to one adapter's."""
    named = {p["name"]: p for p in points}
    rows = []
    for shape in SHAPES.values():
        if not (uniform := named.get(f"uniform {shape.name}")):
            continue
        memory, first = named[f"memory {shape.name}"], named[f"first {shape.name}"]
        found = uniform["ways"]
        cells = [shape.about, f"{memory['process']:.2f}", f"{first['ratio']:.1f}"]
        cells += [f"{found[way]['ratio']:.2f}" if way in found else "" for way in PAGE]
        cells += [f"{found['mixed']['p99_ms'] / found['single']['p99_ms']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _title(kind: str, point: Point) -> str:
    count = f"{point['adapters']:,} adapters"
    said = {"http": f"over HTTP, {count}", "batches": f"sizes of batches, {count}"}
    return said.get(kind, f"{kind.partition(' ')[0]}, {count}")


def _memory(named: dict[str, Point]) -> list[str]:
    lines = [
        "## Memory, and the first answer", "",
        "| base | adapters | file | tensors / file | process / file | cold / warm | cold | warm |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for shape in SHAPES.values():
        memory, first = named.get(f"memory {shape.name}"), named.get(f"first {shape.name}")
        if memory and first:
            lines.append(
                f"| {shape.about} | {memory['adapters']:,} | {memory['file_kb']:.0f} kB | "
                f"{memory['tensors']:.2f} | {memory['process']:.2f} | {first['ratio']:.1f} | "
                f"{first['cold_ms']:.0f} ms | {first['warm_ms']:.0f} ms |"
            )
    return [*lines, ""]


def _ways(ways: dict[str, Point]) -> list[str]:
    lines = [
        "| way | time | requests a second | p50, p95, p99 in ms | p99 / single | batch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    single = ways.get("single", {}).get("p99_ms")
    for way, found in ways.items():
        times = ", ".join(f"{found[f'{p}_ms']:.0f}" for p in ("p50", "p95", "p99"))
        against = f"{found['p99_ms'] / single:.2f}" if single else ""
        said = SAID.get(way) or f"batches of {way.rpartition(' ')[2]}"
        lines.append(
            f"| {said} | "
            f"{found['ratio']:.2f} ({found['low']:.2f}–{found['high']:.2f}) | {found['per_second']:.1f} | "
            f"{times} | {against} | {found['batch']:.1f} |"
        )
    return lines


def _soak(about: str, point: Point) -> list[str]:
    memory = "; ".join(
        f"{m['begin_mb']:.0f} MB at the beginning, {m['half_mb']:.0f} at half time, {m['end_mb']:.0f} at the "
        f"end ({m['mb_a_minute']:+.2f} MB a minute in the second half)"
        for m in point["memory"]
    )
    statuses = ", ".join(f"{count:,} × {status}" for status, count in point["statuses"].items())
    return [
        f"## {about}: a soak of {point['seconds']:g} seconds over HTTP", "",
        f"{point['requests']:,} requests ({statuses}) while adapters were added, replaced and removed "
        f"{point['changes']:,} times; a 404 is of one that was removed. Answers that were not those of "
        f"`lora-lightning predict` or `transcribe` to 1e-5: {point['wrong']}. p99 {point['p99_ms']:.0f} ms. "
        f"Memory of the server's processes: {memory}.", "",
    ]  # fmt: skip
