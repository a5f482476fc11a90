"""Which data `evaluate` tests on, and how they are read."""

import pytest

from lora_lightning.app.evaluation_data import _section
from lora_lightning.app.trained import Trained


@pytest.mark.parametrize(
    ("task", "spelled"), [("ctc.CTCRecognizer", ["a", "b"]), ("seq2seq.Seq2SeqRecognizer", None)]
)
def test_only_a_model_of_letters_is_bound_to_those_that_it_was_trained_on(task, spelled):
    config = {"task": {"_target_": f"lora_lightning.tasks.{task}"}}
    trained = Trained(None, config, own=True, facts={"vocabulary": ["a", "b"]})
    section = _section(trained, ["data=manifest", "data.manifest=other.csv"])
    assert section.get("vocabulary") == spelled and section["test_share"] == 1
