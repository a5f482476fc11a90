"""`import lora_lightning` loads nothing that the core does not need."""

import subprocess
import sys

HEAVY = {"hydra", "omegaconf", "wandb", "timm", "torchvision", "torchaudio", "matplotlib", "sklearn", "rich"}
SCRIPT = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lora_lightning
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_import_is_light():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "lora_lightning" in loaded
    assert not loaded & HEAVY
