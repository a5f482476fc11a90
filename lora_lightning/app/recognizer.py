"""A trained recognizer rebuilt from an adapter and its run, or from a recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.app.compose import recipe_config
from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.errors import UserError
from lora_lightning.files.allowed import target_of
from lora_lightning.files.locate import read_source
from lora_lightning.files.save_load import load_adapter

CTC = "lora_lightning.tasks.ctc.SpeechRecognizer"
SEQ2SEQ = "lora_lightning.tasks.seq2seq.Seq2SeqRecognizer"


def recognizer(
    adapter: str | None, recipe: str | None = None, check_base: bool = True
) -> tuple[nn.Module, list[str] | None]:
    """A CTC recognizer and its vocabulary; or Whisper, which has none for its texts.

    Args:
        adapter: an adapter's folder; None gives the recipe's model as it is.
        recipe: builds the model; None takes the run that the adapter lies in.
        check_base: refuse other base weights than those that the adapter was trained on.

    Raises:
        UserError: neither tells how the model is built, or it is neither.
        MissingFileError: weights that are not on this machine.
    """
    source = read_source(adapter) if adapter else None
    config: dict[str, Any] = recipe_config(recipe) if recipe else source.config() if source else {}
    if not config:
        raise UserError(
            f"adapter={adapter}: lies in no run of the training application, by which its model could be "
            "built: give recipe=NAME."
            if adapter
            else "no recognizer is named: give adapter=FOLDER, or recipe=NAME for its base."
        )  # fmt: skip
    where = f"recipe={recipe}" if recipe else str(adapter)
    task = (
        config["task"]["_target_"] if recipe or not source else target_of(config, "task", source.config_file)
    )
    if task not in (CTC, SEQ2SEQ):
        raise UserError(
            f"{where}: by its task ({task}) nothing is transcribed. Give one of task=ctc or task=seq2seq."
        )
    model, facts = rebuilt_model(config, source, own=bool(recipe))
    if task == CTC and "vocabulary" not in facts:
        raise UserError(
            f"{where}: its data, which decide the vocabulary, are not on this machine. "
            "Copy them here, or give an adapter, whose run keeps it."
        )
    if source:
        load_adapter(model, source.path, check_base=check_base)
    return model, list(facts["vocabulary"]) if task == CTC else None
