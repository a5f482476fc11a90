"""Merging files: what the adapted model gives, a plain model gives with the file; and inspecting them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import BATCHES, Classifier, cnn, encoder, mlp, save_checkpoint, vit

import lora_lightning as ll
from lora_lightning.app.cli import COMMANDS, main
from lora_lightning.app.inspect import inspect
from lora_lightning.app.rebuild import merge_files
from lora_lightning.files.checkpoint_digests import KEY
from lora_lightning.files.from_model import checkpoint_entry
from lora_lightning.files.locate import read_source
from lora_lightning.files.merge import merge_state
from lora_lightning.kernels.rounding import rounded
from lora_lightning.layers.registry import lora_layers
from lora_lightning.models.base_file import read_base


def rnn():
    class Speech(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(20, 8)
            self.conv = torch.nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.back = torch.nn.ConvTranspose1d(8, 6, 1, groups=2)
            self.lstm = torch.nn.LSTM(6, 5, batch_first=True)
            self.qkv = torch.nn.Linear(5, 15)
            self.head = torch.nn.Linear(15, 3)

        def forward(self, x):
            y, _ = self.lstm(self.back(self.conv(self.embed(x).mT)).mT)
            return self.head(self.qkv(y))

    return Speech()


def normed():
    """Weight-normed over each dimension that occurs: of the outputs, of the kernel (wav2vec 2.0), of all."""
    norm = torch.nn.utils.parametrizations.weight_norm
    return torch.nn.Sequential(
        norm(torch.nn.Conv1d(6, 8, 3, groups=2), dim=2), norm(torch.nn.Conv1d(8, 4, 1)),
        torch.nn.Flatten(), norm(torch.nn.Linear(12, 5), dim=None), torch.nn.Linear(5, 3),
    )  # fmt: skip


BATCH = {**BATCHES, normed: lambda: torch.randn(2, 6, 5), rnn: lambda: torch.randint(0, 20, (2, 7))}


def trained(build, seed=0, holder=lambda m: m, **options):
    torch.manual_seed(seed)
    model = holder(build())
    ll.inject(model, ll.LoRAConfig(**{"rank": 2, "target_modules": "all", **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def base_file(build, folder, dtype=None):
    torch.manual_seed(0)
    state = build().to(dtype).state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


CASES = [
    (mlp, {}),
    (mlp, {"use_dora": True, "use_rslora": True, "rank_pattern": {"0": 3}}),
    (cnn, {"train_norm": "both", "train_bias": "all"}),
    (vit, {"target_modules": ["qkv.q", "qkv.v", "fc1"]}),
    (encoder, {}),
    (rnn, {}),
    (normed, {}),
    (rnn, {"target_modules": ["lstm.weight_ih_l0.f", "lstm.weight_ih_l0.o", "embed"]}),
]


@pytest.mark.parametrize(("build", "options"), CASES)
@pytest.mark.parametrize("holder", [lambda m: m, Classifier], ids=["bare", "LightningModule"])
def test_a_plain_model_with_the_merged_file_gives_the_same_outputs(build, options, holder, tmp_path):
    model = trained(build, holder=holder, **options)
    x = BATCH[build]()
    model.train()(x)
    expected = model.eval()(x)
    ll.save_adapter(model, tmp_path / "adapter")
    merged = merge_files(tmp_path / "adapter", tmp_path / "out.safetensors", base_file(build, tmp_path))
    plain = build()
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert torch.allclose(plain.eval()(x), expected, rtol=1e-5, atol=1e-5)
    ll.eject(model, merged=True)
    network = model.model if holder is Classifier else model
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in plain.state_dict().items())
    assert merged.relative == merged.largest == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_norm_in_its_old_names(tmp_path):
    model, x = trained(normed).eval(), BATCH[normed]()
    ll.save_adapter(model, tmp_path / "adapter")
    state = load_file(base_file(normed, tmp_path))
    for new, old in (("parametrizations.weight.original0", "weight_g"), (".original1", ".weight_v")):
        state = {n.replace(new, old).replace("parametrizations.weight.w", "w"): t for n, t in state.items()}
    assert "0.weight_g" in state and "0.weight_v" in state
    save_file(state, tmp_path / "old.safetensors")
    merge_files(tmp_path / "adapter", tmp_path / "out.safetensors", tmp_path / "old.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == state.keys()
    plain = normed()
    plain.load_state_dict(merged)  # torch reads the old names
    assert torch.allclose(plain.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_another_parametrization_is_refused_in_files(tmp_path):
    def build():
        spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 5))
        return torch.nn.Sequential(spectral, torch.nn.Linear(5, 3))

    ll.save_adapter(trained(build), tmp_path / "adapter")
    base = base_file(build, tmp_path)
    with pytest.raises(ll.AdapterFileError, match=r"no weight 0.weight .*eject\(model, merged=True"):
        merge_files(tmp_path / "adapter", tmp_path / "out.safetensors", base)


@pytest.mark.parametrize("full", [False, True])
def test_a_trainer_checkpoint_is_merged_as_its_adapter(full, tmp_path):
    model = trained(vit, holder=Classifier)
    state = {n: t for n, t in model.state_dict().items() if full or "lora" in n or "head" in n}
    save_checkpoint({"state_dict": state, KEY: checkpoint_entry(model)}, tmp_path / "last.ckpt")
    ll.save_adapter(model, tmp_path / "adapter")
    base = base_file(vit, tmp_path)
    merge_files(tmp_path / "adapter", tmp_path / "one.safetensors", base)
    merge_files(tmp_path / "last.ckpt", tmp_path / "two.safetensors", None if full else base)
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert "(Trainer checkpoint)" in inspect(tmp_path / "last.ckpt")


def test_half_precision_is_rounded_once_and_the_loss_is_reported(tmp_path):
    torch.manual_seed(0)
    model = mlp().bfloat16()
    ll.inject(model, ll.LoRAConfig(rank=2))
    with torch.no_grad():
        for p in ll.lora_parameters(model):
            p.add_(0.01 * torch.randn_like(p))
    ll.save_adapter(model, tmp_path / "adapter")
    base = load_file(base_file(mlp, tmp_path, torch.bfloat16))
    merged = merge_state(read_source(tmp_path / "adapter").saved, base)
    assert merged.state["0.weight"].dtype == torch.bfloat16
    errors, updates = [], []
    for name in ("0", "3"):
        update = model.get_submodule(name).lora["default"]["weight"]
        weight = base[f"{name}.weight"].float()
        exact = weight + update.product(weight)
        found = merged.state[f"{name}.weight"]
        assert torch.equal(found, rounded(exact, torch.bfloat16)), "as the model computes with it"
        assert torch.equal(found, model.get_submodule(name).weight)
        errors.append((found.float() - exact).flatten())
        updates.append((exact - weight).flatten())
    error, update = torch.cat(errors), torch.cat(updates)
    assert merged.largest == pytest.approx(error.abs().max().item())
    assert merged.relative == pytest.approx((error.norm() / update.norm()).item(), rel=1e-4)
    assert merged.relative > 0


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path):
    model = trained(mlp)
    ll.save_adapter(model, tmp_path / "adapter")
    base, out = base_file(mlp, tmp_path), tmp_path / "out.safetensors"
    state = load_file(base)
    cases = [
        (trained_base(1), "another base model: [0-9]+ of"),
        ({n: t for n, t in state.items() if n != "3.weight"}, "no weight 3.weight"),
        ({**state, "3.weight": torch.zeros(2, 2)}, r"3.weight is \(2, 2\), in the adapter \(12, 16\)"),
        ({**state, "3.weight": state["3.weight"].int()}, "3.weight is torch.int32"),
        ({**state, "3.weight": torch.full((12, 16), 6e4).half()}, "NaN or infinity. Nothing was written"),
    ]
    saved = read_source(tmp_path / "adapter").saved
    saved.tensors["3.lora_B"].fill_(1e4)
    for weights, told in cases:
        with pytest.raises(ll.UserError, match=told):
            merge_state(saved, weights, check_base=not told.startswith("NaN"))
    tied = torch.nn.Linear(12, 16).weight.detach()
    with pytest.raises(ll.AdapterFileError, match=r"3.weight is also x.weight: merge the model itself"):
        merge_state(saved, {**state, "3.weight": (t := state["3.weight"]), "x.weight": t})
    del tied
    out.write_text("mine")
    with pytest.raises(ll.UserError, match="exists: give another name, or overwrite=true"):
        merge_files(tmp_path / "adapter", out, base)
    assert out.read_text() == "mine"
    merge_files(tmp_path / "adapter", out, base, overwrite=True)
    for other, told in (("x.pt", "ends in .safetensors"), ("no/x.safetensors", "there is no folder")):
        with pytest.raises(ll.UserError, match=told):
            merge_files(tmp_path / "adapter", tmp_path / other, base)
    with pytest.raises(ll.UserError, match="give base=FILE"):
        merge_files(tmp_path / "adapter", tmp_path / "new.safetensors")
    with pytest.raises(ll.UserError, match="there is no such file"):
        merge_files(tmp_path / "adapter", tmp_path / "new.safetensors", tmp_path / "x.safetensors")


def trained_base(seed):
    torch.manual_seed(seed)
    return mlp().state_dict()


def test_a_run_of_another_origin_is_not_executed(tmp_path):
    """The configuration beside a downloaded adapter must not be able to run anything."""
    ll.save_adapter(trained(mlp), tmp_path / "run" / "adapter")
    for target in (
        "os.system",
        "lora_lightning.models.timm.sys.exit",
        "lora_lightning.models.timm.timm_model",
    ):
        nested = {"_target_": "os.system", "command": "touch x"} if "timm" in target else {}
        config = {"model": {"_target_": target, "options": nested}, "data": {}}
        (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
        with pytest.raises(ll.UserError, match="not run unasked"):
            merge_files(tmp_path / "run" / "adapter", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["merge"], "give ckpt=PATH and out=FILE.safetensors"),
        (["merge", "ckpt=a", "out=b", "bsae=c"], "bsae=c: there is no such option. Did you mean 'base'?"),
        (["merge", "ckpt=a", "ckpt=b"], "ckpt: is given twice"),
        (["merge", "ckpt=", "overwrite=yes"], "overwrite=yes: give true or false"),
        (["merge", "ckpt=nowhere", "out=x.safetensors"], "ckpt=nowhere: there is no such file or folder"),
        (["inspect", "a", "b"], "give one path"),
        (["inspect", "a", "bsae=c"], "Did you mean 'base'?"),
    ],
)
def test_mistakes_on_the_command_line(words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_the_page_of_an_adapter_a_checkpoint_and_a_merged_file(tmp_path, capsys):
    ll.save_adapter(trained(vit, holder=Classifier), tmp_path / "adapter")
    base = base_file(vit, tmp_path)
    main(["inspect", str(tmp_path / "adapter"), f"base={base}"])
    page = capsys.readouterr().out
    for told in (
        "VisionTransformer · fingerprint", "of 30 frozen tensors · the same here", "LoRA, alpha 4, scaling",
        "blocks.*.mlp.fc1", "‖ΔW‖/‖W‖ %", "Roy & Vetterli 2007", "trained in full: head",
    ):  # fmt: skip
        assert told in page
    main(["merge", f"ckpt={tmp_path / 'adapter'}", f"out={tmp_path / 'm.safetensors'}", f"base={base}"])
    assert "rounding lost nothing" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "m.safetensors")])
    assert "(merged weights)" in (page := capsys.readouterr().out) and "VisionTransformer" in page
    ll.save_adapter(trained(vit), tmp_path / "peft", format="peft")
    main(["inspect", str(tmp_path / "peft")])
    assert "(PEFT's format)" in capsys.readouterr().out
    for file, told in (
        (base, "written neither by a run nor by lora-lightning merge"),
        (tmp_path / "x.ckpt", "holds code"),
    ):
        torch.save({"state_dict": main}, tmp_path / "x.ckpt")
        with pytest.raises(ll.AdapterFileError, match=told):
            inspect(file)


@pytest.mark.parametrize(("build", "options"), CASES)
def test_inspect_shows_the_spectra_of_the_updates_in_the_file(build, options, tmp_path):
    model = trained(build, **{**options, "use_dora": False})
    ll.save_adapter(model, tmp_path)
    shown, found = inspect(tmp_path, base_file(build, tmp_path)), ll.spectra(model)
    table = [line.split() for line in shown.splitlines() if "×" in line or line.startswith("all ")]
    ranks, norms = ([getattr(s, n) for s in found.values()] for n in ("effective_rank", "norm"))
    for values, form in ((ranks, "{:.1f}"), (norms, "{:.3g}"), ([*map(relative, found.values())], "{:.2f}")):
        for end in (min(values), max(values)):
            assert any(form.format(end) in row for row in table)


def relative(spectrum):
    return 100 * spectrum.relative


def test_one_of_several_adapters_of_a_checkpoint(tmp_path):
    model = trained(vit, holder=Classifier)
    ll.add_adapter(model, "other")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for update in layer.updates("other"):
                update.lora_B.add_(0.1 * torch.randn_like(update.lora_B))
    state = {n: t for n, t in model.state_dict().items() if "lora" in n or "head" in n}
    save_checkpoint({"state_dict": state, KEY: checkpoint_entry(model)}, tmp_path / "last.ckpt")
    base, x = base_file(vit, tmp_path), BATCH[vit]()
    for name in ("default", "other"):
        ll.set_adapter(model, name)
        out = tmp_path / f"{name}.safetensors"
        main(["merge", f"ckpt={tmp_path / 'last.ckpt'}", f"out={out}", f"base={base}", f"adapter={name}"])
        plain = vit()
        plain.load_state_dict(load_file(out))
        assert torch.allclose(plain.eval()(x), model.eval()(x), atol=1e-5)
    with pytest.raises(ll.UserError, match=r"adapter=othr: .* holds default, other.*Did you mean 'other'"):
        read_source(tmp_path / "last.ckpt", "othr")


def test_a_damaged_merged_file_is_told(tmp_path):
    ll.save_adapter(trained(mlp), tmp_path / "adapter")
    out, base = tmp_path / "out.safetensors", base_file(mlp, tmp_path)
    merge_files(tmp_path / "adapter", out, base)
    merge_files(tmp_path / "adapter", tmp_path / "twice.safetensors", out, check_base=False)
    assert "(merged weights)" in inspect(out)
    raw = bytearray(out.read_bytes())
    raw[-5] ^= 1
    out.write_bytes(raw)
    for use in (
        lambda: inspect(out),
        lambda: merge_files(tmp_path / "adapter", tmp_path / "x.safetensors", out, check_base=False),
        lambda: read_base(out),
    ):
        with pytest.raises(ll.AdapterFileError, match="is damaged: it does not match its checksum"):
            use()
    assert not (tmp_path / "x.safetensors").exists()


def test_pictures_on_a_full_disk_are_one_message_too(monkeypatch, capsys):
    def full(words):
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setitem(COMMANDS, "predict", full)
    with pytest.raises(SystemExit) as caught:
        main(["predict", "images=x"])
    assert caught.value.code == 2
    told = "a.png cannot be written: No space left on device. Make room, or give another place.\n"
    assert capsys.readouterr().err == told
