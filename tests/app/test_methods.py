"""The methods by their one word: what trains, what stays as it was, what lies in the run's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning.app.application import main
from lora_lightning.app.build import compared_config, optim_config
from lora_lightning.app.compose import shipped, without_hydra
from lora_lightning.app.launch import quiet
from lora_lightning.app.methods import ADAPTING, METHODS, compared, method_problems, unused_option
from lora_lightning.app.prepare import in_words
from lora_lightning.app.run import Run
from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.layers.norm import is_norm
from lora_lightning.models.timm import timm_model

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
EXCLUDE = re.compile(r"lora\.exclude_modules=\[\S+\]")
QUICK = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none", "hydra.run.dir=run"]
SMALL = {"linear_probe", "norm_only", "bitfit"}


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(*words: str) -> Run:
    config = shipped().compose([*words, "compare=[]"])
    return Run(without_hydra(config, "run"), "run")


def base() -> torch.nn.Module:
    return timm_model("vit_tiny_patch16_224", checkpoint="vit_digits", num_classes=10, **VIT)


@pytest.mark.parametrize("recipe", ["vit_digits", "resnet_digits"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says(recipe: str, method: str) -> None:
    words = [f"recipe={recipe}", f"method={method}"]
    if (recipe, method) == ("resnet_digits", "peft"):
        with pytest.raises(ConfigError, match="PEFT cannot adapt") as refused:
            run_of(*words)
        words.append(EXCLUDE.search(str(refused.value))[0])
    run = run_of(*words)
    if method == "lora":  # the callback injects
        ll.inject(run.task, run.prepared.adapting)
    named = dict(run.task.model.named_parameters())
    trains = {n for n, p in named.items() if p.requires_grad}
    modules = dict(run.task.model.named_modules())
    head = {n for n in trains if n.startswith(("head.", "fc."))}
    norms = {n for n in named if is_norm(modules[n.rpartition(".")[0]])}
    wanted = {
        "none": set(named),  # nothing is frozen, and nothing trained
        "full": set(named),
        "linear_probe": head,
        "bitfit": head | {n for n in named if n.endswith("bias")},
        "norm_only": head | norms,
    }
    assert head
    if method in wanted:
        assert trains == wanted[method]
        assert (run.prepared.trained == 0) == (method == "none")
    else:
        assert trains - head == {n for n in named if ".lora_" in n} != set()
    if method != "none":
        assert run.prepared.trained == sum(named[n].numel() for n in trains)


def test_peft_has_the_very_layers_ranks_and_scaling_of_lora() -> None:
    words = ["lora.rank_pattern={qkv:4}", "lora.dropout=0.25", "lora.alpha=24", "lora.train_norm=affine"]
    ours, theirs = (run_of(f"method={m}", *words) for m in ("lora", "peft"))
    assert ours.prepared.plan == theirs.prepared.plan
    assert ours.prepared.trained == theirs.prepared.trained
    for layer in theirs.prepared.plan.layers:
        module = theirs.task.get_submodule(layer.module)
        assert module.lora_A.default.weight.shape[0] == layer.rank
        assert module.scaling["default"] == layer.alpha / layer.rank
        assert module.lora_dropout.default.p == 0.25


def test_a_model_without_such_parts() -> None:
    whisper_like = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2))
    from lora_lightning import LoRAConfig
    from lora_lightning.app.prepare import parts_of

    for method, what in (("bitfit", "biases"), ("norm_only", "normalization layers")):
        with pytest.raises(
            ConfigError, match=rf"Sequential has no .*{what} outside of its head for method={method}"
        ):
            parts_of(whisper_like, method, LoRAConfig())


def test_each_method_has_its_own_rate() -> None:
    words = ["optim.lr=0.5", "optim.head_lr=0.25", "rates.bitfit=0.125"]
    config = without_hydra(shipped().compose(words), "run")
    assert (optim_config(config).lr, optim_config(config).head_lr) == (0.5, 0.25)
    rates = {m: optim_config(compared_config(config, m, "x")) for m in METHODS}
    assert {o.head_lr for o in rates.values()} == {None}
    assert {m: o.lr for m, o in rates.items() if m != "none"} == {
        "lora": 4e-3, "peft": 4e-3, "norm_only": 3.2e-2, "bitfit": 0.125, "linear_probe": 0.1, "full": 2e-3,
    }  # fmt: skip
    alone = without_hydra(shipped().compose(["method=full"]), "run")
    assert optim_config(alone).lr == 2e-3


def test_the_order_of_the_table() -> None:
    assert compared("lora", []) == compared("lora", None) == ["lora"]
    assert compared("lora", ["none", "full"]) == ["none", "full", "lora"]
    assert compared("full", ["none", "full", "lora"]) == ["none", "full", "lora"]


@pytest.mark.parametrize(
    "method",
    ["bitfit", *(pytest.param(m, marks=pytest.mark.slow) for m in ("peft", "linear_probe", "norm_only"))],
)
def test_a_run_leaves_an_adapter_of_what_it_trained(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"method={method}", *QUICK])
    told = capsys.readouterr().out
    assert f"{METHODS[method].label}: trains {METHODS[method].trains}" in told
    assert [r["method"] for r in json.loads(Path("run/results.json").read_text())] == [method]
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    trained = {n.removeprefix("model."): v for n, v in best.items() if n.startswith("model.") and v.numel()}
    model, plain = base(), base().state_dict()
    ll.load_adapter(model, "run/adapter")
    state = model.state_dict()
    if method in SMALL:
        assert all(torch.equal(state[n], v) for n, v in trained.items())
        changed = {n for n, v in state.items() if not torch.equal(v, plain[n])}
        assert changed == trained.keys()  # and the base is what it was
        assert len(load_file("run/adapter/adapter_model.safetensors")) == len(trained)


@pytest.mark.parametrize("method", ["bitfit", pytest.param("peft", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_what_it_has_trained(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"method={method}", *QUICK])
    began = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    main(["resume=run", "trainer.max_epochs=2"])
    assert "run/checkpoints/last.ckpt" in capsys.readouterr().out
    ended = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert (began["epoch"], ended["epoch"]) == (0, 1)
    assert began["state_dict"].keys() == ended["state_dict"].keys()


def test_what_peft_has_trained_loads_in_peft_and_here() -> None:
    from peft import PeftModel

    main(["method=peft", "lora.train_norm=affine", *QUICK])
    theirs = PeftModel.from_pretrained(base(), "run/adapter").eval()
    ours = base()
    ll.load_adapter(ours, "run/adapter")
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(x), theirs(x))
    assert not torch.equal(ours(x), base().eval()(x))
    run = run_of("method=peft", "lora.train_norm=affine")
    run.task.load_state_dict(torch.load("run/checkpoints/best.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(run.task.eval()(x), theirs(x))
    with run.task.as_before():
        torch.testing.assert_close(run.task(x), base().eval()(x))
    torch.testing.assert_close(run.task(x), theirs(x))
    facts = json.loads(Path("run/report/run.json").read_text())
    assert {"acc", "ece_raw"} <= facts["before"]["scores"].keys()


def test_a_run_of_full_fine_tuning_tells_what_the_base_scores(capsys: pytest.CaptureFixture[str]) -> None:
    main(["method=none", "debug=fast", "logger=none", "hydra.run.dir=base"])
    main(["method=full", *QUICK])
    tested, told = (
        json.loads(Path(f"{name}.json").read_text()) for name in ("base/results", "run/report/run")
    )
    before = told["before"]["scores"]
    assert {name: tested[0]["scores"][name] for name in ("acc", "f1")} == pytest.approx(
        {name: before[name] for name in ("acc", "f1")}
    )
    assert "after training, 99.0 % before." in capsys.readouterr().out  # in the source domain
    left = load_file("run/model.safetensors")  # written after the test
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(left[name], best[f"model.{name}"]) for name in left)
    changed = {row["name"] for row in json.loads(Path("run/report/updates.json").read_text())}
    plain = base().state_dict()
    assert changed == {name for name, now in left.items() if not torch.equal(now, plain[name])} != set()


def test_without_training_the_base_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    main(["method=none", "debug=fast", "logger=none", "hydra.run.dir=run"])
    told = capsys.readouterr().out
    assert "trains nothing: the base is tested" in told and "before adaptation" in told
    assert not {"adapter", "model.safetensors", "checkpoints"} & {p.name for p in Path("run").iterdir()}


@pytest.mark.slow
def test_a_comparison_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            *QUICK,
            "recipe=resnet_digits",
            f"compare=[{','.join(METHODS)}]",
            "lora.exclude_modules=[layer3.0.conv2,layer4.0.conv1,layer4.0.conv2]",
        ]
    )
    told = capsys.readouterr().out
    results: list[dict[str, Any]] = json.loads(Path("run/results.json").read_text())
    assert [r["method"] for r in results] == list(METHODS)
    for result in results:
        assert f"{METHODS[result['method']].label}: test accuracy" in told
    for method in ADAPTING:
        if method != "lora":
            kept = torch.load(f"run/{method}/checkpoints/best.ckpt", weights_only=True)["state_dict"]
            assert sum(v.numel() for v in kept.values()) < 1.1 * next(
                r["trained"] for r in results if r["method"] == method
            )
    with pytest.raises(AdapterFileError):  # of another method
        ll.load_adapter(base(), "run/linear_probe")


@pytest.mark.parametrize(
    ("method", "others"),
    [("none", 16), ("none", ["full", 3]), ([], ["full"]), ("none", [{}]), ("lora", "full")],
)
def test_what_no_method_is_leaves_the_question_to_the_check_of_methods(method, others):
    assert unused_option("lora.rank", method, others) is None
    assert unused_option("lora.rank", "none", None) is not None
    assert method_problems({"method": method, "compare": others, "tune": None}) == []


@pytest.mark.parametrize(
    "words",
    [["lora.rank=auto", "lora.init=eva"], pytest.param(["lora.init=lora_one"], marks=pytest.mark.slow)],
)
def test_what_data_decide_is_in_the_table_and_the_adapter(words: list[str], capsys) -> None:
    run = run_of(
        "recipe=vit_digits", "debug=fast", "trainer.enable_progress_bar=false", "lora.data_batches=1", *words
    )
    before = run.prepared.plan
    told = in_words("lora", run.label, run.prepared)
    assert "decided when the training data are seen" in told and "trainable" not in told
    capsys.readouterr()
    with quiet():  # as a command has it
        result = run.train_and_test([])
    plan = run.task.lora_state.plan
    assert capsys.readouterr().out.count(str(plan)) == 1
    assert run.prepared.plan == plan and before.by_data != plan.by_data and "1 batch" in plan.by_data
    assert (
        result.trained == plan.trainable == sum(p.numel() for p in run.task.parameters() if p.requires_grad)
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "peft", "lora": {"rank": "auto"}}, "method=peft: lora.rank=auto is decided by data"),
        (
            {"method": "lora", "compare": ["peft"], "lora": {"rank": 8, "init": "eva"}},
            "compare has peft: lora.init=eva is decided by data in method=lora alone",
        ),
        (
            {"method": "lora", "tune": "rank", "lora": {"rank": "auto"}},
            "tune=rank: lora.rank=auto is decided by data",
        ),
    ],
)
def test_what_only_method_lora_can_leave_to_data(values: dict[str, Any], told: str) -> None:
    (problem,) = method_problems({"compare": [], "tune": None, **values})
    assert problem.startswith(told)
