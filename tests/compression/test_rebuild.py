"""A compressed model again: from its description, and from its files, which anyone may have changed."""

import json

import pytest
import torch
from small import cnn, mlp, pretrained

import lora_lightning as ll


@pytest.fixture
def smaller():
    model = pretrained(cnn).eval()
    ranks = {"0": 4, "3": "spatial:5", "6": "tucker:6x4"}
    return model, ll.compress(model, ranks=ranks, plain=True)


def fresh():
    torch.manual_seed(99)
    return cnn().eval()


def test_the_state_dict_loads_strictly_into_a_fresh_model(smaller):
    model, told = smaller
    description = json.loads(json.dumps(told.description()))
    again = fresh()
    numbers = torch.get_rng_state()
    assert ll.compressed(again, description) is again
    assert torch.equal(numbers, torch.get_rng_state())
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(again(x), model(x))


def test_files_bring_the_same_model(smaller, tmp_path):
    model, told = smaller
    ll.save_compressed(model, told, tmp_path / "smaller")
    assert sorted(p.name for p in (tmp_path / "smaller").iterdir()) == [
        "compressed.json",
        "model.safetensors",
    ]
    again = ll.load_compressed(fresh(), tmp_path / "smaller")
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(again(x), model(x))


def changed(told, **changes):
    description = told.description()
    description["layers"][0].update(changes)
    return description


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "11"}, "no layer '11'"),
        ({"name": "1"}, "no layer '1'"),
        ({"shape": [8, 3, 5, 5]}, "there, Conv2d"),
        ({"kind": "Linear"}, "there, Conv2d"),
        ({"form": "svd"}, "cannot have the form 'svd'"),
        ({"form": "__class__"}, "cannot have the form"),
        ({"rank": [10**9]}, "with rank 1000000000"),
        ({"rank": [2, 2]}, "with rank 2x2"),
        ({"rank": [0]}, "a value of another kind"),
        ({"rank": [True]}, "a value of another kind"),
        ({"rank": 4}, "a value of another kind"),
        ({"name": None}, "a value of another kind"),
        ({"name": "3"}, "names a layer twice"),
    ],
)
def test_descriptions_that_do_not_fit_change_nothing(smaller, changes, words):
    model = fresh()
    names = model.state_dict().keys()
    with pytest.raises(ll.AdapterFileError, match=words):
        ll.compressed(model, changed(smaller[1], **changes))
    assert model.state_dict().keys() == names


@pytest.mark.parametrize("other", [None, {}, {"layers": 3}, {"layers": [], "format": 2}, {"layers": [3]}])
def test_what_is_no_description_is_refused(other):
    with pytest.raises(ll.AdapterFileError):
        ll.compressed(fresh(), other)


def test_files_that_do_not_belong_together_are_refused(smaller, tmp_path):
    model, told = smaller
    ll.save_compressed(model, told, tmp_path)
    place = tmp_path / "compressed.json"
    text = place.read_text()
    place.write_text(text.replace('"tucker"', '"channel"'))
    with pytest.raises(ll.AdapterFileError, match="not of one compression"):
        ll.load_compressed(fresh(), tmp_path)
    place.write_text(text)
    with pytest.raises(ll.AdapterFileError, match="does not fit"):
        ll.load_compressed(mlp(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ll.AdapterFileError):
        ll.load_compressed(fresh(), tmp_path)
    place.unlink()
    with pytest.raises(ll.AdapterFileError, match=r"compressed\.json cannot be read"):
        ll.load_compressed(fresh(), tmp_path)


def test_a_folder_that_cannot_be_written_stays(smaller, tmp_path):
    model, told = smaller
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ll.UserError, match="cannot be written"):
        ll.save_compressed(model, told, tmp_path)
    assert not (tmp_path / "compressed.json").exists()
