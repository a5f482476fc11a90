"""How many Python calls a layer, a training step, a checkpoint and a command line make, in how many files.

    python -m benchmarks.walks [--out FILE] [--files]

Counted are the calls of Python functions (`sys.setprofile`'s "call" events): all of them, those in this
package and those in torch. Nothing is timed. Each walk is counted when it has been gone twice before, but for
the command line, which is a process of its own and is counted with its imports.
"""

from __future__ import annotations

import argparse
import dis
import functools
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve()
HOME = HERE.parents[1]
PACKAGE = f"{HOME / 'lora_lightning'}/"
TORCH = re.compile(r".*/site-packages/torch/")
# Functions of the package that go over a whole model, or over what is frozen in it.
WALKERS = re.compile(r"\w*(named_modules|named_parameters|base_modules|frozen|fingerprint|digest)\w*")
COMMAND = ("recipe=vit_digits", "compare=[]")


class Reached(BaseException):
    """The function at which counting ends was called."""


class Walk:
    """Counts what is called within this context.

    Args:
        until: name and the end of the file's path of the function at which to stop, by `Reached`.
    """

    def __init__(self, until: tuple[str, str] | None = None) -> None:
        self.until = until
        self.calls: Counter[str] = Counter()  # by file
        self.walkers: Counter[str] = Counter()
        self.compositions = self.digests = 0

    def __enter__(self) -> Walk:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *args: object) -> bool:
        sys.setprofile(None)
        return args[0] is Reached

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "c_call" and code.co_filename.startswith(PACKAGE):
            self.digests += "sha256" in getattr(arg, "__name__", "")
        if event != "call" or code.co_filename == str(HERE):
            return
        self.calls[code.co_filename] += 1
        if code.co_filename.startswith(PACKAGE):
            if WALKERS.fullmatch(code.co_name) and frame.f_lasti <= _start(code):
                self.walkers[code.co_name] += 1
        elif code.co_name == "_load_configuration_impl":
            self.compositions += 1
        if self.until and code.co_name == self.until[0] and code.co_filename.endswith(self.until[1]):
            raise Reached

    def result(self) -> dict[str, Any]:
        own = {f.removeprefix(PACKAGE): n for f, n in self.calls.items() if f.startswith(PACKAGE)}
        torch = {f: n for f, n in self.calls.items() if TORCH.match(f)}
        return {
            "calls": sum(self.calls.values()), "own": sum(own.values()), "own_files": own,
            "torch": sum(torch.values()), "torch_files": len(torch), "walkers": dict(self.walkers),
            "digests": self.digests, "compositions": self.compositions,
        }  # fmt: skip


@functools.cache
def _start(code: CodeType) -> int:
    """Where a function's frame stands when it begins; a generator that goes on stands behind it."""
    return next((i.offset for i in dis.get_instructions(code) if i.opname == "RESUME"), -1)


def counted(prepare: Callable[[], Any], step: Callable[[Any], Any]) -> dict[str, Any]:
    """What the third of three steps calls; `prepare` makes each one's argument, uncounted."""
    for _ in range(2):
        step(prepare())
    given = prepare()
    with Walk() as walk:
        step(given)
    return walk.result()


def of_a_layer(layer: Any, *shape: int) -> dict[str, dict[str, Any]]:
    """Forward and backward of one adapted layer, in train mode, for an input that has a gradient itself."""
    import torch
    from torch import nn

    import lora_lightning as ll

    model = nn.Sequential(layer).train()
    ll.inject(model, ll.LoRAConfig(rank=8, target_modules="all", modules_to_save=None))
    x = torch.randn(shape, requires_grad=True)
    return {
        "forward": counted(lambda: None, lambda _: layer(x)),
        "backward": counted(lambda: layer(x).sum(), lambda loss: loss.backward()),
    }


def recipe() -> tuple[Any, Any]:
    """Data and task of the recipe vit_digits, the task's model not adapted."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        config = compose("train", overrides=[f"hydra.searchpath=[file://{HOME / 'recipes'}]"])
    model = instantiate(config.model, num_classes=10)
    return instantiate(config.data, _convert_="all"), instantiate(config.task, model=model, num_classes=10)


def of_a_step() -> dict[str, Any]:
    """Forward, loss, backward and optimizer of a training step of vit_digits."""
    import torch
    import torch.nn.functional as F

    import lora_lightning as ll

    torch.manual_seed(0)
    _, task = recipe()
    ll.inject(task, ll.LoRAConfig(rank=16, target_modules="all"))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))

    def step(_: None) -> None:
        optimizer.zero_grad()
        F.cross_entropy(task(images), labels).backward()
        optimizer.step()

    return counted(lambda: None, step)


def of_a_checkpoint() -> dict[str, Any]:
    """Writing a Trainer's checkpoint of vit_digits."""
    import lightning.pytorch as pl

    import lora_lightning as ll

    data, task = recipe()
    callback = ll.LoRACallback(rank=16, target_modules="all", verbose=False)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, limit_val_batches=1, accelerator="cpu", callbacks=[callback],
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    with tempfile.TemporaryDirectory() as folder:
        return counted(lambda: f"{folder}/one.ckpt", lambda path: trainer.save_checkpoint(path, False))


def of_a_command_line() -> dict[str, Any]:
    """`python train.py recipe=vit_digits` up to the start of the fit; for a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [str(HOME / "train.py"), *COMMAND, f"hydra.run.dir={folder}/run"]
        with Walk(until=("fit", "lightning/pytorch/trainer/trainer.py")) as walk:
            runpy.run_path(sys.argv[0], run_name="__main__")
    return walk.result()


def every_walk() -> dict[str, dict[str, Any]]:
    import torch
    from torch import nn

    torch.set_num_threads(1)  # how a pass is cut depends on them
    found = {}
    for name, layer, shape in (
        ("Linear 64 to 64, 16 tokens", nn.Linear(64, 64), (16, 64)),
        ("Linear 768 to 768, 200 tokens", nn.Linear(768, 768), (200, 768)),
        ("Conv2d 64 to 64, 3×3, 8×14×14", nn.Conv2d(64, 64, 3, padding=1), (8, 64, 14, 14)),
    ):
        found.update({f"{name}: {way}": walk for way, walk in of_a_layer(layer, *shape).items()})
    found["training step of vit_digits"] = of_a_step()
    found["Trainer checkpoint of vit_digits"] = of_a_checkpoint()
    command = [sys.executable, "-m", "benchmarks.walks", "--command-line"]
    output = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True).stdout
    found["train.py recipe=vit_digits, up to fit"] = json.loads(output.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, found))
    lines = [f"{'':{width}} {'calls':>8} {'ours':>7} {'files':>5} {'torch':>7} {'files':>5}"]
    for name, walk in found.items():
        lines.append(
            f"{name:{width}} {walk['calls']:8,} {walk['own']:7,} {len(walk['own_files']):5}"
            f" {walk['torch']:7,} {walk['torch_files']:5}"
        )
    for name, walk in found.items():
        notes = [f"{n} {function}" for function, n in sorted(walk["walkers"].items())]
        notes += [f"{walk['digests']} SHA-256"] if walk["digests"] else []
        notes += [f"{walk['compositions']} compositions by Hydra"] if walk["compositions"] else []
        if notes:
            lines.append(f"{name}: {', '.join(notes)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "walks.json")
    parser.add_argument("--files", action="store_true", help="print this package's files in each walk")
    parser.add_argument("--command-line", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command_line:
        print(json.dumps(of_a_command_line()))
        return
    found = every_walk()
    print(table(found))
    for name, walk in found.items() if options.files else ():
        print(f"\n{name}")
        for file, calls in sorted(walk["own_files"].items(), key=lambda item: -item[1]):
            print(f"  {calls:7,}  {file}")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
