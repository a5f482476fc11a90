"""LoRAConfig: what to adapt and how. It checks itself and reports every problem in one error."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Annotated, Any

from typing_extensions import NotRequired

from lora_lightning.errors import ConfigError
from lora_lightning.utils.checks import Options
from lora_lightning.utils.marks import (
    Check,
    Null,
    Show,
    above,
    at_least,
    either,
    number,
    one_of,
    path,
    weights_of,
    whole,
)
from lora_lightning.utils.pattern_kinds import problem
from lora_lightning.utils.peft_names import ALL_LINEAR, NAMES, peft_problem

OFF_ZERO = ("pissa", "pissa_fast", "milora", "olora")  # inits with B·A that is not zero, which is taken off
SCALING = 2  # of an update where nothing else is asked for
MEETING = 8  # the rank at which it is so with `use_rslora`
RANK = at_least(1, note="4 to 32 are usual")
REGULARIZERS = ("frobenius", "l2", "orthogonal", "heads", "outputs")  # terms R of the objective L + λ·R
RANKS = either(
    whole(RANK), 'or "auto", or a share of the energy such as "energy:0.95"', words=("auto",), share="energy"
)
EVEN = 8  # the rank that rank="auto" shares out anew where no budget is given
BY_INPUTS = ("eva",)  # inits that begin from the layers' inputs
BY_GRADIENTS = ("lora_one",)  # and from the gradients of their weights


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _names(allowed: str) -> Check:
    """A mark: names of modules, as a list or as one regular expression."""

    def test(value: Any) -> bool:
        return _is_name(value) or (isinstance(value, list) and bool(value) and all(map(_is_name, value)))

    def details(name: str, value: Any, show: Show) -> list[str]:
        if value == ALL_LINEAR:
            return [f"{name}={show(value)} is PEFT's: here 'all' is every supported layer but the head."]
        if isinstance(value, list):
            return [f"{name}: {v!r} {wrong}." for v in value if (wrong := problem(v))][:1]
        try:
            re.compile(value)
        except re.error as error:
            told = f"is not a regular expression: {error}. For suffixes or globs give a list."
            return [f"{name}={show(value)} {told}"]
        return []

    return Check(allowed, test, details=details)


def _by_name(each: Check) -> Check:
    """A mark: numbers by names of modules."""

    def test(value: Any) -> bool:
        return isinstance(value, dict) and all(map(_is_name, value))

    def details(name: str, value: Any, show: Show) -> list[str]:
        numbers = [p for key, v in value.items() for p in each.problems(f"{name}[{show(key)}]", v, show)]
        return numbers + [f"{name}: {key!r} {wrong}." for key in value if (wrong := problem(key))]

    return Check("a mapping of layer names to numbers, such as {qkv: 16}", test, details=details)


def _named(cls: type[LoRAConfig]) -> type[LoRAConfig]:
    """Let a name that is no option be one more problem of the configuration, not Python's TypeError."""
    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self: LoRAConfig, *values: Any, **options: Any) -> None:
        if not options.keys() <= cls.__dataclass_fields__.keys():
            raise ConfigError(cls.problems(options))
        plain(self, *values, **options)

    signature = inspect.signature(cls)
    cls.__signature__ = signature  # type: ignore[attr-defined]  # where `inspect` looks first
    # LightningCLI hands over only what a signature has: with PEFT's names in it, the message is ours.
    theirs = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=NotRequired[Any]) for n in NAMES
    ]
    own = inspect.signature(plain).parameters.values()
    __init__.__signature__ = signature.replace(parameters=[*own, *theirs])  # type: ignore[attr-defined]  # the same
    cls.__init__ = __init__  # type: ignore[method-assign]  # the dataclass's own, wrapped
    return cls


@_named
@dataclass
class LoRAConfig(Options):
    """What is adapted, at which rank, and what else trains.

    Names and meanings follow PEFT's `LoraConfig` where it has them; `rank` is PEFT's `r` and `alpha`
    its `lora_alpha`. Its other names are refused with ours.

    Args:
        rank: r, the rank of the updates, at least 1; of a layer with a smaller side that side. By data:
            "auto", the ranks that explain most of the variance of the layers' inputs (Paischer et al. 2024,
            arXiv 2410.07170) within `budget`, or "energy:0.95", of each layer the rank that explains so much
            of it; of the gradients (He et al. 2025, arXiv 2502.12171) where `init` begins from these.
        budget: of rank="auto": parameters of all updates, or below 1 a share of the model's. None is what a
            rank of 8 everywhere would cost.
        rho: with rank="auto" no layer has more than rho times the rank that all could have.
        data_batches: batches of the training data that ranks and inits by data see.
        alpha: numerator of the scaling alpha / rank, with the layer's own rank; None means 2 * rank, and with
            `use_rslora` 2 * sqrt(8): a scaling of 2, there at rank 8.
        target_modules: "auto" (by the model's structure), "all" (every supported layer but the head),
            a list of names, or one regular expression that matches whole names. A name in a list is a
            whole one or an ending after a dot (`qkv`, `attn.qkv`), a glob (it has `*`, `?` or `[`), or a
            regular expression for either (it has one of `^ $ \\ ( ) | + { }`, or begins with `.*`).
        detector_part: the part of a detector to which `target_modules` is confined: "backbone", "neck" (with
            the feature pyramid) or "all" (with the RPN, the RoI heads, the towers of a head). None is "neck"
            for "auto" in torchvision's detectors, else "all".
        exclude_modules: layers to leave alone: a list of names, or a regular expression.
        modules_to_save: modules trained in full and saved with the adapter, and not adapted: "auto" finds
            the head; a list of names, "auto" among them for the head too, and also of parameters that belong
            to no layer, such as `pos_embed`; None for none.
        backbone: name of the submodule to adapt and freeze; what lies outside it stays as it was.
            None takes `model.backbone` if there is one, else the whole model.
        rank_pattern: a name as in the lists -> rank. The most specific that matches wins: a plain name
            before a glob or a regular expression, then the one with more letters and digits.
        alpha_pattern: the same for alpha.
        dropout: probability of dropping an entry of the update's input, in [0, 1).
        init: how A and B begin: "default" (A Kaiming uniform, as nn.Linear, B zero), "gaussian" (A of std
            1 / rank, B zero), "orthogonal" (both random, B·A zero); or in the singular vectors of W:
            "pissa" (the largest; Meng et al. 2024, arXiv 2404.02948, equations 2 to 4), "pissa_fast" (the
            same, by a randomized SVD), "milora" (the smallest; Wang et al. 2024, arXiv 2406.09044, section
            3.2), "olora" (in the QR decomposition of W; Büyükakyüz 2024, arXiv 2406.01775, section 3). Of
            these four B·A is not zero, and is taken off by factors that never train, at once as many numbers
            more. By data: "eva" (A in the leading singular vectors of the layer's inputs, B zero, arXiv
            2410.07170). The outputs do not change at injection, but with "lora_one": that begins, by data,
            with the best approximation of a step down the gradient (Zhang et al. 2025, arXiv 2502.01235).
        restarts: how often, evenly spread over the training, what was learned is put aside into factors that
            never train, and A and B begin anew, with the optimizer's state of them; the update ends with rank
            r·(1 + restarts) (ReLoRA, Lialin et al. 2023, arXiv 2307.05695, equation 1).
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2): the best
            rate is then nearly the same at every rank.
        use_dora: train a magnitude for each output beside the direction (Liu et al. 2024,
            arXiv 2402.09353, equation 5).
        regularizer: terms R of the objective L + λ·R that the callback trains by, each with its weight λ:
            "frobenius", the squared size of the updates; "l2", of their factors; "orthogonal", how alike the
            directions in a factor are; "heads", the squared way of heads, norms and biases from the base;
            "outputs", how far the updates move the outputs. `methods.regularizers` has the equations.
        train_bias: "none", "all" (every bias in the backbone) or "lora_only" (of adapted layers).
        train_norm: normalization layers: "frozen", "affine" (weight and bias train), "stats" (running
            statistics move) or "both".
        fold_norms: fold the frozen BatchNorm behind an adapted convolution into its weight for each step of
            training, where nothing else reads what is between them: no pass over the activations forward or
            backward, equal to 1e-5 and not bit for bit.
        implementation: how adapted layers compute: "auto" (the fast functions, which make some inputs again
            in the backward instead of saving them), "keep_inputs" (without the latter), "reference" (plain
            autograd: slower, larger, the same results) or "fused" (linear layers by Triton's kernels, which
            no GPU has run yet; the rest as "auto").

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "LoRA"

    rank: Annotated[int | str, RANKS] = 8
    alpha: Annotated[float | None, above(0), Null("twice the rank, with use_rslora 2·√8")] = None
    target_modules: Annotated[
        str | list[str], _names('"auto", "all", a list of names or globs, or a regex')
    ] = "auto"
    detector_part: Annotated[str | None, one_of("backbone", "neck", "all")] = None
    exclude_modules: Annotated[str | list[str] | None, _names("a list of names or globs, or a regex")] = None
    modules_to_save: Annotated[
        str | list[str] | None, _names('"auto", or a list of names or globs with "auto" for the head')
    ] = "auto"
    backbone: Annotated[str | None, path("the name of a submodule, such as 'encoder'")] = None
    rank_pattern: Annotated[dict[str, int], _by_name(whole(RANK))] = field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float], _by_name(number(above(0)))] = field(default_factory=dict)
    budget: Annotated[float | None, above(0), Null("what a rank of 8 costs")] = None
    rho: Annotated[float, at_least(1)] = 2.0
    data_batches: Annotated[int, at_least(1)] = 8
    dropout: Annotated[float, at_least(0, below=1, noun="a probability")] = 0.0
    init: Annotated[
        str, one_of("default", "gaussian", "orthogonal", *OFF_ZERO, *BY_INPUTS, *BY_GRADIENTS)
    ] = "default"
    restarts: Annotated[int, at_least(0, note="1 to 4 are usual")] = 0
    use_rslora: bool = False
    use_dora: bool = False
    regularizer: Annotated[dict[str, float], weights_of(*REGULARIZERS)] = field(default_factory=dict)
    train_bias: Annotated[str, one_of("none", "all", "lora_only")] = "none"
    train_norm: Annotated[str, one_of("frozen", "affine", "stats", "both")] = "frozen"
    fold_norms: bool = False
    implementation: Annotated[str, one_of("auto", "keep_inputs", "reference", "fused")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if found := _apart(vars(self)):
            raise ConfigError(found)

    @classmethod
    def problems(cls, options: Mapping[str, Any], prefix: str = "", beside: Iterable[str] = ()) -> list[str]:
        return super().problems(options, prefix, beside) + _apart(options, prefix)

    @classmethod
    def apart(cls, options: Mapping[str, Any], prefix: str) -> Iterable[str]:
        if options["budget"] is not None and options["rank"] != "auto":
            budget, rank = options["budget"], options["rank"]
            yield f'{prefix}budget={budget}: {prefix}rank={rank} needs none: give rank="auto", or no budget.'
        if options["init"] in BY_GRADIENTS and options["use_dora"]:
            yield (
                f"{prefix}init={options['init']}: it begins with a step of the weights, and use_dora with "
                "their directions: set use_dora to false, or give another init."
            )

    @property
    def by_data(self) -> str:
        """What is decided from data, as the options say it: `rank="auto", init="eva"`; "" for nothing."""
        words = [f"rank={self.rank!r}"] if isinstance(self.rank, str) else []
        words += [f"init={self.init!r}"] if self.init in (*BY_INPUTS, *BY_GRADIENTS) else []
        return ", ".join(words)

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        # what Hydra and sweeps hand over; terms of weight zero are none
        if name == "regularizer" and isinstance(value, Mapping):
            plain = {k: _plain_number(v) for k, v in value.items()}
            return {k: v for k, v in plain.items() if k not in REGULARIZERS or v != 0 or isinstance(v, bool)}
        if name == "regularizer" and value is None:
            return {}
        if name.endswith("_pattern"):
            if value is None:
                return {}
            return {k: _plain_number(v) for k, v in value.items()} if isinstance(value, Mapping) else value
        return _plain_list(_plain_number(value))

    @classmethod
    def stray(cls, name: str, value: Any, prefix: str, known: Sequence[str]) -> str:
        return peft_problem(name, value, prefix) or super().stray(name, value, prefix, known)

    def fixed_rank(self, rank: int) -> int:
        """Rank of the part of an update that never trains.

        Args:
            rank: of what trains.
        """
        return rank * (self.restarts + (self.init in OFF_ZERO))

    def default_alpha(self, rank: int) -> float:
        """alpha where none is given. With `use_rslora` it is one for every rank, as in its paper, so that the
        best rate is nearly the same, too.

        Args:
            rank: of an update.
        """
        return SCALING * math.sqrt(MEETING) if self.use_rslora else SCALING * rank

    def scaling(self, rank: int, alpha: float | None) -> float:
        """s in W + s B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

        Args:
            rank: of an update.
            alpha: None is `default_alpha(rank)`.
        """
        alpha = self.default_alpha(rank) if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


UNFOLDABLE = {  # option -> values with which no norm can be folded, and the one that is needed
    "train_norm": (("affine", "stats", "both"), "frozen"),
    "implementation": (("reference",), "auto"),
}


def _apart(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each option that does not go together with another."""
    faults = (_unfoldable, _undroppable, _drawn_off)
    return [line for fault in faults for line in fault(options, prefix)]


def _undroppable(options: Mapping[str, Any], prefix: str) -> list[str]:
    restarts, dropout = options.get("restarts"), options.get("dropout")
    if not (isinstance(restarts, int) and isinstance(dropout, float) and restarts > 0 and dropout > 0):
        return []
    return [
        f"{prefix}restarts={restarts}: with {prefix}dropout={dropout} what was learned before a restart "
        "would be dropped, too, which the method has as a part of the weight: set one of them to 0."
    ]


def _drawn_off(options: Mapping[str, Any], prefix: str) -> list[str]:
    terms, init = options.get("regularizer"), options.get("init")
    if not (isinstance(terms, Mapping) and terms.get("l2") and init in OFF_ZERO):
        return []
    return [
        f"{prefix}regularizer.l2={terms['l2']} draws A and B to zero, and with {prefix}init={init!r} that "
        "takes s·B0·A0 off the weight: give frobenius, of the whole update, or another init."
    ]


def _unfoldable(options: Mapping[str, Any], prefix: str) -> list[str]:
    """One line for each option that does not go together with `fold_norms`."""
    if options.get("fold_norms") is not True:
        return []
    return [
        f"{prefix}fold_norms=True folds no norm with {prefix}{name}={options[name]!r}: set {name} to "
        f"{needed!r}, or fold_norms to false."
        for name, (values, needed) in UNFOLDABLE.items()
        if options.get(name) in values
    ]


def _plain_number(value: Any) -> Any:
    """numpy's numbers, as sweeps draw them, as Python's."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _plain_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):  # else each process would have an order of its own
        return sorted(value, key=str)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return list(value)
    return value
