"""The parts of recordings that the speaker encoder is distilled on."""

import copy

import pytest
import torch

from benchmarks import compression_voices
from benchmarks.compression_voices import FRAMES, Parts, Speaker, distil


def test_no_part_reaches_from_one_recording_into_the_next():
    torch.manual_seed(0)
    short, long = 0.01 * torch.randn(8000), torch.randn(32000)  # 0.5 and 2 seconds
    parts = Parts([short, long])
    assert len(parts.starts) == 1 + (201 - FRAMES + 1)  # of the shorter one alone the whole, with zeros
    first, last = parts.spread(2)
    assert first[:51].sum() > 0 and (first[51:] == 0).all()
    torch.testing.assert_close(last, Parts([long]).spread(2)[1])


def test_a_quiet_recording_is_made_louder_and_a_loud_one_is_not_made_quieter():
    torch.manual_seed(0)
    wave = torch.randn(32000)
    found = [Parts([scale * wave]).frames.mean() for scale in (1e-4, 1e-3, 0.5, 1.0)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[3] / found[2], torch.tensor(4.0))


@torch.no_grad()
def test_the_last_of_the_ends_is_the_part_s_own():
    torch.manual_seed(0)
    speaker, x = Speaker(), torch.rand(2, FRAMES, 40)
    ends = speaker.steps(x)
    torch.testing.assert_close(ends[:, -1], speaker(x))
    torch.testing.assert_close(ends[:, 0], speaker(x[:, :80]))


def test_a_stopped_distillation_goes_on_where_it_stood(tmp_path, monkeypatch):
    for name, value in {"STEPS": 4, "KEEP": 2, "BATCH": 2}.items():
        monkeypatch.setattr(compression_voices, name, value)
    torch.manual_seed(0)
    dense, student, parts = Speaker(), Speaker(), Parts([torch.randn(32000)])
    whole, stopped, again = (copy.deepcopy(student) for _ in range(3))
    distil(dense, whole, parts, tmp_path / "whole.pt")
    draws = iter([parts.at, parts.at, parts.at])
    with monkeypatch.context() as patched:
        patched.setattr(parts, "at", lambda index: next(draws)(index))
        with pytest.raises(StopIteration):
            distil(dense, stopped, parts, tmp_path / "stopped.pt")
    distil(dense, again, parts, tmp_path / "stopped.pt")
    torch.testing.assert_close(again.state_dict(), whole.state_dict())
    assert not torch.equal(again.linear.weight, student.linear.weight)
