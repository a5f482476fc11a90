"""The data that `lora-lightning evaluate` tests on: those of the run, or others that the user names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lora_lightning.app.build import named as named_problems
from lora_lightning.app.compose import shipped
from lora_lightning.app.rebuild import build, builder_of
from lora_lightning.app.trained import Trained, changed
from lora_lightning.errors import ConfigError, UserError, did_you_mean
from lora_lightning.files.allowed import BUILDERS, section_of

GROUP = "data="
OF_TRAINING = ("shots", "imbalance", "progressive", "train_minutes", "augment")  # which no test needs
SHARE = "test_share"  # of data that split themselves; 1 tests on all
WRITES_ALL = "Seq2SeqRecognizer"  # has a tokenizer: the vocabulary is but that of its texts
COCO = "lora_lightning.data.coco.CocoFormatDataModule"


def test_data(trained: Trained, words: Sequence[str]) -> L.LightningDataModule:
    """The data, prepared: what is wrong with them is told now.

    Args:
        words: `data=NAME` and `data.key=value`; none takes the run's own.

    Raises:
        ConfigError, UserError: they cannot be built, or are not on this machine.
    """
    section = _section(trained, words)
    with named_problems("data"):
        if section["_target_"] in BUILDERS["data"]:
            data = build(*section_of({"data": section}, "data", trained.where))
        elif trained.own:
            data = instantiate(OmegaConf.create(section), _convert_="all")
        else:
            section_of({"data": section}, "data", trained.where)  # which refuses it
        data.prepare_data()
    return data


def data_or_problems(
    trained: Trained, words: Sequence[str], problems: list[str]
) -> L.LightningDataModule | None:
    """The data as of `test_data`; or None, and a line for each reason why they are not here."""
    try:
        return test_data(trained, words)
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    return None


def _section(trained: Trained, words: Sequence[str]) -> dict[str, Any]:
    chosen = [word.removeprefix(GROUP) for word in words if word.startswith(GROUP)]
    section = _group(chosen[-1]) if chosen else _of_run(trained)
    if "_target_" not in section:
        raise ConfigError(
            ["data: the run does not say on which it was tested: give data=NAME data.KEY=VALUE."]
        )
    options = [word for word in words if not word.startswith(GROUP)]
    given = {word.partition("=")[0].lstrip("+").removeprefix("data.") for word in options}
    section = changed({"data": section}, options)["data"] if options else section
    if not words:
        return section
    takes = inspect.signature(builder_of(section["_target_"])).parameters
    facts = dict(trained.facts or {})
    if str(trained.config.get("task", {}).get("_target_")).endswith(WRITES_ALL):
        facts.pop("vocabulary", None)
    return section | {k: v for k, v in _fitted(section, given, facts).items() if k in takes}


def _of_run(trained: Trained) -> dict[str, Any]:
    """The run's own, which knows where its data lie; what travels with an adapter does not."""
    own = trained.source.run_data() if trained.source and not trained.own else None
    return dict(own or trained.config.get("data") or {})


def _group(name: str) -> dict[str, Any]:
    """The section that `data=NAME` chooses, alone."""
    names = shipped().choices("data")
    if name not in names:
        raise ConfigError([f"data={name}: give one of {', '.join(names)}.{did_you_mean(name, names)}"])
    config = shipped().compose_groups(["~recipe", f"data={name}"])
    if isinstance(config, str):
        raise ConfigError([f"data={name}: {config}"])
    plain: Any = OmegaConf.to_container(config.data, resolve=True)
    return dict(plain)


def _fitted(section: Mapping[str, Any], given: set[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Options of other data that follow from what is tested, where the user has not given them: all of their
    samples are test samples, shown and spelled as the model knows them."""
    found: dict[str, Any] = dict.fromkeys(OF_TRAINING)
    found[SHARE] = 1
    if "input_size" in facts and facts["input_size"][1] == facts["input_size"][2]:
        found["image_size"] = facts["input_size"][1]
    if "crop_pct" in facts:
        found["crop_pct"] = facts["crop_pct"]
    if "target" in facts and section.get("table"):
        found["target"] = facts["target"]
    if "vocabulary" in facts:
        found["vocabulary"] = list(facts["vocabulary"])
    if section["_target_"] == COCO:  # tests on these alone
        for part in ("train", "val"):
            for kind in ("images", "annotations"):
                found[f"{part}_{kind}"] = section.get(f"test_{kind}") or section.get(f"{part}_{kind}")
    return {name: value for name, value in found.items() if name not in given}
