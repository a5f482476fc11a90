"""A recommender by matrix factorization, adapted by LoRACallback to a new group of users.

    python examples/recommender.py            # about a minute on one core; needs lora_lightning alone

A rating is the product of a user's row and an item's row, and an item's bias. Both tables are trained on 600
users with 60 ratings each. Then 200 users of another group join, with 10 ratings each to train on: their
ratings follow item vectors that are turned in two directions, and in the table of users they are the mean
user. LoRA gives that table a low-rank update: a new user becomes the mean user and 8 coordinates in
directions that the group shares, instead of 32 free numbers; rows that are not trained on keep their values.
The items' biases train in full. (An update of the items' table as well was worse on validation data.)
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from compare import Batch, Data, compare, fit
from torch import Tensor, nn

import lora_lightning as ll

OLD, NEW, ITEMS, TRUE, WIDTH = 600, 200, 200, 6, 32  # TRUE: dimensions of the world's own vectors


def ratings(users: tuple[int, int], each: int, seed: int) -> Batch:
    """User numbers, item numbers and ratings, (count,) each, `each` of every user in the range."""
    world = torch.Generator().manual_seed(0)  # the same for every data set
    taste, item = (torch.randn(n, TRUE, generator=world) for n in (OLD + NEW, ITEMS))
    turn = torch.randn(TRUE, 2, generator=world) @ torch.randn(2, TRUE, generator=world) / TRUE
    generator = torch.Generator().manual_seed(seed)
    user = torch.arange(*users).repeat_interleave(each)
    chosen = torch.randint(0, ITEMS, user.shape, generator=generator)
    seen = torch.where((user < OLD)[:, None], item[chosen], item[chosen] + item[chosen] @ turn)
    clean = (taste[user] * seen).sum(1) / TRUE**0.5 + item[chosen, 0]
    return user, chosen, clean + 0.5 * torch.randn(clean.shape, generator=generator)


class Recommender(pl.LightningModule):
    """Two tables and a bias for each item."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 1e-2
        self.user, self.item = nn.Embedding(OLD + NEW, WIDTH), nn.Embedding(ITEMS, WIDTH)
        self.bias = nn.Embedding(ITEMS, 1)
        for table in (self.user, self.item, self.bias):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1) + self.bias(item)[:, 0]  # (count,)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        user, item, rating = batch
        decay = self.user(user).square().sum(1) + self.item(item).square().sum(1)  # of the rows in use
        return F.mse_loss(self(user, item), rating) + 0.01 * decay.mean()

    def score(self, batch: Batch) -> float:
        """How much of the ratings' variance is explained, in percent."""
        user, item, rating = batch
        return 100 * float(1 - (self(user, item) - rating).square().mean() / rating.var())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.rate)


def main(quick: bool = False) -> str:
    pl.seed_everything(0, verbose=False)
    pretrained = Recommender()
    old, new = (0, OLD), (OLD, OLD + NEW)
    source = Data(*(ratings(old, each, seed) for each, seed in ((60, 1), (5, 2), (5, 3))))
    best = fit(pretrained, source, 4 if quick else 12, batch=512)
    with torch.no_grad():
        pretrained.user.weight[OLD:] = pretrained.user.weight[:OLD].mean(0)
    print(f"pretrained: {best.test:.1f} % of the variance explained for users it knows; now the new ones")

    def draw(seed: int) -> Data:
        return Data(ratings(new, 10, 10 + seed), ratings(new, 5, 4), ratings(new, 20, 5))

    rates = {"LoRA": (1e-2, 3e-2, 1e-1), "full fine-tuning": (3e-3, 1e-2, 3e-2)}
    if quick:
        rates = {method: values[1:2] for method, values in rates.items()}
    table = compare(
        pretrained,
        draw,
        lambda: ll.LoRACallback(rank=8, target_modules=["user"], modules_to_save=["bias"], verbose=False),
        rates,
        epochs=4 if quick else 20,
        batch=128,
        seeds=2 if quick else 3,
        score="variance explained, %",
    )
    print(table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some seconds; the numbers mean little")
    main(**vars(parser.parse_args()))
