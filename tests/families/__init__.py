"""One case a setting of a layer family, models made of it, and the maths that it is held against."""

from .case import Case
from .convolutions import CONV, TRANSPOSED
from .general import GENERAL
from .models import (
    CASES,
    Model,
    adapted,
    base_model,
    by_groups,
    check_merging,
    config,
    equal,
    fill,
    floats,
    in_mode,
    loss,
    pickled_if_possible,
    reference,
    reference_run,
    run,
    same_flags,
)
from .selection import TYPICAL, compiled_cases, every_case, typical_cases
from .sequences import ATTENTION, EMBEDDING, RECURRENT

__all__ = [
    "ATTENTION",
    "CASES",
    "CONV",
    "EMBEDDING",
    "GENERAL",
    "RECURRENT",
    "TRANSPOSED",
    "TYPICAL",
    "Case",
    "Model",
    "adapted",
    "base_model",
    "by_groups",
    "check_merging",
    "compiled_cases",
    "config",
    "equal",
    "every_case",
    "fill",
    "floats",
    "in_mode",
    "loss",
    "pickled_if_possible",
    "reference",
    "reference_run",
    "run",
    "same_flags",
    "typical_cases",
]
