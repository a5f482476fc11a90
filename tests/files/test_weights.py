"""Weights of a plain network: written and read with a checksum, loaded whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import cnn, mlp, pretrained
from torch import nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.files.weights import load_into, network_state, read_weights, write_weights


def load(model, state, fresh=()):
    load_into(model, state, "w.safetensors", "the network", "Give others.", fresh)
    return model


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_all_of_it_is_loaded_under_the_names_of_a_lightning_module_too(prefix):
    state = cnn().state_dict()
    named = {f"{prefix}{n}": t for n, t in state.items()}
    if prefix:
        named["val_accuracy.tp"] = torch.zeros(3)  # a metric beside the network
    assert equal(load(cnn(), named).state_dict(), state)
    assert equal(dict(network_state(cnn(), named)), state)


def test_step_counters_may_be_absent_and_nothing_else():
    state = cnn().state_dict()
    load(cnn(), {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")})
    with pytest.raises(AdapterFileError, match=r"1 tensor is missing: 1\.running_mean\."):
        load(cnn(), {n: t for n, t in state.items() if n != "1.running_mean"})


def test_every_kind_of_misfit_is_counted_in_one_message():
    state = mlp().state_dict()
    state["3.weigth"] = state.pop("3.weight")
    state["0.bias"] = torch.zeros(3)
    state["1.bias"] = state["1.bias"].long()
    with pytest.raises(AdapterFileError) as error:
        load(mlp(), state)
    assert str(error.value).splitlines() == [
        "w.safetensors does not fit the network; nothing was loaded:",
        "  - 1 tensor is missing: 3.weight.",
        "  - 1 tensor is not of this model: 3.weigth. Did you mean '3.weight'?",
        "  - 2 tensors are of another shape: 0.bias is (3,) in the file, (16,) in the model; "
        "1.bias is (16,) int64 in the file, (16,) in the model.",
        "Give others.",
    ]


def test_many_are_counted_and_three_named():
    with pytest.raises(AdapterFileError, match=r"8 tensors are missing: (\S+; ){3}and 5 more\."):
        load(mlp(), {})


def test_an_adapter_is_told_apart():
    state = {**mlp().state_dict(), "base_model.model.0.lora_A.weight": torch.zeros(2, 6)}
    with pytest.raises(AdapterFileError, match=r"lora_lightning\.load_adapter"):
        load(mlp(), state)


@pytest.mark.parametrize("there", ["absent", "of another size", "of the same size"])
def test_a_fresh_head_keeps_what_it_was_built_with(there):
    base, model = pretrained(mlp), mlp()
    state = {n: t for n, t in base.state_dict().items() if not n.startswith("5.")}
    if there != "absent":
        head = nn.Linear(12, 7 if there == "of another size" else 3)
        state.update({f"5.{n}": t for n, t in head.state_dict().items()})
    built = {n: t.clone() for n, t in model.state_dict().items()}
    found = load(model, state, ["5"]).state_dict()
    assert all(torch.equal(t, built[n] if n.startswith("5.") else state[n]) for n, t in found.items())
    if there == "of another size":
        with pytest.raises(AdapterFileError, match=r"5\.weight is \(7, 12\) in the file, \(3, 12\)"):
            load(mlp(), state)


def test_names_that_a_class_had_before_are_renamed_by_it():
    """torchvision's published detectors have them; one of another shape is a misfit all the same."""
    from torchvision.models.detection.rpn import RPNHead

    head = RPNHead(8, 3)
    state = {n.replace("conv.0.0.", "conv."): t for n, t in head.state_dict().items()}
    assert "conv.weight" in state
    assert equal(load(RPNHead(8, 3), state).state_dict(), head.state_dict())
    state["conv.weight"] = state["conv.weight"][:2]
    with pytest.raises(AdapterFileError, match=r"another shape: size mismatch for conv\.0\.0\.weight"):
        load(RPNHead(8, 3), state)


def test_a_written_file_says_where_it_comes_from_and_is_checked(tmp_path):
    state, path = mlp().state_dict(), tmp_path / "w.safetensors"
    write_weights(path, state, {"from": "here"})
    tensors, metadata = read_weights(path)
    assert equal(tensors, state) and metadata["lora_lightning"] == '{"from": "here"}'
    tensors["0.bias"][0] += 1
    save_file(tensors, path, metadata)
    assert len(load_file(path)) == 8
    with pytest.raises(AdapterFileError, match="does not match its checksum"):
        read_weights(path)
