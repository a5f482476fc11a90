"""export: the folder, that its file gives what the model gives, and that nothing is half-written."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import adapted, cnn, mlp
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError, UserError, WriteError
from lora_lightning.exporting import plain_weights
from lora_lightning.exporting.checks import compare
from lora_lightning.utils.libraries import LibraryError

SHOWN = {"input_size": [3, 10, 10], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
NAMES = ["cat", "dog", "eel"]


def picture():
    return torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def tells_of_here(folder):
    """What the files say of where they were made."""
    places = [str(Path(module.__file__).parent) for module in (ll, torch)] + [str(Path(__file__).parent)]
    return [file.name for file in folder.iterdir() if any(p.encode() in file.read_bytes() for p in places)]


def said(folder, monkeypatch, capsys, *words):
    """What run.py prints where this package cannot be imported."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    hidden = [name for name in sys.modules if name.partition(".")[0] in ("lora_lightning", "lightning")]
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)  # by which an import of it fails
    capsys.readouterr()
    runpy.run_path(str(folder / "run.py"))
    return capsys.readouterr().out


def test_a_classifier_in_onnx(tmp_path, monkeypatch, capsys):
    model = adapted(cnn, target_modules="all").train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    told = ll.export(model, picture(), tmp_path / "out", names=NAMES, preprocess=SHOWN)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.training
    assert told.inputs == {"input": ("batch", 3, 10, 10)} and told.outputs == ("output",)
    assert 0 < told.difference < 1e-5 and [one["input"][0] for one in told.sizes] == [1, 3]
    assert left(tmp_path / "out") == sorted(told.files) and left(tmp_path) == ["out"]
    assert not tells_of_here(tmp_path / "out")
    assert "cat" in str(told) or "model.onnx" in str(told)
    pixels = np.random.default_rng(0).integers(256, size=(10, 10, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", pixels)
    shown = (
        torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - torch.tensor(SHOWN["mean"]).view(3, 1, 1)
    ) / (torch.tensor(SHOWN["std"]).view(3, 1, 1))
    with torch.no_grad():
        chances = model.eval()(shown).softmax(1)[0]
    wanted = ", ".join(f"{NAMES[i]} {chances[i]:.3f}" for i in chances.argsort(descending=True).tolist())
    assert said(tmp_path / "out", monkeypatch, capsys, tmp_path / "picture.npy") == f"{wanted}\n"
    assert len(said(tmp_path / "out", monkeypatch, capsys).splitlines()) == 1
    script = (tmp_path / "out" / "run.py").read_text()
    assert 10 <= len([line for line in script.splitlines() if line.strip()]) <= 24
    assert "lora" not in script.lower()
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["difference"] == told.difference and facts["versions"].keys() >= {"torch", "onnxruntime"}


def test_bytes_go_into_a_graph_of_torch(tmp_path, monkeypatch, capsys):
    model = adapted(cnn, target_modules="all").eval()
    told = ll.export(
        model, picture(), tmp_path / "out", format="pt2", names=NAMES, preprocess=SHOWN, inside=True
    )
    assert told.difference < 1e-6 and not tells_of_here(tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pixels = torch.randint(256, (5, 3, 10, 10), dtype=torch.uint8)
    mean, std = (torch.tensor(SHOWN[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(program(pixels)[0], model((pixels / 255 - mean) / std))
    assert "cat" in said(tmp_path / "out", monkeypatch, capsys)


def test_an_example_that_is_a_slice_brings_no_more_into_the_file(tmp_path):
    batch = torch.randn(4096, 6)
    told = ll.export(mlp(), batch[:2], tmp_path / "out", format="pt2")
    assert told.bytes < batch.numel() * 4


@pytest.mark.slow
def test_compiled_for_this_machine(tmp_path, monkeypatch, capsys):
    model = adapted(mlp, target_modules="all").eval()
    told = ll.export(model, torch.randn(2, 6), tmp_path / "out", format="aoti")
    assert told.difference < 1e-5
    run = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(run(x)[0], model(x))
    assert "float32" in said(tmp_path / "out", monkeypatch, capsys)


@pytest.mark.slow
def test_a_program_for_executorch(tmp_path, monkeypatch, capsys):
    pytest.importorskip("executorch")
    model = adapted(cnn, target_modules="all").eval()
    told = ll.export(model, picture(), tmp_path / "out", format="executorch", dynamic=False)
    assert told.difference < 1e-5 and told.file == "model.pte"
    assert "float32" in said(tmp_path / "out", monkeypatch, capsys)


def test_executorch_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    for name in [name for name in sys.modules if name.startswith("executorch.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LibraryError, match=r"pip install .*'lora-lightning\[executorch\]'") as caught:
        ll.export(mlp(), torch.randn(2, 6), tmp_path / "out", format="executorch", dynamic=False)
    assert "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_compiler_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"none of g\+\+.* here: install one"):
        ll.export(mlp(), torch.randn(2, 6), tmp_path / "out", format="aoti")
    assert left(tmp_path) == []


def test_plain_weights_load_strictly(tmp_path):
    from safetensors.torch import load_file

    model = adapted(mlp, target_modules="all").eval()
    told = ll.export(model, torch.randn(2, 6), tmp_path / "out", format="safetensors")
    plain = mlp().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(4, 6)
    torch.testing.assert_close(plain(x), model(x))
    assert told.files == ("README.md", "export.json", "model.safetensors")
    assert "load_state_dict" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_a_quantized_base_is_written_in_floats(kind, tmp_path):
    model = mlp().eval()
    if kind == "int8":
        ll.quantize(model, "int8")
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["3"]))
    ll.export(model, torch.randn(2, 6), tmp_path / "out", format="safetensors")


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    model, x = mlp(), torch.randn(2, 6)
    wrong = {
        "Did you mean 'onnx'": {"format": "onx"},
        "Did you mean 'class'": {"kind": "clas"},
        "mean and std of pictures": {"preprocess": {"mean": [0.5]}},
        "give preprocess": {"inside": True},
        "Inputs: input": {"dynamic": {"x": {0: "batch"}}},
        "has the axes 0 to 1": {"dynamic": {"input": {2: "batch"}}},
        "give dynamic=False": {"format": "executorch"},
        "is no name of an axis": {"dynamic": {"input": {0: 3}}},
        "['b'] names no axes": {"dynamic": {"input": ["b"]}},
        "dynamic=['input']: give true, false": {"dynamic": ["input"]},
        "check: is of type Tensor: give a list": {"check": x},
        "calibration: is of type Tensor: give a list": {"quantize": "static", "calibration": x},
        "names={'a': 1}: give a list of words": {"names": {"a": 1}},
        "names: 1 for an output of 3 on axis 1": {"names": ["a"]},
        "kind='text': give names": {"kind": "text"},
        "is of one for each input": {"kind": "number"},
        "has no 'temp'": {"names": NAMES, "scale": {"temp": 2.0}},
        "temperature=0: give a number above 0": {"names": NAMES, "scale": {"temperature": 0}},
        "kind=None has none": {"scale": {"temperature": 2.0}},
        "mean=0.5: give a list of numbers": {"preprocess": {"mean": 0.5, "std": 0.5}},
        "std=[0]: give numbers above 0": {"preprocess": {"mean": [0.5], "std": [0]}},
        "sample_rate='x': give samples": {"preprocess": {"sample_rate": "x"}},
        "not JSON serializable": {"preprocess": {"sample_rate": 8000, "like": x}},
        "give an ExportCard": {"about": 3},
    }
    for text, options in wrong.items():
        with pytest.raises(ConfigError, match="1 problem") as caught:
            ll.export(model, x, tmp_path / "out", **options)
        assert text in str(caught.value)
    for text, example in {
        "does not take input (2, 7)": torch.randn(2, 7),
        "takes no 'y'": {"y": x},
        "these are int": (3,),
        "2 inputs for Sequential": (x, x),
        "bfloat16, which run.py's arrays cannot be: give model.float()": x.bfloat16(),
    }.items():
        with pytest.raises(UserError) as caught:
            ll.export(model, example, tmp_path / "out")
        assert text in str(caught.value) and "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_a_folder_of_others_is_left_alone(tmp_path):
    model, x = mlp(), torch.randn(2, 6)
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for out, overwrite, text in (
        ("file", True, "is a file"),
        ("mine", False, "is not empty"),
        ("mine", True, "holds thesis.tex, which is of no exported model"),
    ):
        with pytest.raises(ConfigError, match=text):
            ll.export(model, x, tmp_path / out, format="safetensors", overwrite=overwrite)
    ll.export(model, x, tmp_path / "out", format="safetensors", names=["a"])
    ll.export(model, x, tmp_path / "out", format="safetensors", overwrite=True)
    assert left(tmp_path / "out") == ["README.md", "export.json", "model.safetensors"]
    assert left(tmp_path) == ["file", "mine", "out"] and left(tmp_path / "mine") == ["thesis.tex"]


class Sum(nn.Module):
    """An operator that depends on values, and outputs with names."""

    def forward(self, x, mask):
        kept = x[mask]
        return {"total": kept.sum(), "count": mask.sum()}


def test_a_file_that_differs_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model, x = mlp(), torch.randn(2, 6)
    real = plain_weights.load

    def off(folder, subject):
        run = real(folder, subject)
        return lambda inputs: [a + 1e-3 for a in run(inputs)]

    def full(subject, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for name, function, error, text in (
        ("load", off, UserError, "differs from the model by"),
        ("write", full, WriteError, "Make room"),
    ):
        monkeypatch.setattr(plain_weights, name, function)
        with pytest.raises(error, match=text) as caught:
            ll.export(model, x, tmp_path / "out", format="safetensors")
        assert "\n" not in str(caught.value) and left(tmp_path) == []


def test_named_inputs_and_outputs(tmp_path):
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    told = ll.export(Sum(), {"x": x, "mask": mask}, tmp_path / "out", format="safetensors", dynamic=False)
    assert told.outputs == ("total", "count") and [*told.inputs] == ["x", "mask"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_computes(tmp_path):
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.utils.spectral_norm(nn.Linear(4, 2)))
    model(torch.randn(2, 6)).sum().backward()
    weight = model[0].weight
    told = ll.export(model, torch.randn(2, 6), tmp_path / "out", format="pt2")
    assert told.difference < 1e-6 and model[0].weight is weight and not weight.is_leaf


def test_half_precision(tmp_path):
    model, x = mlp().bfloat16(), torch.randn(2, 6).bfloat16()
    told = ll.export(model, x, tmp_path / "out", format="safetensors")
    assert told.difference == 0 and told.inputs == {"input": ("batch", 6)}
    with pytest.raises(UserError, match=r"Sequential or its inputs are in bfloat16.*give model\.float\(\)"):
        ll.export(model, x, tmp_path / "none")


def test_what_run_py_is_not_given(tmp_path, monkeypatch, capsys):
    shown = {**SHOWN, "input_size": [3, 10, 10]}
    ll.export(cnn().eval(), picture(), tmp_path / "out", format="pt2", preprocess=shown, names=NAMES)
    np.save(tmp_path / "floats.npy", np.zeros((10, 10, 3)))
    for name, text in {
        "none.npy": "there is no such file; give picture.npy",
        "floats.npy": r"give \(height, width, 3\) in uint8, not \(10, 10, 3\), float64",
    }.items():
        with pytest.raises(SystemExit, match=text):
            said(tmp_path / "out", monkeypatch, capsys, tmp_path / name)


def test_nan_is_no_small_difference():
    pairs = [({}, [torch.tensor([1.0, -torch.inf])])]
    assert compare(lambda _: [np.array([1, -np.inf], "float32")], pairs, "file") == 0
    for wrong in ([np.nan, -np.inf], [1, np.inf], [1, np.nan], [1, 0]):
        with pytest.raises(ll.UserError, match="differs from the model by inf"):
            compare(lambda _, wrong=wrong: [np.array(wrong, "float32")], pairs, "file")
