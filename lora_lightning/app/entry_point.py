"""Where the command `lora-lightning` starts: from its first line on it answers Ctrl-C."""

from lora_lightning.app.interrupts import leave_at_once

leave_at_once()


def main() -> None:
    """Run the command line of this process."""
    from lora_lightning.app.cli import main as command

    command()
