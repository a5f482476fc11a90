"""A small text classifier, adapted by LoRACallback to topics that it has never seen.

    python examples/text_classifier.py            # about a minute on one core; needs lora_lightning alone

The task: is a sentence positive or negative? A sentence is a topic and eleven words, and how good a word is
depends on the topic ("unpredictable" is praise for a film and blame for a car): it is the product of hidden
tastes of the word and the topic. The classifier learns eight topics from 8,000 sentences; of two more, there
are 300 sentences to adapt to.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from compare import Batch, Data, compare, fit
from torch import Tensor, nn

import lora_lightning as ll

WORDS, TOPICS, LENGTH, TASTES = 60, 10, 12, 3  # the last two topics are new


def sentences(count: int, topics: tuple[int, int], seed: int) -> Batch:
    """Numbers of words and, last, of the topic (count, LENGTH), and labels (count,)."""
    world = torch.Generator().manual_seed(0)  # the same for every data set
    words, tastes = (torch.randn(n, TASTES, generator=world) for n in (WORDS, TOPICS))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    topic = torch.randint(*topics, (count,), generator=generator)
    text[:, -1] = WORDS + topic
    goodness = (words[text[:, :-1]].sum(1) * tastes[topic]).sum(1)
    return text, (goodness > 0).long()


class TextClassifier(pl.LightningModule):
    """Words embedded, a transformer encoder, the mean over the words, a linear head."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.rate = 5e-3
        self.words = nn.Embedding(WORDS + TOPICS, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)  # (batch, LENGTH) -> (batch, LENGTH, width)
        return self.head(self.encoder(x).mean(1))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def score(self, batch: Batch) -> float:
        """Accuracy in percent."""
        return 100 * float((self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ll.param_groups(self, lr=self.rate, weight_decay=0.01))


def main(quick: bool = False) -> str:
    pl.seed_everything(0, verbose=False)
    pretrained = TextClassifier()
    known, new = (0, TOPICS - 2), (TOPICS - 2, TOPICS)
    source = Data(
        *(sentences(n, known, seed) for n, seed in ((1000 if quick else 8000, 1), (500, 2), (500, 3)))
    )
    best = fit(pretrained, source, 2 if quick else 8, batch=128)
    print(f"pretrained: {best.test:.1f} % right on the topics it knows; now the two new ones")

    def draw(seed: int) -> Data:
        return Data(sentences(300, new, 10 + seed), sentences(300, new, 4), sentences(1000, new, 5))

    rates = {"LoRA": (3e-3, 1e-2, 3e-2), "full fine-tuning": (3e-3, 1e-2, 3e-2)}
    if quick:
        rates = {method: values[1:2] for method, values in rates.items()}
    table = compare(
        pretrained,
        draw,
        lambda: ll.LoRACallback(rank=4, verbose=False),  # the linear layers of the encoder, and the head
        rates,
        epochs=4 if quick else 12,
        batch=64,
        seeds=2 if quick else 3,
        score="accuracy, %",
    )
    print(table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some seconds; the numbers mean little")
    main(**vars(parser.parse_args()))
