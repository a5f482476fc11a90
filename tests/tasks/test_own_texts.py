"""Recordings of any length heard by a model that writes texts by itself."""

import pytest
import torch

from lora_lightning.tasks.listening import Segment, to_srt
from lora_lightning.tasks.own_texts import TextListener

RATE = 16_000


class Counting:
    """Writes how many tenths of a second it hears that are not silent; nothing of less than one."""

    seconds = 5

    def __init__(self) -> None:
        self.heard: list[list[float]] = []

    def transcribe(self, waves: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        assert lengths.max() <= self.seconds * RATE and waves.shape[1] == lengths.max()
        self.heard.append([n / RATE for n in lengths.tolist()])
        tenths = [round(10 * float((wave != 0).sum()) / RATE) for wave in waves]
        return [str(n) if n else "" for n in tenths]


def sound(*seconds: float) -> torch.Tensor:
    """Silence, noise, silence, …, of so many seconds each."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        0.1 * (torch.randn(round(RATE * s), generator=generator)) * (i % 2) for i, s in enumerate(seconds)
    ]
    return torch.cat(parts)


def test_what_lies_between_silences_is_a_segment() -> None:
    model = Counting()
    listener = TextListener(model, batch=2)
    found = listener(sound(1.0, 2.0, 0.4, 1.0, 0.8, 1.5, 2.0))  # 0.4 s are no pause
    assert found.seconds == 8.7 and found.text == "30 15"
    assert found.segments == [Segment("30", 1.0, 4.4, []), Segment("15", 5.2, 6.7, [])]
    assert model.heard == [[4.0, 2.1]]  # half a pause on either side
    assert to_srt(found).startswith("1\n00:00:01,000 --> 00:00:04,400\n30\n")
    assert listener(sound(3.0)).segments == listener(torch.zeros(0)).segments == []
    assert listener(sound(1.0, 0.04, 1.0)).segments == []  # it writes nothing


@pytest.mark.parametrize("seconds", [4.4, 4.42, 5.0, 12.3])
def test_longer_ones_are_cut_and_nothing_is_lost(seconds: float) -> None:
    model = Counting()
    found = TextListener(model)(sound(0.5, seconds))
    parts = [(s.start, s.end) for s in found.segments]
    assert parts[0][0] == 0.5 and parts[-1][1] == pytest.approx(0.5 + seconds, abs=0.02)
    assert [end for _, end in parts[:-1]] == [start for start, _ in parts[1:]]
    assert sum(int(s.text) for s in found.segments) == pytest.approx(10 * seconds, abs=len(parts))
    assert (len(parts) == 1) == (seconds <= 4.4)


def test_it_is_cut_where_it_is_quietest() -> None:
    wave = sound(0.0, 4.0, 0.5, 3.0)
    first, second = TextListener(Counting())(wave).segments
    assert 4.0 <= first.end == second.start <= 4.5


def test_several_recordings_are_heard_together_and_kept_apart() -> None:
    model = Counting()
    waves = [sound(0.0, 1.0), sound(0.0, 2.0, 1.0, 3.0), sound(0.0, 0.5), sound(1.0)]
    assert [t.text for t in TextListener(model, batch=3).all(waves)] == ["10", "20 30", "5", ""]
    assert [len(batch) for batch in model.heard] == [3, 1]


def test_what_stands_already_is_told_in_order() -> None:
    listener = TextListener(Counting())
    heard = listener.opened(sound(0.0, 1.0, 1.0, 2.0, 1.0, 3.0))
    first, second, third = heard.waiting
    listener.hear([second])
    since, told = listener.settled(heard, 0)
    assert told == []
    listener.hear([first])
    since, told = listener.settled(heard, since)
    assert [s.text for s in told] == ["10", "20"]
    listener.hear([third])
    assert [s.text for s in listener.settled(heard, since)[1]] == ["30"]
    assert listener.transcription(heard).text == "10 20 30"
