"""The training application: python train.py [recipe=NAME] [group=choice] [key=value], or --help."""

from lora_lightning.app.interrupts import leave_at_once

if __name__ == "__main__":
    leave_at_once()  # from here on Ctrl-C is answered in one line
    from lora_lightning.app.application import main

    main()
