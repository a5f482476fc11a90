"""docs/from_peft.md has every option and call of the PEFT that is installed, and says of each what is so."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import timm
from torch import nn

import lora_lightning as ll
from lora_lightning.planning.peft_config import config_of
from lora_lightning.utils.peft_names import RENAMED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.lora import LoraModel

PAGE = (Path(__file__).parents[2] / "docs" / "from_peft.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \| (taken|ignored|refused)", PAGE, re.MULTILINE)
GIVEN = {  # a value that is not the default
    "task_type": "SEQ_CLS", "peft_type": "LORA", "auto_mapping": {"a": "b"}, "inference_mode": True, "r": 4,
    "target_modules": ["fc"], "exclude_modules": ["x"], "lora_alpha": 4, "lora_dropout": 0.1, "bias": "all",
    "fan_in_fan_out": True, "use_rslora": True, "use_dora": True, "modules_to_save": ["head"],
    "init_lora_weights": "gaussian", "layers_to_transform": [0, 1], "layers_pattern": "blocks",
    "rank_pattern": {"qkv": 4}, "alpha_pattern": {"qkv": 4}, "trainable_token_indices": [1],
    "qalora_group_size": 8, "alora_invocation_tokens": [1], "use_qalora": True, "lora_bias": True,
    "target_parameters": ["x"], "layer_replication": [[0, 1]], "ensure_weight_tying": True,
}  # fmt: skip
TEXTS = ("peft_version", "base_model_name_or_path", "revision", "megatron_core")


def done_with(name: str) -> str:
    plain = peft.LoraConfig(target_modules=["qkv"]).to_dict()
    value = GIVEN.get(name, "another" if name in TEXTS else {"a": "mapping"})
    try:
        return "ignored" if config_of({**plain, name: value}) == config_of(plain) else "taken"
    except ll.ConfigError:
        return "refused"


def test_every_option_once():
    assert sorted(name for name, _, _ in ROWS) == sorted(f.name for f in dataclasses.fields(peft.LoraConfig))


@pytest.mark.parametrize(("name", "ours", "says"), ROWS, ids=[row[0] for row in ROWS])
def test_what_is_said_of_an_option(name, ours, says):
    assert done_with(name) == says
    here = RENAMED.get(name, name if name in ll.LoRAConfig.__dataclass_fields__ else "")
    assert f"`{here}`" in ours if here else True


def test_every_call():
    public = {n for c in (peft.PeftModel, LoraModel) for n in dir(c) if not n.startswith("_")}
    public -= set(dir(nn.Module))  # now: transformers adds to it
    calls = PAGE.partition("## Call by call")[2].partition("## File by file")[0]
    named = set(re.findall(r"\w+", calls))
    assert public - named == set()
    theirs = {n for n in peft.__all__ if n[0].islower()} - {"shift_tokens_right", "get_peft_config"}
    of_prompts = {n for n in theirs if "prompt" in n or "prefix" in n or "cartridge" in n or "bloom" in n}
    assert theirs - of_prompts - named == set()


def test_what_is_called_ours_is():
    names = set(re.findall(r"\bll\.(\w+)", PAGE))
    assert len(names) > 20
    assert names <= set(ll.__all__)


def test_the_page_of_other_libraries_names_what_is_ours():
    page = (Path(__file__).parents[2] / "docs" / "from_others.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bll\.(\w+)", page)) <= set(ll.__all__)
    here = "\n".join(re.findall(r"^\| .* \| (.*) \|$", page, re.MULTILINE))
    options = set(re.findall(r"`(\w+)=?[^`(]*`", here)) & set(ll.LoRAConfig.__dataclass_fields__)
    assert options >= {"rank", "alpha", "dropout", "target_modules", "exclude_modules", "init", "use_dora"}
    model = timm.create_model("test_vit", num_classes=10)
    parts = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.*"]
    assert len(ll.plan(model, ll.LoRAConfig(target_modules=parts)).layers) == 6 * 6
