"""Damaged and forged files: none loads with other content, none touches the model, none takes memory
without bound, and every refusal is an error of ours."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeded import adapter, base

import lora_lightning as ll
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE


class Mutator:
    """Ways in which files are damaged, cut, mixed and forged; each gives new contents of both files."""

    def __init__(self, one, other, seed):
        self.files = {n: (one / n).read_bytes() for n in (CONFIG_FILE, TENSOR_FILE)}
        self.others = {n: (other / n).read_bytes() for n in (CONFIG_FILE, TENSOR_FILE)}
        self.random = random.Random(seed)
        self.ways = [
            self.flip,
            self.cut,
            self.splice,
            self.swap,
            self.header,
            self.edit,
            self.noise,
            self.attach_adapter,
        ]

    def __call__(self):
        way = self.random.choice(self.ways)
        return way.__name__, {**self.files, **way()}

    def _one(self):
        return self.random.choice([CONFIG_FILE, TENSOR_FILE])

    def flip(self):
        name = self._one()
        data = bytearray(self.files[name])
        for _ in range(self.random.choice([1, 1, 1, 2, 8])):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return {name: bytes(data)}

    def cut(self):
        name = self._one()
        return {name: self.files[name][: self.random.randrange(len(self.files[name]))]}

    def splice(self):
        name = self._one()
        data, other = self.files[name], self.others[self._one()]
        i, j = sorted(self.random.randrange(len(data)) for _ in range(2))
        k = self.random.randrange(len(other))
        return {name: data[:i] + other[k : k + j - i] + data[j:]}

    def swap(self):
        name = self._one()
        return {name: self.others[name]}

    def noise(self):
        return {self._one(): self.random.randbytes(self.random.choice([0, 1, 7, 8, 9, 1000]))}

    def attach_adapter(self):
        name = self._one()
        return {name: self.files[name] + self.random.randbytes(self.random.choice([1, 8, 4096]))}

    def header(self):
        """The header of the tensor file edited: claims of sizes, types, places and names."""
        data = self.files[TENSOR_FILE]
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        self._edit(header)
        text = json.dumps(header).encode()
        claim = self.random.choice([len(text)] * 6 + [2**63, 2**40, len(text) + 10**6, 0])
        return {TENSOR_FILE: struct.pack("<Q", claim) + text + data[8 + size :]}

    def edit(self):
        about = json.loads(self.files[CONFIG_FILE])
        self._edit(about)
        return {CONFIG_FILE: json.dumps(about).encode()}

    def _edit(self, node):
        """One value somewhere in a tree of JSON replaced, removed or repeated."""
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = self.random.choice(keys)
            below = node[key]
            if isinstance(below, (dict, list)) and below and self.random.random() < 0.8:
                node = below
                continue
            break
        values = [
            None, True, -1, 0, 3, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", "F64", "BF16",
            "U8", "blocks.0", [], {}, [10**12, 10**12], [0, 2**60], [[]], {"a": 1}, "0" * 64, [1], "lora_A",
        ]  # fmt: skip
        if self.random.random() < 0.2:
            del node[key]
        else:
            node[key] = self.random.choice(values)


def trial(folder, contents, wanted):
    """Load the files into a fresh base: whether they were refused; nothing else may have happened."""
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    model = base()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        ll.load_adapter(model, folder)
    except (ll.AdapterFileError, ll.ConfigError):
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], t) for n, t in after.items())
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "lora_state")
        return True
    loaded = ll.lora_state_dict(model)
    if wanted is not None:
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(t, wanted[n]) for n, t in loaded.items())
    return False


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutated_file_loads_with_other_content_or_touches_the_model(count, tmp_path):
    wanted = adapter(tmp_path / "one", 1)
    adapter(tmp_path / "other", 2)
    mutate = Mutator(tmp_path / "one", tmp_path / "other", seed=count)
    place = tmp_path / "place"
    place.mkdir()
    refused = sum(trial(place, mutate()[1], wanted) for _ in range(count))
    assert refused > 0.9 * count  # the others changed spaces in JSON, or a value to what it was


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_mutated_folder_of_peft_is_refused_or_loads_whole(count, tmp_path):
    """PEFT's files hold no digest: what loads may differ, what is refused leaves the model alone."""
    adapter(tmp_path / "one", 1, "peft")
    adapter(tmp_path / "other", 2, "peft")
    for folder in (tmp_path / "one", tmp_path / "other"):  # as PEFT itself writes it, without our digest
        save_file(load_file(folder / TENSOR_FILE), folder / TENSOR_FILE, {"format": "pt"})
    mutate = Mutator(tmp_path / "one", tmp_path / "other", seed=count)
    place = tmp_path / "place"
    place.mkdir()
    assert sum(trial(place, mutate()[1], None) for _ in range(count)) > count // 3


def test_a_mutated_folder_that_we_wrote_in_pefts_format_is_refused_or_loads_the_same(tmp_path):
    wanted = adapter(tmp_path / "one", 1, "peft")
    adapter(tmp_path / "other", 2, "peft")
    mutate = Mutator(tmp_path / "one", tmp_path / "other", seed=5)
    mutate.ways.remove(mutate.swap)  # the tensors of the other are whole, and its options the same
    (tmp_path / "place").mkdir()
    refused = sum(trial(tmp_path / "place", mutate()[1], wanted) for _ in range(80))
    assert 50 < refused < 80  # options that decide nothing may change
