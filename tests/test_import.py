"""`import lora_lightning` loads nothing that the core does not need, and nothing at all before it is used."""

import subprocess
import sys

import lora_lightning

HEAVY = {"hydra", "omegaconf", "wandb", "timm", "torchvision", "torchaudio", "matplotlib", "sklearn", "rich"}
SCRIPT = """
import sys
import lora_lightning
print(*sorted({name.split(".")[0] for name in sys.modules}))
import lightning.pytorch
before = set(sys.modules)
from lora_lightning import *
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
import lora_lightning.adapters.inject, lora_lightning.planning.plan
print(lora_lightning.inject.__name__, lora_lightning.combine is combine, callable(lora_lightning.plan))
"""


def test_the_import_is_light():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    at_first, whole, functions = run.stdout.splitlines()
    assert not {"torch", "lightning", "numpy"} & set(at_first.split())
    assert "lora_lightning" in whole.split()
    assert not set(whole.split()) & HEAVY
    assert functions == "inject True True"  # not the modules of the same names


def test_every_public_name_has_its_home():
    assert sorted(lora_lightning.HOMES) == sorted(lora_lightning.__all__)
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    assert all(getattr(lora_lightning, name).__name__ == name for name in lora_lightning.__all__)
