"""`lora-lightning extract`: an adapter made of a fine-tuned model's weights and those of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.app.rebuild import compression_of, rebuilt_model
from lora_lightning.app.shrink import folder_problem
from lora_lightning.app.trained import Trained, named
from lora_lightning.errors import UserError
from lora_lightning.files.extract import extract_lora
from lora_lightning.files.locate import AdapterSource
from lora_lightning.files.origin import Origin
from lora_lightning.files.random_base import is_random
from lora_lightning.files.save_load import save_adapter
from lora_lightning.files.tuned import refuse_adapter, tuned_state
from lora_lightning.files.weights import load_into, network_state
from lora_lightning.methods.shortening import one_limit
from lora_lightning.planning.heads import find_heads
from lora_lightning.utils.names import inside

RECIPE = "recipe="


def extract(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Write the adapter of a fine-tuned model.

    Args:
        options: of the command `extract`, by name.
        words: `recipe=NAME key=value …`, which builds the base; none takes what the run of the fine-tuned
            weights says.

    Returns:
        What was kept and lost, as a table.

    Raises:
        UserError: every mistake in one message, before the base is built; the base cannot be built or is not
            the one that was tuned.
        WriteError: the folder cannot be written.
    """
    rank, energy = options.get("rank"), options.get("energy")
    out = Path(options["out"]).expanduser()
    problems = [
        p
        for p in (one_limit(rank=rank, energy=energy), folder_problem(out, bool(options.get("overwrite"))))
        if p
    ]
    refuse_adapter(options["tuned"])
    of_recipe = any(word.startswith(RECIPE) for word in words)
    tuned: Any = options["tuned"]
    trained = named({} if of_recipe else {"adapter": tuned}, words, problems)
    if trained and isinstance(trained.source, AdapterSource):
        problems.append(
            f"tuned={tuned}: holds an adapter already: take that, or give weights without one."
        )  # in a Trainer's checkpoint
    if problems or trained is None:
        raise UserError("\n".join(problems))
    if trained.source:
        tuned = trained.source.weights  # type: ignore[union-attr]  # no adapter
    model, facts = _base(trained, options.get("base"))
    told = extract_lora(model, tuned, rank=rank, energy=energy)
    origin = trained.source.origin() if trained.source else _origin(trained, words, facts)
    save_adapter(model, out, format=options.get("format", "lora_lightning"), origin=origin)
    return f"{told}\n{out}: {told.parameters:,} parameters of {len(told.layers)} updates"


def _base(trained: Trained, base: str | None) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network with the weights that it had before it was tuned, in eval mode; and the facts.

    Raises:
        UserError: it cannot be built, or began with random weights that nobody has kept.
    """
    source = trained.source
    if base is None and source and compression_of(source):
        raise UserError(
            f"tuned={source.path}: its base was made smaller before it was tuned, and was not kept: give "
            "base=FILE, its weights as they were then."
        )
    replaced = base is not None
    model, facts = rebuilt_model(trained.config, source, trained.facts, replaced, own=trained.own)
    if base is not None:
        state, where = tuned_state(base)
        given, own = network_state(model, state), model.state_dict()
        fresh = [
            head
            for head in find_heads(model)
            if any(inside(n, [head]) and n in own and own[n].shape != t.shape for n, t in given.items())
        ]
        load_into(model, state, where, "the base as it is built", "Give the weights that were tuned.", fresh)
    elif is_random(trained.config["model"], model):
        raise UserError(
            "the base began with random weights, which were not kept, and full fine-tuning of those is no "
            "update: give base=FILE, the weights that were tuned."
        )
    return model.eval(), facts


def _origin(trained: Trained, words: Sequence[str], facts: Mapping[str, Any]) -> Origin:
    recipe = next(word.partition("=")[2] for word in words if word.startswith(RECIPE))
    return Origin.of_run(recipe, trained.config, facts)
