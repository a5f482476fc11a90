"""The methods by their one word: what each is called, what of the model trains, which options of the group
`lora` it uses. How a model is prepared for one is in `prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from lora_lightning.config import BY_GRADIENTS, BY_INPUTS, LoRAConfig
from lora_lightning.utils.marks import show

HEAD = frozenset({"modules_to_save", "backbone"})  # options that say where the head is
OPTIONS = frozenset(field.name for field in fields(LoRAConfig)) | {"quantize", "spectra"}
PEFT_MISSING = "PEFT is not installed: pip install 'lora-lightning[peft]'"


class Method(NamedTuple):
    """What there is to know of a method before torch is loaded."""

    label: str
    trains: str
    options: frozenset[str] = HEAD  # of the group `lora`


METHODS = {
    "none": Method("before adaptation", "nothing: the base is tested", frozenset()),
    "linear_probe": Method("linear probe", "the head alone"),
    "norm_only": Method("norms only", "weights and biases of normalization layers, and the head"),
    "bitfit": Method("BitFit", "biases, and the head"),
    "peft": Method(
        "LoRA by PEFT",
        "updates of PEFT's",
        OPTIONS - {"quantize", "spectra", "implementation", "fold_norms", "regularizer", "restarts"},
    ),
    "lora": Method("LoRA", "updates", OPTIONS),
    "full": Method("full fine-tuning", "everything", frozenset()),
}
RANKED = frozenset({"lora", "peft"})  # have a rank
OF_UPDATES = frozenset({"lora_plus", "damping"})  # options of the group `optim` for these alone
SCALED = "scaled_adamw"  # the optimizer for these alone; the others have AdamW in its place
SCRATCH = "from scratch"  # what full fine-tuning is called on random weights
ADAPTING = ("linear_probe", "norm_only", "bitfit", "peft", "lora")  # leave an adapter, and the base as it was


def compared(method: str, others: Iterable[str] | None) -> list[str]:
    """The methods of the final table in its order: those of `compare`, the run's own among them or last."""
    named = list(others or ())
    return named if method in named else [*named, method]


def method_problems(values: Mapping[str, Any]) -> list[str]:
    """What the methods of a resolved configuration lack here."""
    chosen = _chosen(values.get("method"), values.get("compare"))
    tune = values.get("tune")
    if tune and chosen == {"none"}:
        return [f"tune={show(tune)}: method=none trains nothing; give another method, or tune=null."]
    words = tune if isinstance(tune, (str, list, tuple)) else ()
    if "rank" in words and chosen <= METHODS.keys() and not chosen & RANKED:
        return [f"tune={show(tune)}: method={values['method']} has no rank; give tune=lr."]
    optim = values.get("optim")
    if isinstance(optim, Mapping) and optim.get("name") == SCALED and not chosen & RANKED:
        return [f"optim.name={SCALED}: method={values['method']} has no updates; give optim=adamw."]
    if "rank" in words and isinstance(_lora(values, "rank"), str):
        return [
            f"tune={show(tune)}: lora.rank={_lora(values, 'rank')} is decided by data: give lora.rank=NUMBER "
            "to begin with, or tune=lr."
        ]
    if "peft" in chosen and (problem := _by_data(values)):
        return [problem]
    if "peft" not in chosen or find_spec("peft") is not None:
        return []
    return [
        f"method={values['method']}: {PEFT_MISSING}"
        if values["method"] == "peft"
        else f"compare: {PEFT_MISSING}"
    ]


def unused_option(key: str, method: Any, others: Any) -> str | None:
    """Why an option that was given would change nothing, or None where it does, or where a method is unknown.

    Args:
        key: dotted, such as lora.rank.
        method: of the run.
        others: those that it is compared with.
    """
    words = [method, *others] if isinstance(others, (list, tuple)) else [method]
    listed = others is None or isinstance(others, (list, tuple))
    if not listed or not all(isinstance(word, str) and word in METHODS for word in words):
        return None
    chosen = set(words)
    section, _, name = key.partition(".")
    if section == "lora":
        used = not name or any(name.split(".")[0] in METHODS[m].options for m in chosen)
    elif section == "optim":
        used = method != "none" if name in ("lr", "head_lr") else chosen != {"none"}
        used &= name not in OF_UPDATES or bool(chosen & RANKED)
    elif section == "rates":
        used = name in chosen
    else:
        return None
    if used:
        return None
    beside = f" compare=[{','.join(others)}]" if others else ""
    return f"method={method}{beside} does not use it; leave it out, or give another method."


def _by_data(values: Mapping[str, Any]) -> str | None:
    """Why PEFT cannot train what data decide in our own callback."""
    words = [f"lora.rank={_lora(values, 'rank')}"] if isinstance(_lora(values, "rank"), str) else []
    if _lora(values, "init") in (*BY_INPUTS, *BY_GRADIENTS):
        words.append(f"lora.init={_lora(values, 'init')}")
    if not words:
        return None
    where = "method=peft" if values.get("method") == "peft" else "compare has peft"
    return (
        f"{where}: {' and '.join(words)} {'are' if len(words) > 1 else 'is'} decided by data in method=lora "
        "alone: give lora.rank=NUMBER and an init that needs none, or leave peft out; the ranks that "
        "method=lora has printed may be given as lora.rank_pattern."
    )


def _lora(values: Mapping[str, Any], name: str) -> Any:
    group = values.get("lora")
    return group.get(name) if isinstance(group, Mapping) else None


def _chosen(method: Any, others: Any) -> set[str]:
    """What is no word is told by the check of `method` and `compare`."""
    words = (method, *(others if isinstance(others, (list, tuple)) else ()))
    return {word for word in words if isinstance(word, str)}
