"""What answers at once: help and refusals load neither torch nor anything that loads it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from lightning.pytorch.strategies import StrategyRegistry

from lora_lightning.app.compose import CONF, RECIPES
from lora_lightning.app.options import RULES, STRATEGIES
from lora_lightning.app.static_signatures import missing_name, static_signature
from lora_lightning.kernels import quantized_tensor as quantized

TARGETS = sorted({
    target
    for folder in (CONF, RECIPES)
    for file in folder.rglob("*.yaml")
    for target in re.findall(r"^ *_target_: *([\w.]+)", file.read_text(), re.M)
})  # fmt: skip
LINES = [
    ("train --help", 0),
    ("train recipe=fcos_shapes --help", 0),
    ("train --cfg job", 0),
    *[
        (f"{command} --help", 0)
        for command in (
            "recipes",
            "copy",
            "merge",
            "inspect",
            "shrink",
            "push",
            "extract",
            "transcribe",
            "predict",
            "evaluate",
        )
    ],
    ("train lora.rank=0 data.foo=1 trainer.strategy=dpp lora.quantize=int7 optim.lr=x", 2),
    ("train recipe=whisper_manifest model.foo=1", 2),
    ("train model._target_=lora_lightning.models.timm.tim_model", 2),
    ("train -m lora.rank=2,0", 2),
    ("train resume=nowhere", 2),
    ("recipes", 0),
    ("copy vit_digits nowhere/my.yaml", 2),
    ("trian", 2),
    ("inspect nowhere", 2),
    ("merge ckpt=nowhere", 2),
    ("shrink adapter=nowhere energy=0", 2),
    ("push adapter=. to=hf:x", 2),
    ("inspect hf:x", 2),
    ("extract tuned=nowhere", 2),
    ("transcribe nowhere.wav format=srtt", 2),
    ("predict images=nowhere score=2 batch_size=0", 2),
    ("evaluate adapter=nowhere out=", 2),
]
SCRIPT = """
import sys
from lora_lightning.app.cli import main
for line in sys.stdin.read().splitlines():
    code = 0
    try:
        main(line.split())
    except SystemExit as end:
        code = end.code
    heavy = [name for name in ("torch", "lightning", "timm", "torchvision", "numpy") if name in sys.modules]
    print(f"@{code} {line} {heavy}")
"""


def test_help_and_refusals_come_without_torch(tmp_path: Path) -> None:
    lines = "\n".join(line for line, _ in LINES)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, cwd=tmp_path
    )
    ended = [line[1:] for line in run.stdout.splitlines() if line.startswith("@")]
    assert ended == [f"{code} {line} []" for line, code in LINES], run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("target", TARGETS)
def test_a_signature_read_from_the_source_is_the_true_one(target: str) -> None:
    found = get_object(target)
    if found.__module__ == "datetime":
        assert static_signature(target) is None  # written in C
        return
    read = static_signature(target)
    assert read is not None
    true = inspect.signature(found).parameters.values()
    assert [(p.name, p.kind, p.default is p.empty) for p in read.parameters.values()] == [
        (p.name, p.kind, p.default is p.empty) for p in true
    ]


@pytest.mark.parametrize(
    "text",
    [
        "@decorated\ndef f(a): ...",
        "def f(a): ...\nif True:\n    def f(b): ...",
        "class f(metaclass=M):\n    def __init__(self, a): ...",
        "class f:\n    def __new__(cls, a): ...",
        "class f(A, B): ...",
        "from .cut import f",
        "f = 3",
        "def f(a:",
    ],
)
def test_what_is_not_plain_is_left_to_the_import(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert static_signature("cut.f") is None
    assert missing_name("cut.f") is None


def test_a_name_that_its_module_lacks() -> None:
    assert "Did you mean 'timm_model'" in (missing_name("lora_lightning.models.timm.tim_model") or "")
    assert missing_name("nowhere.at.all") is None


def test_the_names_kept_apart_from_torch_are_those_beside_it() -> None:
    assert RULES["lora.quantize"].names == tuple(quantized.QUANTIZERS)
    unsafe = ("spawn", "fork", "notebook")
    names = [n for n in StrategyRegistry.available_strategies() if not any(word in n for word in unsafe)]
    assert sorted(STRATEGIES) == sorted(["auto", *names])
