"""The check of command lines: what passes, what is named, and what near miss is offered."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.application import main
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import Configurations, recipe_config, shipped, without_hydra
from lora_lightning.app.variants import from_groups, parted
from lora_lightning.errors import ConfigError

GOOD = [
    "",
    "recipe=resnet_digits",
    "recipe=vit_cifar data=cifar100 data.root=/datasets data.download=true",
    "recipe=vit_cifar model.checkpoint=weights.safetensors data.num_workers=0 data.augment.mixup=0",
    "recipe=pretrain_vit_digits data.train_size=100",
    "lora.rank=16 lora.alpha=32 lora.target_modules=[qkv,proj] lora.rank_pattern={qkv:4}",
    "lora.target_modules='.*(qkv|proj)'",
    "lora.regularizer.frobenius=1e-4 lora.regularizer.outputs=1",
    "lora.regularizer={frobenius:1e-4}",
    "-m lora.rank=2,4,8 seed=range(0,3)",
    "lora.rank=2,4 --multirun model=glob(*_digits)",
    "hparams_search=grid schedule.warmup=0",
    "trainer=ddp_sim trainer.devices=3 logger=many tags=[a,b]",
    "+trainer.fast_dev_run=true ~recipe logger=none",
    "trainer.fast_dev_run=true lora.implementation=reference",  # in no file: what the classes take
    "method=full lora.rank=8",  # LoRA is compared with it
    "debug=profile compare=[] method=full",
    "callbacks.learning_rate=null callbacks.checkpoint.save_top_k=3",
    "hydra.run.dir=somewhere --cfg job --resolve",
    "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping +callbacks.stop.monitor=val/acc",
]

BAD = [
    ("lora.rank=0", ["lora.rank=0", "at least 1"]),
    ("lora.rank=abc", ["lora.rank=abc: give a whole number"]),
    ("lora.rnk=4", ["lora.rnk=4", "Did you mean 'lora.rank'?"]),
    ("+lora.rnk=4", ["lora.rnk", "Did you mean 'rank'?"]),
    ("rank=4", ["rank=4", "Did you mean 'lora.rank'?"]),
    ("epochs=4", ["epochs=4", "'trainer.max_epochs'"]),
    ("recipe=vit_digts", ["recipe=vit_digts", "Did you mean 'vit_digits'", "resnet_digits"]),
    ("modle=vit_digits", ["modle=vit_digits", "'model'"]),
    ("model=null", ["model=null", "give one of"]),
    ("trainer={max_epochs:3}", ["trainer=", "trainer.KEY=VALUE"]),
    ("trainer.max_epochs=0", ["trainer.max_epochs=0"]),
    ("trainer.max_epochs=-1", ["trainer.max_epochs=-1", "trainer.max_steps"]),
    ("model.drop_rate=0.1", ["+model.drop_rate=VALUE"]),
    ("+trainer.max_epoch=3", ["trainer.max_epoch=3", "'max_epochs'"]),
    ("+trainer.logger=true", ["trainer.logger", "logger=NAME"]),
    ("trainer.precision=8", ["trainer.precision=8", "bf16-mixed"]),
    ("trainer.strategy=dpp", ["trainer.strategy=dpp", "Did you mean 'ddp'"]),
    ("trainer=fsdp trainer.accelerator=cpu", ["FSDPStrategy needs GPUs", "trainer=ddp_sim"]),
    ("trainer.num_nodes=2", ["trainer.num_nodes=2", "torchrun"]),
    ("optim.lr=-1", ["optim.lr=-1"]),
    ("optim.betas=[0.9]", ["optim.betas"]),
    ("seed=1.5", ["seed=1.5"]),
    ("seed=-1", ["seed=-1"]),
    ("tags=first", ["tags=first", "list"]),
    ("lora.regularizer.forbenius=1", ["Did you mean 'lora.regularizer.frobenius'?"]),
    ("lora.regularizer.l2=-1", ["1 problem", "lora.regularizer.l2=-1: give a finite weight of at least 0"]),
    (
        "lora.regularizer={output:1,l2:x,heads:inf}",
        ["3 problems", "lora.regularizer.output=1", "'lora.regularizer.outputs'", ".l2=x", ".heads=inf"],
    ),
    ("lora.regularizer=l2", ["lora.regularizer=l2: give a mapping to weights, such as {frobenius: 1.0e-4}"]),
    ("lora.init=pissa lora.regularizer.l2=1", ["lora.regularizer.l2=1", "lora.init='pissa'", "frobenius"]),
    ("method=full compare=[] lora.regularizer.l2=1", ["method=full", "does not use it"]),
    ("method=peft compare=[] lora.regularizer.l2=1", ["method=peft", "does not use it"]),
    ("rates.linear_probe=0", ["rates.linear_probe=0"]),
    ("rates.lora=0", ["1 problem", "rates.lora=0"]),
    ("rates.linear_prob=1", ["rates.linear_prob=1", "'rates.linear_probe'"]),
    ("recipe=vit_cifar data.batch_size=0", ["data.batch_size=0"]),
    ("data=cifar10 data.name=cifar11", ["data.name=cifar11", "Did you mean 'cifar10'"]),
    ("data.domain=taget", ["data.domain=taget", "Did you mean 'target'"]),
    ("data=cifar10 recipe=pretrain_vit_digits", ["data.domain=source", "takes no such option"]),
    ("model._target_=nowhere.model", ["model._target_=nowhere.model", "cannot be imported"]),
    ("~task._target_ +task._target_=torch.nn.Linear", ["task.in_features", "Linear needs it"]),
    ("method=full lora.rank=3 compare=[]", ["lora.rank=3", "method=full does not use it"]),
    ("method=bitfit compare=[none,full] lora.rank=3", ["lora.rank=3", "compare=[none,full] does not use it"]),
    ("method=peft lora.implementation=reference compare=[]", ["lora.implementation", "method=peft does not"]),
    ("method=none optim.lr=1e-3", ["optim.lr=1e-3", "method=none"]),
    ("compare=[] rates.full=1e-3", ["rates.full=1e-3", "method=lora does not use it"]),
    ("method=lorra", ["method=lorra: give one of none, linear_probe", "Did you mean 'lora'?"]),
    ("compare=[foo,lora]", ["compare=[foo,lora]: give a list of methods"]),
    ("compare=[lora,lora]", ["each once"]),
    ("compare=true", ["compare=true: give a list of methods"]),
    ("lora.rank=2,4", ["lora.rank=2,4", "-m", "[2,4]"]),
    ("-m lora.rank=2,0,x", ["lora.rank=0", "lora.rank=x:"]),
    ("-m model=vit_digits,foo", ["model=foo"]),
    ("-m lora.rank=interval(1,3)", ["lora.rank=interval(1,3)"]),
    ("hparams_search=grid lora.dropout=1", ["lora.dropout=1"]),
    ("lora.target_modules=.*(qkv|proj)", ["lora.target_modules=.*(qkv|proj)", "quotes"]),
    ("lora.rank=${nowhere}", ["lora.rank", "nowhere"]),
    ("recipe vit_digits", ["recipe=VALUE"]),
    ("--lora.rank=4", ["--lora.rank=4", "give lora.rank=4"]),
    ("--multirn", ["--multirn", "'--multirun'"]),
    ("--config-dir nowhere", ["--config-dir nowhere"]),
    ("--cfg jobs", ["--cfg", "job"]),
    ("hydra.run.dir=null", ["hydra.run.dir=null"]),
    ("hydra.rn.dir=x", ["hydra.rn.dir=x", "'hydra.run.dir'"]),
    ("hydra/launcher=foo", ["hydra/launcher=foo", "basic"]),
    ("+recipe=vit_cifar", ["+recipe=vit_cifar"]),
    ("+seed=3", ["+seed=3", "leave out the plus"]),
    ("ckpt_path=nowhere.ckpt", ["ckpt_path=nowhere.ckpt", "does not exist"]),
]  # fmt: skip


def check_command_line(words: list[str]) -> None:
    CommandLine(words).check()


@pytest.mark.parametrize("line", GOOD)
def test_a_good_line_passes(line: str) -> None:
    check_command_line(line.split())


@pytest.mark.parametrize(("line", "told"), BAD, ids=[line for line, _ in BAD])
def test_a_bad_line_is_told_what_and_how(line: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command_line(line.split())
    for words in told:
        assert words in str(caught.value)
    assert all("\n" not in problem for problem in caught.value.problems)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer.accelerator=gpu.*trainer=cpu"):
        check_command_line(["trainer=gpu"])


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_command_line(["trainer=ddp", "trainer.devices=2"])
    with pytest.raises(ConfigError, match=r"trainer.devices=3.*shows 2"):
        check_command_line(["trainer=ddp", "trainer.devices=3"])
    with pytest.raises(ConfigError, match=r"trainer.devices=\[0,2\].*shows 2"):
        check_command_line(["trainer=ddp", "trainer.devices=[0,2]"])


def test_all_problems_come_together() -> None:
    words = ["lora.rank=0", "optim.lr=x", "recipe=foo", "sed=1", "trainer.max_epochs=a", "--fast"]
    with pytest.raises(ConfigError) as caught:
        check_command_line(words)
    assert len(caught.value.problems) == len(words)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    """Found by --config-dir, inherits a recipe, and its values are checked like typed ones."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    text = "# @package _global_\ndefaults:\n  - vit_digits\nlora:\n  rank: 2\n"
    (folder / "mine.yaml").write_text(text)
    (folder / "bad.yaml").write_text(text.replace("rank: 2", "rank: 0\n  typo: 1"))
    check_command_line(["recipe=mine", "--config-dir", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"lora\.rank=0") as caught:
        check_command_line(["recipe=bad", f"--config-dir={tmp_path}"])
    assert "lora.typo" in str(caught.value)


def test_flags_may_stand_anywhere() -> None:
    line = CommandLine(["lora.rank=2,4", "-m", "~recipe", "--cfg", "job"])
    assert line.for_hydra() == ["--multirun", "--cfg=job", "lora.rank=2,4", "~recipe"]


def problems_of_line(words: list[str]) -> list[str]:
    try:
        check_command_line(words)
    except ConfigError as error:
        return error.problems
    return []


PLAIN = [
    "recipe=resnet_digits lora.rank=16 lora.alpha=32 +trainer.fast_dev_run=true ++seed=3 ++trainer.new=1",
    "recipe=vit_cifar ~data.crop_pct +lora.rank_pattern={qkv:4} lora.target_modules=[qkv,proj] tags=[a,b]",
    "callbacks.learning_rate=null +callbacks.stop={_target_:a.b} '~seed=0' trainer.max_time={hours:5}",
]


@pytest.mark.parametrize("line", PLAIN)
def test_a_value_is_set_as_hydra_sets_it(line: str) -> None:
    """What the runs of a sweep are checked as is what Hydra will compose for each."""
    words, problems = shlex.split(line), []
    groups, values = parted(shipped(), CommandLine(words).overrides, problems)
    ours, true = from_groups(shipped(), groups, values, problems), shipped().compose(words)
    assert problems == [] and ours is not None
    assert OmegaConf.to_yaml(without_hydra(ours)) == OmegaConf.to_yaml(without_hydra(true))


def test_values_are_told_from_groups_by_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take Hydra longer than all else in the check of a value."""
    asked: list[str] = []
    listing = ConfigLoaderImpl.get_group_options

    def noted(loader: ConfigLoaderImpl, group: str, *args: object) -> list[str]:
        asked.append(group)
        return listing(loader, group, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ConfigLoaderImpl, "get_group_options", noted)
    words = ["lora.rank=3", "optim.lr=1e-3", "seed=1", "nowhere/at=all", "data/augment=none", "trainer=cpu"]
    groups, values = parted(Configurations(), CommandLine(words).overrides, [])
    assert groups == words[4:] and len(values) == 4
    assert asked == ["", "data/augment", "trainer"]


def test_a_run_is_composed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what was checked is what runs."""
    composed: list[object] = []
    compose = ConfigLoaderImpl.load_configuration

    def counted(*args: object, **options: object) -> object:
        composed.append(compose(*args, **options))  # type: ignore[arg-type]
        return composed[-1]

    def run(config: DictConfig, _: object) -> None:
        assert config.lora.rank == 3 and Path(config.run_dir) == tmp_path / "run"
        context = HydraConfig.get()
        assert (context.mode, context.job.name) == (RunMode.RUN, "train")
        assert list(context.overrides.task) == ["lora.rank=3"]
        composed.append(config)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr("lora_lightning.app.train.train", run)
    arguments = list(sys.argv)
    main(["lora.rank=3", "hydra.run.dir=run"])
    assert len(composed) == 2 and (tmp_path / "run" / ".hydra" / "overrides.yaml").is_file()
    assert sys.argv == arguments and not HydraConfig.initialized()  # nothing is left for another run


def test_a_recipe_within_an_application_of_hydra(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert recipe_config("vit_digits")["lora"]["rank"]
        assert compose("theirs").a == 1


def test_a_recipe_that_was_changed_between_two_runs_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    for rank in (0, -1):
        (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\nlora: {{rank: {rank}}}\n")
        told = problems_of_line(["recipe=mine", "--config-dir", str(tmp_path), "sed=1"])
        assert told[1].startswith(f"lora.rank={rank}: ")


GROUPS = shipped().groups()


@pytest.mark.parametrize("value", ["null", "[]", "[null]", "[1,a]", "{}", "{a:null}", "3", "true", "''"])
def test_a_group_is_given_no_wrong_kind_of_value(value: str) -> None:
    for group in GROUPS:
        problems = problems_of_line([f"{group}={value}"])
        assert len(problems) == 1 and problems[0].startswith(f"{group}="), (group, problems)


@pytest.mark.parametrize("value", ["3", "[1]", "null"])
def test_a_section_of_an_adapter_is_given_no_wrong_kind_of_value(value: str) -> None:
    for section in ("lora", "trainer", "optim", "rates", "data"):
        problems = problems_of_line([f"adapters={{a:{{{section}:{value}}}}}"])
        assert problems and all(p.startswith("adapters.a: ") for p in problems), (section, problems)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("data=shapes", ["data._target_", "task=detection", "recipe=fcos_shapes"]),
        ("recipe=fcos_shapes data=digits", ["data._target_", "task=classification"]),
        ("recipe=accent_espeak model=whisper", ["model._target_", "task=seq2seq", "recipe=whisper_manifest"]),
    ],
)
def test_data_and_models_of_another_task(line: str, told: list[str]) -> None:
    problems = "\n".join(problems_of_line(line.split()))
    assert all(words in problems for words in told), problems


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.seconds=10", []),
        ("model.seconds=10 data.max_seconds=8", []),
        (
            "model.seconds=10 data.max_seconds=12",
            ["data.max_seconds=12", "at most data.max_seconds=10"],
        ),
        ("data.max_seconds=31", ["data.max_seconds=31", "model.seconds=30"]),
        ("model.seconds=31", ["model.seconds=31", "from 1 to 30"]),
        ("model.seconds=2.5", ["model.seconds=2.5", "whole number from 1 to 30"]),
    ],
)
def test_recordings_longer_than_whisper_hears_are_told_before_anything_is_built(
    line: str, told: list[str]
) -> None:
    line = f"recipe=whisper_manifest data.manifest=recordings.csv {line}"
    problems = [p for p in problems_of_line(line.split()) if "seconds" in p]
    assert len(problems) == bool(told) and all(words in problems[0] for words in told), problems


@pytest.mark.parametrize(
    "text", ["defaults: [null]\n", "defaults: 3\n", "a: [\n", "- 1\n", "\tx: 1\n", "!!python/name:os.x\n"]
)
def test_a_recipe_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    problems = problems_of_line(["recipe=mine", "--config-dir", str(tmp_path)])
    assert len(problems) == 1 and problems[0].startswith("recipe=mine: "), problems


PHOTOS = "class Photos:\n    def __init__(self, batch_size=3, seed=0, domain=1, train_size=2): ...\n"


def test_a_class_of_ones_own_beside_the_recipe_or_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "recipe", "above"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "ours_here.py").write_text(PHOTOS)
    (tmp_path / "recipe" / "ours_beside.py").write_text(PHOTOS)
    (tmp_path / "ours_above.py").write_text(PHOTOS)
    (tmp_path / "here" / "numpy.py").write_text(PHOTOS)
    text = "# @package _global_\ndefaults:\n  - vit_digits\ndata:\n  _target_: ours_beside.Photos\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    check_command_line(["data._target_=ours_here.Photos"])
    for words in (["--config-dir", ".."], ["hydra.searchpath=[..]"]):
        check_command_line(["recipe=mine", *words])
        check_command_line(["recipe=mine", *words, "data._target_=ours_above.Photos"])
    assert "Did you mean 'Photos'" in problems_of_line(["data._target_=ours_here.Phots"])[0]
    hidden = problems_of_line(["data._target_=numpy.Photos"])  # what is installed keeps its name
    assert "numpy.py of this folder is hidden by" in hidden[0]
    assert "there is no folder nowhere" in problems_of_line(["hydra.searchpath=[nowhere]"])[0]
