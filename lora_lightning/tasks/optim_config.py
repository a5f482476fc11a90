"""OptimConfig and ScheduleConfig: the options of optimizers and of their rates, which check themselves. Loads
nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lora_lightning.methods.rates import Rates
from lora_lightning.tasks.optimizers import KINDS, missing_library, untaken
from lora_lightning.utils.checks import Options, fields_of
from lora_lightning.utils.marks import Null, above, at_least, listed, number, one_of, show

PAIR = listed("two numbers between 0 and 1, such as [0.9, 0.999]", number(above(0, below=1)), count=2)
WARMUP = {"cosine": 0.1, "constant": 0.1, "onecycle": 0.3, "wsd": 0.1}  # by the schedule's name
BALANCED = {  # optimizers for which LoRA+ would be a second correction of the same thing
    "muon": "scales its steps by each matrix's own shape",
    "scaled_adamw": "balances the two factors itself",
}
FLOOR = {"cosine": 0.0, "wsd": 0.01}  # the others end where they are defined to


@dataclass
class ScheduleConfig(Options):
    """How the rate goes from step to step: up to its peak, and down again.

    Args:
        name: "cosine", a half cosine down to `floor` (Loshchilov and Hutter 2017, arXiv 1608.03983);
            "constant"; "onecycle", from 1/25 of the peak up and down to 1/250,000 of it, both along a half
            cosine (Smith and Topin 2017, arXiv 1708.07120, as torch's OneCycleLR); "wsd", constant and in the
            last steps down exponentially (Hu et al. 2024, arXiv 2404.06395).
        warmup: fraction of all steps in which the rate climbs to its peak, linearly but for "onecycle". None
            is 0.1, of "onecycle" 0.3.
        decay: fraction of all steps, the last ones, in which "wsd" falls.
        floor: where "cosine" and "wsd" end, as a fraction of the peak. None is 0 and 0.01.

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "the schedule"

    name: Annotated[str, one_of(*WARMUP)] = "cosine"
    warmup: Annotated[float | None, at_least(0, below=1), Null("the schedule's own")] = None
    decay: Annotated[float, above(0, below=1)] = 0.1
    floor: Annotated[float | None, at_least(0, below=1), Null("the schedule's own")] = None

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        return value if name == "name" else Rates.plain(name, value)

    @classmethod
    def apart(cls, options: Mapping[str, Any], prefix: str) -> Iterable[str]:
        name, floor, warmup = options["name"], options["floor"], options["warmup"]
        warmup = WARMUP[name] if warmup is None else warmup
        if floor is not None and name not in FLOOR:
            yield f"{prefix}floor={floor}: {name} ends where it is defined to; give null."
        if name == "wsd" and floor == 0:
            yield f"{prefix}floor=0: wsd falls exponentially, never to 0; 0.01 is usual."
        if name == "wsd" and warmup + options["decay"] > 1:
            yield (
                f"{prefix}decay={options['decay']}: with a warmup of {warmup} more than all steps; "
                f"give {1 - warmup:g} or less."
            )


@dataclass
class OptimConfig(Rates):
    """The optimizer, and the rate of each part; the rate is set anew at each step. Beside these options are
    those of Rates.

    Args:
        name: of the optimizer. Of torch: "adamw" (Loshchilov and Hutter 2019, arXiv 1711.05101), "adam",
            "sgd" with momentum. For updates: "scaled_adamw" (Zhang and Pilanci 2024, arXiv 2402.02347). Of
            timm: "lion" (Chen et al. 2023, arXiv 2302.06675), "lamb" (You et al. 2020, arXiv 1904.00962),
            "adafactor" (Shazeer and Stern 2018, arXiv 1804.04235), "muon" (Jordan et al. 2024) for matrices,
            with AdamW for the head and whatever is no matrix. Of bitsandbytes, with states in 8 bits
            (Dettmers et al. 2022, arXiv 2110.02861): "adamw8bit", "paged_adamw8bit", "sgd8bit", "lion8bit".
        betas: decay rates of the two running averages; None is the optimizer's own. So are the next four.
        eps: what is added to a divisor.
        momentum: of "sgd" and "muon".
        nesterov: whether that is Nesterov's.
        damping: δ of "scaled_adamw".
        schedule: the options of ScheduleConfig.

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "the optimizer"

    name: Annotated[str, one_of(*KINDS)] = "adamw"
    betas: Annotated[tuple[float, float] | None, PAIR, Null("the optimizer's own")] = None
    eps: Annotated[float | None, above(0), Null("the optimizer's own")] = None
    momentum: Annotated[float | None, at_least(0, below=1), Null("the optimizer's own")] = None
    nesterov: bool | None = None
    damping: Annotated[float | None, above(0, note="1e-6 is the paper's"), Null("the optimizer's own")] = None
    schedule: Annotated[ScheduleConfig | Mapping[str, Any] | None, fields_of(ScheduleConfig)] = None

    @property
    def rate_schedule(self) -> ScheduleConfig:
        """The schedule, which may be given as a plain mapping."""
        given = self.schedule
        return given if isinstance(given, ScheduleConfig) else ScheduleConfig(**(given or {}))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule = self.rate_schedule

    @classmethod
    def of(cls, given: OptimConfig | Mapping[str, Any] | None) -> OptimConfig:
        """What a task was given, which may be a plain mapping, or None for the defaults."""
        return given if isinstance(given, OptimConfig) else cls(**(given or {}))

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        """Numbers, and a tuple of the list that YAML has."""
        if name == "name":
            return value
        if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
            return tuple(Rates.plain(name, each) for each in value)
        return Rates.plain(name, value)

    @classmethod
    def apart(cls, options: Mapping[str, Any], prefix: str) -> Iterable[str]:
        name, written = options["name"], show if prefix else repr
        if lacks := missing_library(name):
            yield f"{prefix}name={written(name)}: {lacks}"
        for option in untaken(name, options):
            takes = ", ".join(KINDS[name].takes) or "rates and decay alone"
            yield (
                f"{prefix}{option}={written(options[option])}: {name} has no {option}: leave it out; it has "
                f"{takes}."
            )
        if name in ("sgd", "sgd8bit", "muon") and options["nesterov"] and options["momentum"] == 0:
            yield f"{prefix}nesterov={written(True)}: is of a momentum: give {prefix}momentum above 0."
        if options["lora_plus"] is not None and name in BALANCED:
            yield (
                f"{prefix}lora_plus={written(options['lora_plus'])}: {name} {BALANCED[name]}; give null, or "
                "another optimizer."
            )


OptimOptions = Annotated[OptimConfig | Mapping[str, Any] | None, fields_of(OptimConfig)]
