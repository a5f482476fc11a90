"""Where Lightning starts the other processes of a distributed run, each as a script of its own."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # what lies beside this file is imported by its full name

    from lora_lightning.app.interrupts import leave_at_once

    leave_at_once()
    from lora_lightning.app.application import main

    main()
