"""LoRAConfig: defaults, plain types, every problem in one error."""

import json

import numpy as np
import pytest

import lora_lightning as ll
from lora_lightning.layers.factors import INITS as RANDOM
from lora_lightning.methods.data_inits import BY_DATA
from lora_lightning.methods.inits import INITS
from lora_lightning.utils.checks import checks_of


def test_defaults_are_valid_and_plain():
    config = ll.LoRAConfig()
    assert config.scaling(8, None) == 2.0
    assert ll.LoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_what_sweeps_and_sets_hand_over_is_plain():
    """numpy's numbers are Python's, and a set has the same order in every process."""
    given = ll.LoRAConfig(
        rank=np.int64(4), alpha=np.float32(8), dropout=np.float64(0.5), rank_pattern={"qkv": np.int32(2)},
        target_modules={"qkv", "fc1", "proj"},
    )  # fmt: skip
    plain = ll.LoRAConfig(
        rank=4, alpha=8.0, dropout=0.5, rank_pattern={"qkv": 2}, target_modules=["fc1", "proj", "qkv"]
    )
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())


def test_the_beginnings_are_those_that_updates_know():
    assert checks_of(ll.LoRAConfig)["init"].names == (*RANDOM, *INITS, *BY_DATA)


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scaling"),
    [
        (4, None, False, 2.0),
        (4, 4, False, 1.0),
        (16, 8, True, 2.0),
        (8, None, True, 2.0),
        (32, None, True, 1.0),
    ],
)
def test_scaling(rank, alpha, rslora, scaling):
    assert ll.LoRAConfig(use_rslora=rslora).scaling(rank, alpha) == pytest.approx(scaling, rel=1e-15)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("rank", 0, "at least 1"),
        ("rank", "abc", "whole number"),
        ("rank", 2.0, "whole number"),
        ("rank", True, "whole number"),
        ("alpha", -1, "above 0"),
        ("alpha", float("nan"), "above 0"),
        ("dropout", 1.0, "below 1"),
        ("dropout", "half", "probability"),
        ("init", "gausian", "Did you mean 'gaussian'"),
        ("train_bias", "lora", "lora_only"),
        ("train_norm", "afine", "Did you mean 'affine'"),
        ("target_modules", [], '"auto", "all"'),
        ("target_modules", [1], '"auto", "all"'),
        ("target_modules", "(qkv", "not a regular expression"),
        ("modules_to_save", 3, "null"),
        ("backbone", "", "submodule"),
        ("rank_pattern", [4], "mapping"),
        ("rank_pattern", {"qkv": 0}, r"rank_pattern\['qkv'\]=0"),
        ("alpha_pattern", {"qkv": "x"}, r"alpha_pattern\['qkv'\]='x'"),
        ("use_dora", "yes", "true or false"),
        ("regularizer", "l2", "mapping to weights"),
        ("regularizer", {"l3": 1}, "Did you mean 'l2'"),
        ("regularizer", {"l2": -1}, r"regularizer.l2=-1: give a finite weight of at least 0"),
        ("regularizer", {"l2": float("inf")}, "finite"),
        ("regularizer", {"l2": True}, "finite"),
    ],
)
def test_bad_values_name_the_option_the_value_and_what_is_allowed(option, value, allowed):
    with pytest.raises(ll.ConfigError, match=allowed) as caught:
        ll.LoRAConfig(**{option: value})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(option)


def test_terms_of_weight_zero_are_none():
    assert ll.LoRAConfig(regularizer={"l2": 0.0, "heads": np.float32(1)}).regularizer == {"heads": 1.0}
    assert ll.LoRAConfig(regularizer=None) == ll.LoRAConfig()
    assert len(ll.LoRAConfig.problems({"regularizer": {"frobenus": 0, "l2": -1, "heads": "x"}})) == 3


def test_all_problems_come_together():
    problems = ll.LoRAConfig.problems({"rank": 0, "dropout": 2, "init": "x", "rnk": 3})
    assert len(problems) == 4
    assert "rnk=3 is not an option of LoRA. Did you mean 'rank'?" in problems[0]
    assert ll.LoRAConfig.problems({"rank": 4}) == []
