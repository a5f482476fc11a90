"""The training application: python train.py [recipe=NAME] [group=choice] [key=value], or --help."""

from lora_lightning.train import main

if __name__ == "__main__":
    main()
