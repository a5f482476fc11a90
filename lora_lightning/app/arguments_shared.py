"""Options that several commands have."""

from __future__ import annotations

from lora_lightning.app.parser import Parser, existing, found_or_address, switch


def of_trained(parser: Parser, ckpt: bool = False) -> None:
    """What was trained: `adapter=`, and a Trainer's checkpoint where `ckpt`."""
    about = "the adapter's folder or address, model.safetensors, or the run's folder"
    parser.key("adapter", "PATH", about, found_or_address)
    if ckpt:
        parser.key("ckpt", "FILE", "a Trainer's checkpoint in place of these", existing)


def check_base(parser: Parser) -> None:
    """`check_base=`."""
    parser.key("check_base", "false", "accept other base weights than those that it was trained on", switch)
