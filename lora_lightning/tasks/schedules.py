"""How the rate goes: functions of the step, as fractions of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lora_lightning.methods.restarts import restart_steps
from lora_lightning.tasks.optim_config import FLOOR, WARMUP, ScheduleConfig

START, END = 1 / 25, 1 / 250_000  # of the peak; torch's OneCycleLR: div_factor 25, final_div_factor 1e4


def schedule_of(config: ScheduleConfig, total_steps: float, restarts: int = 0) -> Callable[[int], float]:
    """step -> fraction of the peak rate, for the schedule's own warm-up and floor where it is given none.

    Args:
        total_steps: infinite where `needs_an_end` is false.
        restarts: of LoRA, evenly spread; the rate climbs again after each.
    """
    warmup = WARMUP[config.name] if config.warmup is None else config.warmup
    if restarts:
        climb = round(warmup * total_steps / (restarts + 1))
        return jagged(schedule_of(config, total_steps), restart_steps(restarts, int(total_steps)), climb)
    floor = FLOOR.get(config.name, 0.0) if config.floor is None else config.floor
    if config.name == "onecycle":
        return one_cycle(total_steps, warmup)
    climb = round(warmup * total_steps) if warmup else 0
    after = {
        "cosine": lambda: cosine(total_steps - climb, floor),
        "constant": lambda: lambda step: 1.0,
        "wsd": lambda: stable_then_decay(total_steps - climb, round(config.decay * total_steps), floor),
    }[config.name]()
    return lambda step: (step + 1) / climb if step < climb else after(step - climb)


def needs_an_end(config: ScheduleConfig) -> bool:
    """Whether a schedule depends on the number of steps."""
    return not (config.name == "constant" and config.warmup == 0)


def jagged(factor: Callable[[int], float], restarts: Sequence[int], climb: int) -> Callable[[int], float]:
    """A schedule that climbs from zero again to where it would be, in so many steps after each restart
    (ReLoRA, Lialin et al. 2023, arXiv 2307.05695, section 3: a jagged cosine)."""

    def climbing(step: int) -> float:
        since = min((step - start for start in restarts if step >= start), default=climb)
        return factor(step) * min(1.0, (since + 1) / max(1, climb))

    return climbing


def cosine(steps: float, floor: float = 0.0) -> Callable[[int], float]:
    """From 1 to `floor` along a half cosine, which the step behind the last one would have."""

    def factor(step: int) -> float:
        progress = min(1.0, step / max(1, steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def stable_then_decay(steps: float, decay: float, floor: float) -> Callable[[int], float]:
    """1, and in the last `decay` steps down to `floor` at the end by halves in equal times: 0.5 ** (s / half)
    of MiniCPM (Hu et al. 2024, section 4)."""
    start = steps - decay

    def factor(step: int) -> float:
        return 1.0 if step < start else floor ** min(1.0, (step - start) / max(1, decay))

    return factor


def one_cycle(steps: float, warmup: float) -> Callable[[int], float]:
    """torch's OneCycleLR with its own defaults, momentum left as it is: half cosines from START up to 1 and
    down to END, which the last step has."""
    top, last = max(0.0, warmup * steps - 1), steps - 1

    def factor(step: int) -> float:
        if step < top:
            return _eased(START, 1.0, step / top)
        return _eased(1.0, END, min(1.0, (step - top) / max(1e-9, last - top)))

    return factor


def _eased(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
