"""Ranks by hand: which form and rank is meant by what was given for each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from lora_lightning.compression.form import Layer, Rank
from lora_lightning.compression.forms import FORMS, forms_of
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.recurrent import FORM, Stack
from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.planning.patterns import matches, matching
from lora_lightning.planning.plan import summary
from lora_lightning.utils.plurals import counted

GIVE = "give a rank, or a form with its rank: 'spatial:32', 'tucker:32x16'"


def by_hand(
    ranks: Mapping[str, int | str],
    layers: Mapping[str, Layer | Stack],
    left: Mapping[str, str],
    moment: Callable[[str], Moment],
) -> dict[str, tuple[str, Rank]]:
    """Form and rank of every layer that is named; of several patterns the last one counts.

    Raises:
        ConfigError: a pattern means no layer that can be compressed; a form or a rank does not fit its layer.
    """
    if not isinstance(ranks, Mapping):
        raise ConfigError([f"ranks={ranks!r}: give a mapping of names or patterns to ranks."])
    problems: list[str] = []
    found = {}
    for pattern, given in ranks.items():
        refused = {n: why for n, why in left.items() if matches(n, [pattern])}
        if refused and not any(matches(n, [pattern]) for n in layers):
            problems.append(
                f"ranks: {pattern!r} matches {summary(refused)}, which cannot be compressed: leave it out."
            )
            continue
        for name in matching("ranks", [pattern], dict.fromkeys(layers), problems):
            layer = layers[name]
            fits: dict[str, Rank]
            if isinstance(layer, Stack):
                fits = {FORM: (layer.hidden - 1,)}
            else:
                fits = {form: about.full(layer) for form, about in forms_of(layer, moment(name)).items()}
            meant = _meant(f"ranks[{pattern!r}]={given!r}", given, name, fits)
            if isinstance(meant, str):
                problems.append(meant)
            else:
                found[name] = meant
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _meant(option: str, given: int | str, name: str, fits: Mapping[str, Rank]) -> tuple[str, Rank] | str:
    """Form and rank, or what is wrong; of the forms that fit the most that each rank can be."""
    if isinstance(given, int) and not isinstance(given, bool):
        form = next(iter(fits))
        rank: Rank = (given,)
    else:
        parsed = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", str(given))
        if parsed is None:
            return f"{option}: {GIVE}."
        form, rank = parsed[1], tuple(map(int, parsed[2].split("x")))
        if form not in fits:
            near = did_you_mean(form, fits) if form not in [*FORMS, FORM] else ""
            return f"{option}: {name} can have the forms {', '.join(fits)}.{near} Give one of them."
    full = fits[form]
    if len(rank) != len(full):
        return f"{option}: the form {form} has {counted(len(full), 'rank')}, outputs first: {GIVE}."
    if not all(1 <= r <= most for r, most in zip(rank, full, strict=True)):
        return f"{option}: the ranks of {name} go up to {'x'.join(map(str, full))}: give less, from 1 on."
    return form, rank
