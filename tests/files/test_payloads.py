"""Nothing that comes with a run's folder is executed: each payload is refused by one message; and the proof
that each would create a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from payloads import (
    BY_HYDRA,
    NODES,
    RESOLVERS,
    TASKS,
    TIMM,
    apply_plan,
    config_for,
    other_letters,
    refusal,
    use,
)
from torchvision.io import write_png

import lora_lightning as ll
from lora_lightning.app.foreign import KNOWN
from lora_lightning.app.predict import predict
from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.files.allowed import BUILDERS, DEEPEST, MOST, plain_values
from lora_lightning.files.locate import read_source

pytestmark = pytest.mark.usefixtures("resolver")


@pytest.mark.parametrize("name", NODES)
def test_each_payload_would_run(name, marker):
    """The control: whoever does what the nodes say creates the marker, and Hydra does what these say."""
    with contextlib.suppress(RuntimeError):  # of torch, about what it has unpickled
        apply_plan(NODES[name](marker))
    assert marker.exists()


@pytest.mark.parametrize("name", BY_HYDRA)
def test_hydra_itself_refuses_few(name, marker):
    with contextlib.suppress(InstantiationException):  # of torch again
        instantiate(OmegaConf.create(NODES[name](marker)))
    assert marker.exists()


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("name", NODES)
def test_a_run_builds_no_foreign_model(name, command, run, marker):
    node = NODES[name](marker)
    (run / "config.yaml").write_text(yaml.safe_dump({**config_for(command), "model": node}))
    told = refusal(lambda: use(command, run), marker)
    assert f"model._target_={node['_target_']} is not run unasked" in told
    assert str(run / "config.yaml") in told


# Where a node can stand in a run's configuration: what is put there, and the key that is told.
PLACES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "an option": (lambda n: {"model.img_size": n}, "model.img_size._target_"),
    "deep": (lambda n: {"model.a": {"b": {"c": n}}}, "model.a.b.c._target_"),
    "a list": (lambda n: {"model.sizes": [1, [n]]}, "model.sizes.1.0._target_"),
    "the data": (lambda n: {"data": n}, "data._target_"),
    "an option of the data": (lambda n: {"data.train_size": n}, "data.train_size._target_"),
    "a reference": (lambda n: {"evil": n, "model.img_size": "${evil}"}, "model.img_size._target_"),
    "two references": (
        lambda n: {"a": {"b": ["${evil}"]}, "evil": n, "model.img_size": "${a.b}"},
        "model.img_size.0._target_",
    ),
    "the section by reference": (lambda n: {"evil": n, "model": "${evil}"}, "model._target_"),
    "a target by reference": (
        lambda n: {"evil": n, "model": {**n, "_target_": "${evil._target_}"}},
        "model._target_",
    ),
    "a target in parts": (
        lambda n: {"x": n["_target_"][:5], "y": n["_target_"][5:], "model": {**n, "_target_": "${x}${y}"}},
        "model._target_",
    ),
    "positional": (lambda n: {"model._args_": [n]}, "model._args_"),
    "partial": (lambda n: {"model._partial_": True, "model.x": n}, "model._partial_"),
}


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_builds_nothing_within(place, command, run, marker):
    made, key = PLACES[place]
    node = NODES["mkdir"](marker)
    config = config_for(command)
    for path, value in made(node).items():
        section, _, name = path.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    told = refusal(lambda: use(command, run), marker)
    assert f"{key}=" in told and "is not run unasked" in told


@pytest.mark.parametrize(
    "target", [other_letters(TIMM), f"{TIMM}\u200b", TIMM.upper(), f"{TIMM}.__globals__", ["x"]]
)
def test_names_that_look_alike_are_others(target, run, marker):
    (run / "config.yaml").write_text(yaml.safe_dump({**config_for("merge"), "model": {"_target_": target}}))
    assert "model._target_=" in refusal(lambda: use("merge", run), marker)


FACTS = {
    "a fact": lambda n: {"num_classes": n},
    "in a list": lambda n: {"class_names": ["a", n]},
    "in a mapping": lambda n: {"vocabulary": {"a": {"b": n}}},
    "by reference": lambda n: {"evil": n, "num_classes": "${evil}"},
    "the file itself": lambda n: n,
}


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("place", FACTS)
def test_facts_are_plain(place, command, run, marker):
    (run / "config.yaml").write_text(yaml.safe_dump(config_for(command)))
    (run / "provides.yaml").write_text(yaml.safe_dump(FACTS[place](NODES["mkdir"](marker))))
    told = refusal(lambda: use(command, run), marker)
    assert f"{run / 'provides.yaml'}: " in told and "is not run unasked" in told


@pytest.mark.parametrize("name", BY_HYDRA[:3])
def test_facts_beside_a_recipe_are_plain(name, run, marker):
    """The recipe is ours, what the run's data said of themselves is not."""
    (run / "config.yaml").write_text(yaml.safe_dump(config_for("predict")))
    (run / "provides.yaml").write_text(yaml.safe_dump({"num_classes": NODES[name](marker)}))
    (run / "images").mkdir()
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(run / "images" / "a.png"))
    options = {"adapter": str(run / "adapter"), "out": str(run / "out"), "images": str(run / "images")}
    told = refusal(lambda: predict(options, ["recipe=fcos_shapes"]), marker)
    assert "num_classes._target_=" in told and "is not run unasked" in told


@pytest.mark.parametrize("file", ["config.yaml", "provides.yaml"])
@pytest.mark.parametrize("command", TASKS)
def test_tags_of_yaml_build_nothing(command, file, run, marker):
    tagged = f"model: !!python/object/apply:os.system ['touch {marker}']\n"
    (run / "config.yaml").write_text(yaml.safe_dump(config_for(command)))
    (run / file).write_text(tagged)
    told = refusal(lambda: use(command, run), marker)
    assert f"{run / file} cannot be read" in told and "Nothing in it was run" in told
    yaml.unsafe_load(tagged)
    assert marker.exists()


@pytest.mark.parametrize("text", [*RESOLVERS, "${evil:MARKER}", "a${evil:MARKER}b", "${${x}:MARKER}", "${"])
def test_resolvers_are_not_evaluated(text, run, marker):
    text = text.replace("MARKER", str(marker))
    for place in ({"model.img_size": text}, {"model._target_": text}, {"model.img_size": "${x}", "x": text}):
        config = config_for("merge")
        for path, value in place.items():
            section, _, name = path.partition(".")
            config.update({section: {**config[section], name: value} if name else value})
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert "is not evaluated" in refusal(lambda: use("merge", run), marker)
    (run / "config.yaml").write_text(yaml.safe_dump(config_for("merge")))
    (run / "provides.yaml").write_text(yaml.safe_dump({"num_classes": text}))
    assert "is not evaluated" in refusal(lambda: use("merge", run), marker)


def test_the_resolver_would_run(marker):
    assert OmegaConf.create({"x": f"${{evil:{marker}}}"}).x == 1
    assert marker.exists()


def test_references_end(run):
    where = run / "config.yaml"
    for values, told in (
        ({"model": "${a}", "a": "${model}"}, "refers to itself"),
        ({"model": {"a": "${model}"}}, "refers to itself"),
        ({"model": "${nothing.here}"}, "which the file does not have"),
        (
            {"model": "${a}", **{chr(i): [f"${{{chr(i + 1)}}}"] * 9 for i in range(97, 110)}, "n": 1},
            "holds too much",
        ),
        ({"model": b"bytes"}, "no plain value"),
        ({"model": {("a", "b"): 1}}, "which is no word"),
    ):
        with pytest.raises(ll.UserError, match=told):
            plain_values(values, "model", where)
    assert MOST > 10_000 and DEEPEST > 10
    values = {"model": {"a": "${b.0}", "c": "x${b.1}"}, "b": [[1], 2]}
    assert plain_values(values, "model", where) == {"a": [1], "c": "x2"}


@pytest.mark.parametrize(
    "damage", ["trainer.accelerator", "trainer.precision", "data.batch_size", "trainer", "data"]
)
def test_predict_refuses_what_is_no_option(damage, run, marker):
    config = config_for("predict")
    section, _, name = damage.partition(".")
    (run / "provides.yaml").write_text("num_classes: 2\n")
    node = NODES["mkdir"](marker)
    config[section] = {**config[section], name: node} if name else [node]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"{damage}=" in refusal(lambda: use("predict", run), marker)


def test_the_lists_are_those_of_the_configuration():
    """Whatever `conf/` names can be built again and resumed, and a list names what exists."""
    from lora_lightning.app.compose import CONF, RECIPES

    named: dict[str, set[str]] = {}
    for path in [*CONF.rglob("*.yaml"), *RECIPES.rglob("*.yaml")]:
        group = path.parent.name
        lines = (line.strip() for line in path.read_text().splitlines())
        named.setdefault(group, set()).update(
            line[9:].strip() for line in lines if line.startswith("_target_:")
        )
    for section, names in BUILDERS.items():
        assert named[section] == set(names)
    assert set().union(*named.values()) <= KNOWN
    assert all(name in KNOWN for names in BUILDERS.values() for name in names)


def test_a_run_of_ones_own_is_rebuilt(tmp_path):
    """Also where its data are of the user's own class: what they said stands in the run's folder."""
    from lora_lightning.models.timm import timm_model

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm_model("vit_tiny_patch16_224", num_classes=3, **options)
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path / "run" / "adapter")
    config = config_for("merge") | {"size": 16, "data": {"_target_": "photos.Photos"}}
    config["model"] |= options | {"img_size": "${size}"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    source = read_source(tmp_path / "run" / "adapter")
    with pytest.raises(ll.UserError, match=r"data\._target_=photos\.Photos is not run unasked"):
        rebuilt_model(source.config(), source)
    (tmp_path / "run" / "provides.yaml").write_text("num_classes: 3\nclass_names: [a, b, c]\nrate: 0.5\n")
    rebuilt, facts = rebuilt_model(source.config(), source)
    ll.eject(model)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    assert facts["class_names"] == ["a", "b", "c"]
    for facts in ({"num_classes": "3"}, {"class_names": "abc"}, {"category_ids": ["1"]}):
        (tmp_path / "run" / "provides.yaml").write_text(yaml.safe_dump(facts))
        with pytest.raises(ll.UserError, match="the file is damaged"):
            source.facts()
    (tmp_path / "run" / "provides.yaml").write_text("{}")
    config["model"]["img_sze"] = 4
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ll.UserError, match=r"(?s)the base cannot be rebuilt as .*img_sze=4"):
        rebuilt_model(source.config(), source)
