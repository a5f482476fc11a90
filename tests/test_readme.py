"""The README's examples, run as they stand there."""

import re
import sys
from pathlib import Path

import torch
from small import Classifier, cnn, loader
from torch.utils.data import DataLoader, TensorDataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block("python"), "README.md", "exec"), names)
    assert {p.name for p in Path("adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    trained = sum(p.numel() for p in names["module"].parameters() if p.requires_grad)
    total = sum(p.numel() for p in names["module"].parameters())
    assert f"trains {100 * trained / total:.0f} % of the parameters" in block("python")


def test_the_lightning_cli_example(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    class Module(Classifier):
        def __init__(self) -> None:
            import timm

            super().__init__(timm.create_model("test_vit", num_classes=3))

        def train_dataloader(self):
            x, y = next(iter(loader(cnn)))
            return DataLoader(TensorDataset(torch.nn.functional.interpolate(x, 160), y), batch_size=2)

    config = tmp_path / "config.yaml"
    config.write_text(
        block("yaml") + "  max_steps: 1\n  accelerator: cpu\n  logger: false\n  enable_progress_bar: false\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app", "fit", "--config", str(config)])
    cli = LightningCLI(Module, save_config_callback=None)
    layers = {n for n, _ in cli.model.named_parameters() if "lora_A" in n}
    assert layers and all(".attn.qkv." in n or ".attn.proj." in n for n in layers)


def test_the_set_up_commands_name_extras_that_exist():
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        extras = set(re.findall(r'-e "\.\[(\w+)\]"', README))
        assert extras == {"recipes", "dev"} <= set(project["optional-dependencies"])
