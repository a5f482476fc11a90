"""Tab completion: the words for a line, and real shells that ask for them."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from lora_lightning.app.completion import complete, script
from lora_lightning.app.compose import CONF, shipped
from lora_lightning.app.options import OWN
from lora_lightning.app.overriding import leaves

NAMES = shipped().choices("recipe")


@pytest.mark.parametrize(
    ("line", "among", "never"),
    [
        ("python train.py re", ["recipe=", "resume="], ["model="]),
        ("lora-lightning train recipe=vit", ["recipe=vit_digits"], ["recipe=resnet_digits"]),
        ("lora-lightning train lora.r", ["lora.rank="], ["lora.alpha="]),
        ("lora-lightning train recipe=fcos_shapes data.s", ["data.side="], ["data.noise="]),
        ("lora-lightning train recipe=fcos_shapes model=vit_digits model.", ["model.depth="], []),
        ("lora-lightning train trainer.acc", ["trainer.accelerator="], []),
        ("lora-lightning train lora.init=", ["lora.init=gaussian"], []),
        ("lora-lightning train data.domain=s", ["data.domain=source"], ["data.domain=target"]),
        ("lora-lightning train data=cifar10 data.download=", ["data.download=true"], []),
        ("lora-lightning train method=li", ["method=linear_probe"], ["method=lora"]),
        ("lora-lightning train lora.im", ["lora.implementation="], []),  # that no file sets
        ("python train.py trainer.accelerator=c", ["trainer.accelerator=cpu"], ["trainer.accelerator=gpu"]),
        ("lora-lightning train hydra/launcher=s", ["hydra/launcher=slurm"], []),
        ("lora-lightning train --m", ["--multirun"], []),
        ("lora-lightning ", ["train", "merge", "completion"], []),
        ("lora-lightning merge o", ["out=", "overwrite="], ["ckpt="]),
        ("lora-lightning shrink b", ["budget="], ["rank="]),
        ("lora-lightning push ", ["to=", "dry=", "private="], ["budget="]),
        ("lora-lightning extract tuned=x m", ["model=", "model."], ["data="]),
        ("lora-lightning completion ", ["bash", "zsh"], []),
        ("lora-lightning copy vit_", ["vit_digits"], ["resnet_digits"]),
        ("lora-lightning predict t", ["top=", "threshold="], ["out="]),
        ("lora-lightning evaluate adapter=x da", ["data=", "data."], ["images="]),
        ("lora-lightning evaluate data=image", ["data=imagefolder", "data=imagenet"], ["data=digits"]),
        ("lora-lightning evaluate data=imagefolder data.ro", ["data.root="], ["data.batch_size="]),
        ("lora-lightning predict recipe=vit_d", ["recipe=vit_digits"], []),
        ("lora-lightning copy vit_digits v", [], ["vit_digits"]),
        ("python other.py re", [], ["recipe="]),
    ],
)  # fmt: skip
def test_the_words_for_a_line(line: str, among: list[str], never: list[str]) -> None:
    found = complete(line.split(" "))
    assert set(among) <= set(found)
    assert not set(never) & set(found)


@pytest.mark.parametrize("recipe", NAMES)
def test_the_options_are_those_that_hydra_composes_and_those_that_its_classes_take(recipe: str) -> None:
    config = shipped().compose_groups([f"recipe={recipe}"])
    true = {f"{leaf}=" for leaf in leaves(config) if "." in leaf}  # type: ignore[arg-type]
    sections = {option.partition(".")[0] for option in true}
    line = ["lora-lightning", "train", f"recipe={recipe}"]
    found = {word for section in sections for word in complete([*line, f"{section}."])}
    assert true <= found
    for word in found - true:
        section, _, name = word.removesuffix("=").rpartition(".")
        target = OmegaConf.select(config, f"{section}._target_")
        taken = inspect.signature(get_object(target) if target else OWN[section]).parameters
        assert name in taken, word


def test_recipes_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [fcos_shapes]\nlora: {a: 1}\n"
    )
    (tmp_path / "recipe" / "broken.yaml").write_text("a: [")
    line = ["lora-lightning", "train", "--config-dir", str(tmp_path)]
    assert complete([*line, "recipe=mi"]) == ["recipe=mine"]
    assert {"data.side=", "data.domain="} <= set(complete([*line, "recipe=mine", "data."]))
    assert complete([*line, "recipe=mine", "lora.a="]) == []
    assert "lora.rank=" in complete([*line, "recipe=broken", "lora."])


def test_no_word_of_it_loads_hydra_or_torch() -> None:
    code = "import sys; from lora_lightning.app.completion import main"
    code += "; main('bash', 'lora-lightning train lora.')"
    code += "; print(sorted({'hydra', 'omegaconf', 'torch', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert "lora.rank=" in lines
    assert lines[-1] == "[]"


def test_bash_is_told(tmp_path: Path) -> None:
    program = f"""
{script("bash")}
ask() {{
    COMP_LINE="$1"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($1); COMPREPLY=()
    _lora_lightning 2>/dev/null
    echo "${{COMPREPLY[*]}}"
}}
ask "lora-lightning train lora.ra"
ask "python {CONF.parent}/train.py recipe=vit_d"
ask "python other.py rec"
complete -p lora-lightning python
"""
    run = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    lines = run.stdout.splitlines()
    assert lines[:3] == ["lora.rank= lora.rank_pattern=", "vit_digits", ""]  # readline keeps "recipe="
    assert "_lora_lightning" in lines[-1]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    program = f"""
compadd() {{ print -r -- "$@"; }}
{script("zsh")}
words=(lora-lightning train lora.ra) CURRENT=3; _lora_lightning
words=(python {CONF.parent}/train.py recipe=vit_d) CURRENT=3; _lora_lightning
"""
    run = subprocess.run(
        ["zsh", "-f", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert "-S  -- lora.rank= lora.rank_pattern=" in run.stdout, run.stderr
    assert "-- recipe=vit_digits" in run.stdout
