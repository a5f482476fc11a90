"""Layers whose names are near each other, to PEFT and back: the same ranks there as here."""

import peft
import pytest
import torch
from peft_models import built, logits, shaken
from torch import Tensor, nn

import lora_lightning as ll

pytestmark = pytest.mark.filterwarnings("ignore")


class Near(nn.Module):
    """`layer.1`, `layer.11`, `layer_1`, `layer11` and `outer.layer.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))
        self.layer_1, self.layer11 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layer, self.layer_1, self.layer11, *self.outer["layer"]]:
            x = x + layer(x).tanh()
        return x


def ranks_in_peft(model: nn.Module) -> dict[str, int]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n.removeprefix("base_model.model."): m.r["default"] for n, m in layers.items()}


def ranks(plan: ll.Plan) -> dict[str, int]:
    return {p.name: p.rank for p in plan.layers}


OURS = [
    ({"target_modules": "all", "rank_pattern": {"layer.1": 2}}, {"layer.1": 2, "outer.layer.1": 2}),
    ({"target_modules": "all", "rank_pattern": {r"^layer\.1": 2}}, {"layer.1": 2}),
    ({"target_modules": "all", "rank_pattern": {"layer_1": 2, "layer.1?": 1}}, None),
    ({"target_modules": r"layer\.1|layer11", "alpha_pattern": {"layer11": 7}}, {}),
    ({"target_modules": "all", "rank": 9}, {}),  # capped at 6
]


@pytest.mark.parametrize(("options", "others"), OURS)
def test_ranks_are_the_same_in_peft(options, others, tmp_path):
    model = built(Near)
    config = ll.LoRAConfig(**{"rank": 3, "modules_to_save": None, **options})
    planned = ll.inject(model, config)
    if others is not None:
        assert {n: r for n, r in ranks(planned).items() if r != min(config.rank, 6)} == others
    x = torch.randn(4, 6)
    expected = logits(shaken(model), x)
    ll.save_adapter(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(built(Near), tmp_path)
    assert ranks_in_peft(theirs) == ranks(planned)
    assert (logits(theirs, x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    again = built(Near)
    ll.load_adapter(again, tmp_path)
    assert (logits(again, x) - expected).abs().max() <= 1e-6 * expected.abs().max()


THEIRS = [
    {"target_modules": ["layer.1", "layer.11", "layer_1", "layer11"], "rank_pattern": {r"^layer\.1": 2}},
    {"target_modules": ["layer.1", "layer_1", "layer11"], "rank_pattern": {"layer.1": 2}},  # a dot is any
    {"target_modules": r"layer\.1|layer_1", "alpha_pattern": {r"layer\.1": 5}},
    {"target_modules": r"layer\.\d+|layer11", "rank_pattern": {r"layer\.(1|11)": 2, r"layer\.2": 1}},
]


@pytest.mark.parametrize("options", THEIRS)
@pytest.mark.parametrize("within", [False, True], ids=["bare", "in a module"])
def test_an_adapter_added_after_loading_from_peft_is_planned_as_it_was_there(options, within, tmp_path):
    theirs = shaken(peft.get_peft_model(built(Near), peft.LoraConfig(r=3, lora_alpha=6, **options)))
    theirs.save_pretrained(tmp_path)
    model = nn.ModuleDict({"net": built(Near)}) if within else built(Near)
    ll.load_adapter(model, tmp_path)
    top = "net." if within else ""
    planned = ll.add_adapter(model, "second")
    assert ranks(planned) == {f"{top}{n}": r for n, r in ranks_in_peft(theirs).items()}
    assert {*planned.layers} == {*model.lora_state.adapters["default"].plan.layers}
    ll.save_adapter(model, tmp_path / "ours")  # and held one level further down, or up
    again = built(Near) if within else nn.ModuleDict({"net": built(Near)})
    ll.load_adapter(again, tmp_path / "ours")
    assert sorted(ranks(ll.add_adapter(again, "second")).values()) == sorted(ranks(planned).values())
