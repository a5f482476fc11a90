"""RNN-T: a loss that equals the sum over all alignments, learning, padding, adapting."""

import math

import pytest
import torch
from torchaudio.functional import rnnt_loss

import lora_lightning as ll
from lora_lightning.data.speech import Utterance, collate
from lora_lightning.errors import ConfigError
from lora_lightning.models.transducer import conformer_transducer
from lora_lightning.tasks.transducer import TransducerRecognizer

VOCABULARY = ["<blank>", " ", "a", "b"]


def task(**options) -> TransducerRecognizer:
    return TransducerRecognizer(
        conformer_transducer(VOCABULARY, width=16, depth=1, heads=2, **options), VOCABULARY
    )


def batch(*texts: str):
    t = torch.arange(8000) / 16_000
    pitches = {"a": 300, "b": 2400, " ": 1000}
    utterances = []
    for i, text in enumerate(texts):
        wave = torch.cat([torch.sin(2 * math.pi * pitches[c] * t[: 3200 + 400 * i]) for c in text])
        utterances.append(Utterance(0.3 * wave, text, str(i), "x", "s"))
    return collate(utterances)


def by_alignments(joint: torch.Tensor, target: list[int]) -> float:
    """-ln of the summed probability of every alignment, by recursion over frames and symbols."""
    log_probs = joint.log_softmax(-1)

    def rest(t: int, u: int) -> float:
        stay = log_probs[t, u, 0].item()
        blank = stay if (t, u) == (len(joint) - 1, len(target)) else -math.inf
        if t + 1 < len(joint):
            blank = stay + rest(t + 1, u)
        symbol = log_probs[t, u, target[u]].item() + rest(t, u + 1) if u < len(target) else -math.inf
        return float(torch.logaddexp(torch.tensor(blank), torch.tensor(symbol)))

    return -rest(0, 0)


def test_the_loss_sums_over_every_alignment():
    joint, target = torch.randn(1, 4, 3, 4), [2, 3]
    lengths = [torch.tensor([n], dtype=torch.int32) for n in (4, 2)]
    loss = rnnt_loss(joint, torch.tensor([target], dtype=torch.int32), *lengths, blank=0)
    assert loss.item() == pytest.approx(by_alignments(joint[0], target), abs=1e-4)


def test_padding_changes_nothing():
    module = task().eval()
    both = batch("ab", "babab")
    for row in range(2):
        alone = collate([Utterance(both.waves[row, : both.lengths[row]], both.texts[row], "", "", "")])
        together, frames = module(both.waves, both.lengths)
        single, count = module(alone.waves, alone.lengths)
        assert frames[row] == count[0]
        assert (together[row, : frames[row]] - single[0]).abs().max() < 1e-5
        assert (
            module.transcribe(alone.waves, alone.lengths)[0]
            == module.transcribe(both.waves, both.lengths)[row]
        )
    losses = [module.batch_loss(batch_of) for batch_of in (batch("ab"), both)]
    assert all(loss.isfinite() for loss in losses)


def test_it_learns_and_its_adapter_switches_off():
    module = task()
    module.model.transcriber.masks = torch.nn.ModuleList()
    words = batch("ab", "ba", "bab", "b a")
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        module.batch_loss(words).backward()
        optimizer.step()
    module.eval()
    assert module.transcribe(words.waves, words.lengths) == words.texts
    before = module(words.waves, words.lengths)[0]
    report = ll.inject(module, ll.LoRAConfig(rank=2))
    kinds = {layer.name.split(".")[1] for layer in report.layers}
    assert "transcriber" in kinds and len(report.layers) > 3
    for parameter in ll.lora_parameters(module):
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(module(words.waves, words.lengths)[0], before)
    with ll.adapters_off(module):
        assert torch.equal(module(words.waves, words.lengths)[0], before)


def test_options_that_cannot_be_built():
    with pytest.raises(ConfigError, match="depht"):
        conformer_transducer(VOCABULARY, depht=2)
