"""What `benchmarks.on_paper` asks of ours, and whether it holds."""

from __future__ import annotations

from typing import Any, NamedTuple


class Limit(NamedTuple):
    """A number of a way, itself or relative to another way's, and the most that it may be."""

    way: str
    number: str
    to: str
    most: float


def _time(way: str, most: float) -> Limit:
    return Limit(way, "ms", "floor", most)


def _calls(way: str, most: float, to: str = "") -> Limit:
    return Limit(way, "calls", to, most)


def _variant() -> list[Limit]:
    return [_time("ours", 1.6), Limit("ours", "ms", "peft", 1.0), _time("fused", 1.4)]


class Setting(NamedTuple):
    model: str
    batch: int
    dropout: float = 0.0
    dora: bool = False


# Of one H100, bf16-true and rank 8.
LIMITS: dict[Setting, list[Limit]] = {
    Setting("vit_base", 128): [
        _time("ours", 1.35), _calls("ours", 700), Limit("ours", "saved_gib", "floor", 1.10),
        _time("keep_inputs", 1.25),
        _time("fused", 1.20), _calls("fused", 640), Limit("fused", "saved_gib", "floor", 1.10),
    ],
    Setting("vit_base", 8): [_calls("ours", 0.85, "peft"), _calls("fused", 0.80, "peft")],
    Setting("resnet50", 256): [
        _time("ours", 1.30), _calls("ours", 750), _time("fused", 1.12), _calls("fused", 700),
        _time("folded", 1.05), _calls("folded", 620),
    ],
    Setting("wav2vec2_base", 16): [_time("ours", 1.35), _time("fused", 1.25)],
    Setting("lstm", 32): [_time("ours", 1.35), _time("fused", 1.25)],
    Setting("swin_tiny", 128): [_time("ours", 1.35), _time("fused", 1.25)],
    Setting("vit_base", 128, dropout=0.1): _variant(),
    Setting("vit_base", 128, dora=True): _variant(),
}  # fmt: skip


def limits_of(run: dict[str, Any]) -> list[Limit]:
    """Those of a run whose settings they were set for."""
    if (run["device"], run["precision"], run["rank"]) != ("H100", "bf16-true", 8):
        return []
    return LIMITS.get(Setting(run["model"], run["batch"], run["dropout"], run["dora"]), [])


def checked(run: dict[str, Any]) -> tuple[str, bool]:
    """A table of which limits hold, and whether one does not. Ways that do not exist are told."""
    lines, failed = [], False
    for limit in limits_of(run):
        what = f"{limit.way}: {limit.number}" + (f" / {limit.to}" if limit.to else "")
        if limit.way not in run["ways"]:
            lines.append(f"{what:28s} {'':9s} at most {limit.most:6g}  there is no such way yet")
            continue
        value = run["ways"][limit.way][limit.number]
        if limit.to:
            value /= run["ways"][limit.to][limit.number]
        holds = value <= limit.most
        failed |= not holds
        lines.append(f"{what:28s} {value:9.3f} at most {limit.most:6g}  {'holds' if holds else 'EXCEEDED'}")
    return "\n".join(lines) or "no limits are set for this", failed
