"""SpeechRecognizer: CTC as torch and by hand, greedy decoding, accents apart, reports, routing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_lightning as ll
from lora_lightning.data.speech import SpeechBatch, Utterance, collate
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.report.page import left
from lora_lightning.tasks import routing
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.routing import Router
from lora_lightning.tasks.speech_report import transcribe_all
from lora_lightning.tasks.speech_sounds import aligned
from lora_lightning.tasks.vocabulary import encode, greedy

LETTERS = ["_", " ", "a", "b", "c"]


class Tones(nn.Module):
    """Hears a wave of constant samples 0, 1, 2, … as the outputs of these numbers, one each 4 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(len(LETTERS), len(LETTERS))
        self.head.weight.data.copy_(10 * torch.eye(len(LETTERS)))
        self.head.bias.data.zero_()

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(nn.functional.one_hot(waves[:, ::4].long(), len(LETTERS)).float()), (
            lengths + 3
        ) // 4


def said(outputs: list[int], text: str, **about: str) -> Utterance:
    return Utterance(torch.tensor(outputs).repeat_interleave(4).float(), text, **about)


def recognizer(**options: object) -> SpeechRecognizer:
    return SpeechRecognizer(Tones(), LETTERS, **options)  # type: ignore[arg-type]


def test_greedy_decoding() -> None:
    batch = collate([said([0, 2, 2, 0, 2, 1, 1, 3, 4, 0], ""), said([2, 0, 3], "")])
    assert recognizer().transcribe(batch.waves, batch.lengths) == ["aa bc", "ab"]
    logits = torch.eye(4)[None, [1, 2, 3, 1]]
    assert greedy(logits, torch.tensor([4]), ["-", "|", "A", "<unk>"]) == ["A"]
    assert greedy(logits, torch.tensor([0]), ["-", "|", "A", "B"]) == [""]


def test_the_loss_is_ctc_and_padding_is_none_of_it() -> None:
    """Two frames for "a": the paths a_, _a, aa."""
    task = recognizer()
    alone = collate([said([2, 0], "a", id="x")])
    log_probs, frames = task(alone.waves, alone.lengths)
    p = log_probs[0].exp()
    expected = -torch.log(p[0, 2] * p[1, 0] + p[0, 0] * p[1, 2] + p[0, 2] * p[1, 2])
    torch.testing.assert_close(task.loss(log_probs, frames, alone), expected)
    batch = collate([said([2, 0], "a", id="x"), said([3, 0, 4, 0, 2, 0], "bca", id="y")])
    both = task.loss(*task(batch.waves, batch.lengths), batch)
    other = collate([said([3, 0, 4, 0, 2, 0], "bca", id="y")])
    second = task.loss(*task(other.waves, other.lengths), other)
    torch.testing.assert_close(both, (expected + second) / 2)


def test_a_text_that_does_not_fit_gives_no_gradient_and_no_nan() -> None:
    task = recognizer()
    batch = collate([said([2, 0], "abcabc", id="x")])
    loss = task.loss(*task(batch.waves, batch.lengths), batch)
    loss.backward()
    assert loss.item() == 0
    assert not task.model.head.weight.grad.any()  # type: ignore[union-attr]


def test_characters_that_the_vocabulary_lacks() -> None:
    with pytest.raises(UserError, match=r"lacks 'z' in u1, 'é' in u2: normalize the texts"):
        encode(["az", "é"], ["u1", "u2"], LETTERS)
    assert encode(["a b"], ["u"], ["-", "|", "a", "b"])[0].tolist() == [2, 1, 3]  # a space may be "|"


def test_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SpeechRecognizer(Tones(), ["_"], {"lr": 0, "lrr": 1})
    assert len(caught.value.problems) == 3


def loader(utterances: list[Utterance], size: int = 2) -> DataLoader[SpeechBatch]:
    return DataLoader(utterances, size, collate_fn=collate)  # type: ignore[arg-type]


UTTERANCES = [
    said([2, 1, 3], "a b", id="1", accent="scottish", speaker="m1"),
    said([2, 0, 1, 3, 4], "a c", id="2", accent="scottish", speaker="f1"),
    said([4, 1, 3], "b c", id="3", accent="us", speaker="m1"),
]


def trainer(tmp_path: Path, **options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)  # type: ignore[arg-type]


def test_accents_are_counted_apart(tmp_path: Path) -> None:
    task = recognizer(kept=["us"])
    assert [s.name for s in task.scores] == ["wer", "cer", "wer_us"]
    found = trainer(tmp_path).test(task, loader(UTTERANCES), verbose=False)[0]
    assert found["test/wer"] == pytest.approx(1 / 4)  # "a bc" for "a c"
    assert found["test/cer"] == pytest.approx(1 / 6)
    assert found["test/wer_us"] == pytest.approx(2 / 2)
    assert [t.hypothesis for t in task.transcripts] == ["a b", "a bc", "c b"]
    assert set(task.intervals()) == {"wer", "cer", "wer_us"}
    assert task.intervals()["wer"][0] <= 1 / 4 <= task.intervals()["wer"][1]
    together = recognizer()
    found = trainer(tmp_path).test(together, loader(UTTERANCES), verbose=False)[0]
    assert found["test/wer"] == pytest.approx(3 / 6)


def test_training_with_lora_learns_and_leaves_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = conformer_ctc(LETTERS, width=32, masks=0)
    task = SpeechRecognizer(model, LETTERS, {"lr": 2e-2})
    waves = [torch.randn(8000) for _ in range(4)]
    data = [
        Utterance(w, t, str(i))
        for i, (w, t) in enumerate(zip(waves, ["ab", "ca b", "cc", "b a"], strict=True))
    ]
    first = task.loss(*task.eval()(*collate(data)[:2]), collate(data)).item()
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("head")}
    callback = ll.LoRACallback(rank=4, target_modules="all", verbose=False)
    task.train()
    trainer(tmp_path, max_epochs=30, callbacks=[callback], enable_checkpointing=False).fit(
        task, loader(data, 4)
    )
    assert task.loss(*task.eval()(*collate(data)[:2]), collate(data)).item() < 0.3 * first
    now = task.model.state_dict()
    assert all(torch.equal(now[n], t) for n, t in before.items())


def injected() -> SpeechRecognizer:
    task = SpeechRecognizer(conformer_ctc(LETTERS, width=32), LETTERS, kept=["us"])
    ll.inject(task, ll.LoRAConfig(rank=2, target_modules="all"), adapter="scottish")
    ll.add_adapter(task, "caribbean")
    for name, parameter in task.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return task


def noises() -> list[Utterance]:
    about = [("scottish", "m1"), ("caribbean", "f1"), ("us", "m1")]
    return [Utterance(torch.randn(4000 + 100 * i), "ab c", str(i), *about[i % 3]) for i in range(12)]


def test_examples_to_play_for_trackers(tmp_path: Path) -> None:
    task, sounds = injected(), noises()
    assert task.examples(SimpleNamespace(test_set=sounds), 3) == []
    trainer(tmp_path).test(task, loader(sounds), verbose=False)
    found = task.examples(SimpleNamespace(test_set=sounds), 3)
    with ll.adapters_off(task):
        off = {t.id: t.hypothesis for t in transcribe_all(task, sounds)}
    now = {t.id: t for t in task.transcripts}
    worst = max(len(t.hypothesis.split()) for t in task.transcripts if t.accent != "us")
    assert len(found) == 3 and worst
    for one in found:
        assert one.words["accent"] != "us", "of what was trained"
        assert one.words["heard after"] == now[one.name].hypothesis
        assert one.words["heard before"] == off[one.name]
        assert one.sound is not None and torch.equal(one.sound, sounds[int(one.name)].wave)


def test_the_alignment_is_in_order_and_complete() -> None:
    places = aligned(recognizer(), said([0, 2, 0, 0, 1, 3, 0, 0], "a b"))
    step = 4 / 16_000  # seconds of an output
    assert places == [("a", step), (" ", 4 * step), ("b", 5 * step)]
    assert aligned(recognizer(), said([2], "abc")) == []  # does not fit into one frame


def test_adapters_meet_in_mixed_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task, sounds = injected(), noises()

    def module(accent: str) -> SimpleNamespace:
        own = [u for u in sounds if u.accent == accent]
        kept = [u for u in sounds if u.accent == "us"]
        return SimpleNamespace(train_set=own, val_set=[*own, *kept], test_set=[*own, *kept])

    lines = task.report_together({a: module(a) for a in ("scottish", "caribbean")}, tmp_path)
    assert any("12 of 12 transcripts are those of the adapter by itself" in line for line in lines)
    rows = json.loads((tmp_path / "adapters.json").read_text())["rows"]
    assert [row[0] for row in rows] == ["scottish", "caribbean", "us"]
    title, sections = left(tmp_path)
    assert title == sections[0].title == "All adapters in one model"
    assert [s.title for s in sections[1:]] == [
        "Where the router sends them",
        "scottish: the worst 4 of 4 utterances",
        "caribbean: the worst 4 of 4 utterances",
    ]

    tested = {}
    for name in ("scottish", "caribbean"):
        ll.set_adapter(task, name)
        trainer(tmp_path).test(task, loader(module(name).test_set), verbose=False)
        tested[name] = dict(task.heard)
    anew: list[int] = []
    whole = routing.transcribe_all
    monkeypatch.setattr(routing, "transcribe_all", lambda t, some: anew.append(len(some)) or whole(t, some))
    again = task.report_together({a: module(a) for a in tested}, tmp_path, tested)
    assert anew == [0, 4, 4], "the base not at all, each adapter the other's accent"
    assert again == lines and json.loads((tmp_path / "adapters.json").read_text())["rows"] == rows


def test_the_router_finds_shifted_groups() -> None:
    """Groups that differ in one direction of little variance, hidden in others of much."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 5.0, 0.3, 1.0])
    labels = ["a", "b", "c"] * 60
    shift = torch.tensor([{"a": -1.0, "b": 0.0, "c": 1.0}[name] for name in labels])
    features = spread * torch.randn(180, 4, generator=draw)
    features[:, 2] += shift
    router = Router(features[:90], labels[:90])
    right = sum(x == y for x, y in zip(router(features[90:]), labels[90:], strict=True))
    assert right > 75  # of 90: the ideal router gets 80; the plain Euclidean one 40
