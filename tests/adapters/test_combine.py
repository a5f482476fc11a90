"""Adapters made into one, against straightforward dense references."""

import copy

import pytest
import torch
from small import BATCHES, cnn, encoder, mlp, vit
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers

WEIGHTS = [0.5, 0.8, 0.2]
NAMES = ["one", "two", "three"]


class Families(nn.Module):
    """Every way a weight factorizes: linear, grouped, depthwise, transposed, embedding, RNN, attention."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 9)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.transposed = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.embedding = nn.Embedding(11, 6, padding_idx=2)
        self.lstm = nn.LSTM(5, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.parts = nn.MultiheadAttention(6, 2)
        self.low = nn.Linear(6, 9).to(torch.bfloat16)


EVERY = ["linear", "depthwise", "transposed", "embedding", "lstm.weight_ih_l0", "attention.in_proj",
         "attention.out_proj", "low"]  # fmt: skip
# "two" updates the whole of weights of which the others update rows, and leaves a layer out.
SETTINGS = {
    "one": {"rank": 2, "target_modules": [*EVERY, "grouped", "parts.in_proj.q", "lstm.weight_hh_l0.f"]},
    "two": {
        "rank": 3, "target_modules": [*EVERY, "parts.in_proj", "lstm.weight_hh_l0"], "use_rslora": True,
        "rank_pattern": {"depthwise": 1, "transposed": 2},
    },
    "three": {
        "rank": 1, "alpha": 5,
        "target_modules": [*EVERY, "grouped", "parts.in_proj.q", "parts.in_proj.k", "lstm.weight_hh_l0.o"],
    },
}  # fmt: skip


@torch.no_grad()
def families() -> nn.Module:
    torch.manual_seed(0)
    model = Families()
    for i, (name, options) in enumerate(SETTINGS.items()):
        config = ll.LoRAConfig(modules_to_save=None, **options)
        ll.add_adapter(model, name, config) if i else ll.inject(model, config, adapter=name)
    for layer in lora_layers(model).values():
        for parameter in layer.lora.parameters():
            parameter.normal_()
    return model


@torch.no_grad()
def dense(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's whole update of every weight, by an independent path: the effective weight less W."""
    selected = model.lora_state.active
    ll.set_adapter(model, name)
    twin = copy.deepcopy(model).double()
    ll.set_adapter(model, *selected)
    return {
        f"{n}.{w}": layer.read(w) - layer.base_weight(w)
        for n, layer in lora_layers(twin).items()
        for w in layer.properties
    }


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_linear_is_the_exact_sum_for_every_family():
    model = families()
    assert len({n.partition(".")[0] for n in dense(model, "one")}) == 9
    before = {n: dense(model, n) for n in NAMES}
    errors = ll.combine(model, NAMES, WEIGHTS, into="sum")
    assert set(errors.values()) <= {0.0} | {e for e in errors.values() if e < 1e-6}
    after = dense(model, "sum")
    for key, value in after.items():
        wanted = sum(w * before[n][key] for w, n in zip(WEIGHTS, NAMES))
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[n][k], v) for n in NAMES for k, v in dense(model, n).items())
    assert model.lora_state.active == ("one",)
    ranks = {p.name: p.rank for p in model.lora_state.adapters["sum"].plan.layers}
    assert ranks["linear"] == 6 and ranks["grouped"] == 3  # 2 + 3 + 1, where all three update it; 2 + 1
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora.sum." in n)


def test_the_row_of_padding_stays_zero():
    model = families()
    with torch.no_grad():
        for name in NAMES:
            model.embedding.lora[name]["weight"].lora_A[:, 2] = 0
    for i, options in enumerate([{}, {"method": "svd", "rank": 2}, {"method": "ties", "density": 0.5}]):
        ll.combine(model, NAMES, WEIGHTS, into=f"sum{i}", **options)
        assert dense(model, f"sum{i}")["embedding.weight"][2].abs().max() < 1e-6


def reference_svd(model: nn.Module, merged: dict[str, Tensor], rank: int):
    """The best approximation of each group's matrix, by a dense decomposition of it."""
    best, lost = {}, {}
    for name, layer in model.named_modules():
        for key in (k for k in merged if k.rpartition(".")[0] == name):
            delta, groups = merged[key], getattr(layer, "groups", 1)
            if layer.__class__.__name__.endswith("Conv1d") and groups == layer.in_channels:
                groups = 1
            parts = delta.reshape(groups, delta.shape[0] // groups, -1)
            U, S, V = torch.linalg.svd(parts, full_matrices=False)
            kept = U[..., :rank] @ (S[:, :rank, None] * V[:, :rank])
            best[key] = kept.reshape(delta.shape)
            lost[key] = relative(kept, parts)
    return best, lost


@pytest.mark.parametrize("rank", [1, 2, 20])
def test_svd_is_the_best_approximation_and_reports_its_error(rank):
    model = families()
    whole = {"linear", "grouped", "depthwise", "transposed", "embedding", "low"}
    deltas = [dense(model, n) for n in NAMES]
    merged = {
        k: sum(w * d[k] for w, d in zip(WEIGHTS, deltas)) for k in deltas[0] if k.split(".")[0] in whole
    }
    errors = ll.combine(model, NAMES, WEIGHTS, into="short", method="svd", rank=rank)
    after = dense(model, "short")
    best, lost = reference_svd(model, merged, rank)
    for key, wanted in best.items():
        torch.testing.assert_close(after[key], wanted, rtol=1e-4, atol=1e-4)
        name = key.rpartition(".")[0]
        assert errors[name] == pytest.approx(lost[key], abs=1e-5)
        assert errors[name] == pytest.approx(relative(after[key], merged[key]), abs=1e-5)
    assert (max(errors.values()) < 1e-5) == (rank == 20)


def ties(vectors: list[Tensor], weights: list[float], density: float, trimmed=None) -> Tensor:
    """Algorithm 1 of Yadav et al., entry by entry, on flat task vectors."""
    if trimmed is None:
        trimmed = []
        for v in vectors:
            keep = round(density * len(v))
            largest = sorted(range(len(v)), key=lambda i: -abs(v[i]))[:keep]
            trimmed.append(torch.tensor([v[i] if i in set(largest) else 0.0 for i in range(len(v))]))
    merged = []
    for entries in zip(*(t.tolist() for t in trimmed)):
        total = sum(entries)
        sign = (total > 0) - (total < 0)
        agreeing = [w * e for w, e in zip(weights, entries) if e * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged)


@torch.no_grad()
def three(build) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    for i, name in enumerate(NAMES):
        config = ll.LoRAConfig(rank=2 + i, train_norm="affine")
        ll.add_adapter(model, name, config) if i else ll.inject(model, config, adapter=name)
        ll.set_adapter(model, name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_as_published(build, density):
    model = three(build)
    deltas = [dense(model, n) for n in NAMES]
    flat = [torch.cat([d.flatten() for d in delta.values()]) for delta in deltas]
    wanted = ties(flat, WEIGHTS, density)
    errors = ll.combine(model, NAMES, WEIGHTS, into="ties", method="ties", density=density, rank=1000)
    got = torch.cat([d.flatten() for d in dense(model, "ties").values()])
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-3, atol=1e-4)
    assert max(errors.values()) < 1e-5
    errors = ll.combine(model, NAMES, WEIGHTS, into="short", method="ties", density=density, rank=2)
    short = torch.cat([d.flatten() for d in dense(model, "short").values()])
    assert 0.05 < relative(short, got) <= max(errors.values())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_as_published(method):
    """Each adapter's entries are zero or divided by the density, at about the rate asked; the same seed
    gives the same adapter; and the parts are put together as their sum or by elected signs."""
    model, density = three(mlp), 0.3
    deltas = {n: dense(model, n) for n in NAMES}

    def merged(names, weights, into, **options):
        ll.combine(model, names, weights, into=into, method=method, density=density, rank=99, **options)
        return dense(model, into)

    kept = merged(["one"], [1.0], "kept", seed=5)
    for key, delta in deltas["one"].items():
        ratio = kept[key] / delta
        zero, scaled = ratio.abs() < 1e-2, (ratio - 1 / density).abs() < 1e-2
        assert (zero | scaled).float().mean() > 0.99
        assert abs(scaled.float().mean() - density) < 0.15
    again, other = merged(["one"], [1.0], "again", seed=5), merged(["one"], [1.0], "other", seed=6)
    assert all(torch.equal(again[k], v) for k, v in kept.items())
    assert not any(torch.equal(other[k], v) for k, v in kept.items())
    total = torch.zeros(())
    for seed in range(40):
        total = total + merged(["one", "two"], [0.5, 0.25], f"many{seed}", seed=seed)["3.weight"]
        ll.delete_adapter(model, f"many{seed}")
    if method == "dare_linear":  # unbiased
        wanted = 0.5 * deltas["one"]["3.weight"] + 0.25 * deltas["two"]["3.weight"]
        assert relative(total / 40, wanted) < 0.4


def test_dare_ties_elects_signs():
    model = three(mlp)
    flat = [torch.cat([d.flatten() for d in dense(model, n).values()]) for n in NAMES]
    ll.combine(model, NAMES, WEIGHTS, into="all", method="dare_ties", density=1, rank=99)
    got = torch.cat([d.flatten() for d in dense(model, "all").values()])
    wanted = ties(flat, WEIGHTS, 1.0, trimmed=flat)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-3, atol=1e-4)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n}


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
def test_heads_and_norms_are_averages_and_the_result_selects_saves_and_loads(build, tmp_path):
    model = three(build)
    own = {}
    for name in NAMES:
        ll.set_adapter(model, name)
        own[name] = {
            n: p.clone() for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n
        }
    ll.combine(model, NAMES, WEIGHTS, into="sum")
    ll.set_adapter(model, "sum")
    assert own["one"].keys() == {
        n for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n
    }
    for name in own["one"]:
        mean = sum(w * own[a][name] for w, a in zip(WEIGHTS, NAMES)) / sum(WEIGHTS)
        torch.testing.assert_close(model.get_parameter(name), mean)
    x = BATCHES[build]()
    ll.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = build().eval()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    config = model.lora_state.config
    assert ll.plan(build(), config) == model.lora_state.plan
    assert ll.plan(build(), config).trainable == model.lora_state.plan.trainable
    assert model.lora_state.plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_wrong_options_are_all_named_and_the_model_is_untouched():
    model = three(mlp)
    ll.add_adapter(model, "dora", ll.LoRAConfig(rank=1, use_dora=True))
    names, weights = ["one", "dora"], [1.0, float("nan")]
    with pytest.raises(ll.ConfigError) as error:
        ll.combine(model, names, weights, into="two", method="tie", rank=0, density=2)
    assert len(error.value.problems) == 6
    for says in (
        "finite numbers",
        "into='two'",
        "Did you mean 'ties'",
        "rank=0",
        "density=2",
        "dora use DoRA",
    ):
        assert says in str(error.value)
    for options, says in [
        ({"method": "ties"}, "density=None: ties drops entries: give"),
        ({"rank": 4}, "rank=4.*linear is exact"),
        ({"weights": [1.0]}, "give one for each"),
        ({"weights": [1.0, -1.0]}, "differs between the adapters, and an average needs"),
        ({"into": "two words"}, "identifier"),
    ]:
        arguments = {"weights": [1.0, 1.0], "into": "sum", **options}
        with pytest.raises(ll.ConfigError, match=says):
            ll.combine(model, ["one", "two"], **arguments)
    with pytest.raises(ll.UserError, match="no adapter 'onne'"):
        ll.combine(model, ["onne"], [1.0], into="sum")
    assert ll.adapter_names(model) == [*NAMES, "dora"]


def test_weights_below_zero_take_a_change_away_where_there_is_no_head():
    model = families()
    ll.combine(model, ["one", "one"], [1.0, -1.0], into="nothing")
    assert all(d.abs().max() < 1e-5 for d in dense(model, "nothing").values())
