"""Inits and ranks by data against independent computations, for every layer family: inputs by the Jacobian
of the layer's output, attention and RNNs by hand, gradients by autograd."""

import numpy as np
import pytest
import torch
from families import CASES, base_model, config
from small import BATCHES, adapted, cnn, encoder, pretrained
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached

import lora_lightning as ll
from lora_lightning.adapters.state import update_of
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers.registry import slots_of
from lora_lightning.utils.names import submodule

CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}
LOOKED_UP = [n for n in CASES if n.startswith("Embedding")]
UNSEEN = {"own-class", "LSTM-projected", *LOOKED_UP}
NORMED = {"StdConv2d", "own-forward", "own-conv-forward"}  # what multiplies is made of the weight
QUICK = {
    "Conv1d-same-circular", "Conv2d-groups", "Conv2d-depthwise-twice", "Conv2dSame", "ConvTranspose2d-groups",
    "Attention-q-v", "Attention-bias-k", "EncoderLayer", "LSTM-deep", "GRU-packed", "LSTMCell", "LSTM-state",
    "Linear", "Conv1D", "weight-norm-conv", "spectral-norm",
}  # fmt: skip
PLAIN = [n for n, case in CASES.items() if "use_dora" not in case.options]


def some(names, quick=QUICK):
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
    )


def scalar(model: nn.Module, batch) -> Tensor:
    """A loss of whatever a case gives."""
    out = model(*batch)
    while not isinstance(out, Tensor) or not out.is_floating_point():
        out = out[0] if isinstance(out, (tuple, list)) and not hasattr(out, "data") else out.data
    return (
        out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    ).sum() + out.square().sum()


def by_jacobian(model, module, parameter, slot, batch) -> Tensor:
    """XᵀX of each group: what an output changes by when a weight does is the input that it is multiplied
    with."""
    with cached():
        weight = getattr(module, parameter)
        out = model(*batch)
        out = out[0] if isinstance(out, tuple) else out
        eye = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        (J,) = torch.autograd.grad(out, weight, eye, is_grads_batched=True)
    if slot.transposed:  # transformers' Conv1D
        J = J.mT
    J = J.reshape(len(J), slot.groups, -1, J[0].numel() // J.shape[1])
    return torch.einsum("ogck,ogcl->gkl", J, J) / J.shape[2]


def moments(rows: Tensor) -> Tensor:
    return (rows.mT @ rows).unsqueeze(0)


def recurrent(
    layer: nn.RNNBase, parameter: str, sequences: list[Tensor], hidden: Tensor | None, cell_state
) -> Tensor:
    """By cells, a sequence at a time."""
    kind = next(k for k in CELLS if isinstance(layer, k))
    ways = 2 if layer.bidirectional else 1
    sums = {}
    for number, sequence in enumerate(sequences):
        x = sequence
        for depth in range(layer.num_layers):
            outs = []
            for way in range(ways):
                suffix = f"_l{depth}" + "_reverse" * way
                options = {"nonlinearity": layer.nonlinearity} if kind is nn.RNN else {}
                cell = CELLS[kind](x.shape[1], layer.hidden_size, layer.bias, dtype=x.dtype, **options)
                for name, p in cell.named_parameters():
                    p.data = getattr(layer, name + suffix).detach()
                place = depth * ways + way
                h = x.new_zeros(layer.hidden_size) if hidden is None else hidden[place, number]
                c = torch.zeros_like(h) if cell_state is None else cell_state[place, number]
                z, found = x.flip(0) if way else x, []
                for row in z:
                    for name, rows in ((f"weight_ih{suffix}", row), (f"weight_hh{suffix}", h)):
                        sums[name] = sums.get(name, 0) + torch.outer(rows, rows)
                    if kind is nn.LSTM:
                        h, c = cell(row, (h, c))
                    else:
                        h = cell(row, h)
                    found.append(h)
                out = torch.stack(found)
                outs.append(out.flip(0) if way else out)
            x = torch.cat(outs, 1)
    return sums[parameter].unsqueeze(0)


@torch.no_grad()
def of_rnn(name, layer, parameter, batch):
    x, *state = batch
    if name.endswith("unbatched"):
        x = x.unsqueeze(1)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    lengths = [i % x.shape[0] + 1 if "packed" in name else x.shape[0] for i in range(x.shape[1])]
    sequences = [x[:length, i] for i, length in enumerate(lengths)]
    return recurrent(layer, parameter, sequences, *[*state, None, None][:2])


def independent(name: str, model: nn.Module, layer, slot, batch) -> Tensor:
    """XᵀX of a planned layer, (groups, columns, columns)."""
    module = submodule(model, layer.module)
    if isinstance(module, nn.MultiheadAttention):
        given = dict(zip("qkv", (batch * 3)[:3], strict=True))
        rows = [given[layer.slot.removeprefix("in_proj.")[0]]] if layer.slot != "in_proj" else [batch[0]]
        return moments(rows[0].flatten(0, -2))
    if isinstance(module, nn.RNNBase):
        return of_rnn(name, module, slot.parameter, batch)
    if isinstance(module, nn.RNNCellBase):
        hidden = (
            batch[1]
            if len(batch) > 1
            else torch.zeros(len(batch[0]), module.hidden_size, dtype=torch.float64)
        )
        return moments(batch[0] if slot.parameter == "weight_ih" else hidden)
    if "ConvTranspose" in type(module).__name__ or name == "weight-norm-transposed":
        x = batch[0] if batch[0].dim() == len(module.kernel_size) + 2 else batch[0].unsqueeze(0)
        rows = x.movedim(1, -1).reshape(-1, slot.groups, x.shape[1] // slot.groups)
        return torch.einsum("tgk,tgl->gkl", rows, rows)
    if name in NORMED:
        x = batch[0]
        if x.dim() == 4:
            x = nn.functional.unfold(x, module.kernel_size, padding=module.padding).movedim(1, -1)
        return moments(x.flatten(0, -2))
    if name == "EncoderLayer" and layer.module.endswith("out_proj"):
        attention = model.layer.self_attn
        return by_jacobian(attention, module, slot.parameter, slot, batch * 3)
    if name in ("EncoderLayer", "fused-qkv"):
        seen = []
        with torch.no_grad():
            handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
            model(*batch)
            handle.remove()
        if seen:
            return moments(seen[0].flatten(0, -2))
    return by_jacobian(model, module, slot.parameter, slot, batch)


@some([n for n in PLAIN if n not in UNSEEN])
def test_eva_begins_with_the_leading_directions_of_the_inputs(name):
    model, wanted = base_model(name, torch.float64), base_model(name, torch.float64)
    wanted.train()
    for module in wanted.modules():
        module.training = not isinstance(module, (nn.Dropout, nn.MultiheadAttention)) and module.training
    for module in wanted.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    batches = [CASES[name].inputs(torch.float64) for _ in range(2)]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = ll.inject(model, config(name, init="eva"), data=batches, loss=scalar)
    for layer in plan.layers:
        slot = slots_of(layer.module, submodule(wanted, layer.module))[layer.slot]
        second = sum(independent(name, wanted, layer, slot, batch) for batch in batches).detach().numpy()
        update = update_of(model, layer, "default")
        A = update.lora_A.detach().numpy().reshape(slot.groups, layer.rank, -1)
        for directions, XX in zip(A, second, strict=True):
            energies = np.linalg.eigvalsh(XX)[::-1][: layer.rank]
            scale = np.linalg.norm(XX)
            np.testing.assert_allclose(directions @ directions.T, np.eye(layer.rank), atol=1e-9)
            np.testing.assert_allclose(directions @ XX @ directions.T, np.diag(energies), atol=1e-6 * scale)
        assert not update.lora_B.any()
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@some(
    PLAIN, {"Conv2d-groups", "ConvTranspose2d-groups", "Embedding-sparse", "LSTM-gates", "weight-norm-conv"}
)
def test_lora_one_begins_with_a_step_down_the_gradient(name):
    """s·B·A is the best approximation of -∇L, of spectral norm s / γ."""
    model, twin = base_model(name, torch.float64), base_model(name, torch.float64)
    batches = [CASES[name].inputs(torch.float64) for _ in range(2)]
    for module in (*model.modules(), *twin.modules()):
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.eval()
    with cached():
        plan = ll.plan(twin, config(name, init="lora_one"))
        places = [(submodule(twin, p.module), p) for p in plan.layers]
        slots = [slots_of(p.module, m)[p.slot] for m, p in places]
        weights = [getattr(m, slot.parameter) for (m, _), slot in zip(places, slots, strict=True)]
        total = sum(scalar(twin, batch) for batch in batches) / 2
        gradients = torch.autograd.grad(total, weights)
    planned = ll.inject(model, config(name, init="lora_one"), data=batches, loss=scalar)
    assert planned == plan
    for layer, slot, gradient in zip(plan.layers, slots, gradients, strict=True):
        part = slot.of(gradient.to_dense()).numpy()
        groups = part.reshape(slot.groups, part.shape[0] // slot.groups, -1)
        update = update_of(model, layer, "default")
        found = update.product(torch.empty(layer.shape)).detach().numpy().reshape(groups.shape)
        decomposed = [np.linalg.svd(-matrix, full_matrices=False) for matrix in groups]
        largest = max(S[0] for _, S, _ in decomposed) or 1.0  # of zeros
        for (U, S, V), ours in zip(decomposed, found, strict=True):
            wanted = (U[:, : layer.rank] * S[: layer.rank]) @ V[: layer.rank]
            np.testing.assert_allclose(ours, update.scaling * wanted / (128 * largest), atol=1e-9)


@pytest.mark.parametrize("name", ["Embedding", "LSTM-projected", "own-class"])
def test_inputs_that_nothing_shows_are_refused_by_name(name):
    reasons = {
        "Embedding": r"layer look up rows.*exclude_modules, or give them ranks in rank_pattern",
        "LSTM-projected": r"layer\.weight_hr_l0, layer\.weight_hr_l0_reverse project within their RNN",
        "own-class": r"nothing shows the inputs of layer: no batch reaches them",
    }
    model = base_model(name)
    with pytest.raises(UserError, match=rf"rank='auto': {reasons[name]}"):
        ll.inject(model, config(name, rank="auto"), data=[CASES[name].inputs()])
    assert not hasattr(model, "lora_state") and all(p.requires_grad for p in model.parameters())


def test_weights_that_others_read_are_seen():
    """Of an encoder in eval mode torch calls neither linear1 nor out_proj."""
    torch.manual_seed(0)
    batches = [BATCHES[encoder]() for _ in range(2)]
    ranks = []
    for mode in (True, False):
        model = pretrained(encoder).train(mode)
        plan = ll.inject(model, ll.LoRAConfig(rank="energy:0.8"), data=batches)
        ranks.append({p.name: (p.rank, p.explained) for p in plan.layers})
    assert ranks[0] == ranks[1] and len(ranks[0]) == 8
    assert all(share >= 0.8 for _, share in ranks[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinv2_cr_tiny_ns_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_architectures_whose_parents_read_the_weights(name):
    """Their attention multiplies with `qkv.weight` and never calls `qkv`."""
    import timm

    size = {"img_size": 64} if "swin" in name else {"img_size": 56, "patch_size": 14, "depth": 2}
    model = timm.create_model(name, num_classes=3, **size)
    plan = ll.inject(
        model, ll.LoRAConfig(rank="auto", init="eva"), data=[torch.randn(2, 3, *[size["img_size"]] * 2)]
    )
    assert any(p.name.endswith("qkv") for p in plan.layers) and all(p.explained for p in plan.layers)


def test_tied_weights_are_measured_in_the_adapted_layer_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(9, 4, dtype=torch.float64)
    ll.inject(
        model.double(),
        ll.LoRAConfig(rank=1, target_modules=["0"], modules_to_save=None, init="eva"),
        data=[x],
    )
    A = model[0].lora["default"]["weight"].lora_A.detach()
    torch.testing.assert_close((A @ x.T @ x @ A.T).squeeze(), torch.linalg.eigvalsh(x.T @ x)[-1])


@torch.no_grad()
def test_nothing_of_the_model_is_changed():
    """Buffers, modes, flags, gradients, attributes and random numbers."""
    layers = (nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
    model(torch.randn(2, 3, 8, 8))
    model.kept, model.seen = {"sum": torch.zeros(2), "all": [1]}, []
    model[0].requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)

    def step(model, batch):
        model.seen.append(1)
        model.kept["sum"].add_(1)
        model.kept["all"].append(model.seen)
        model.other = 3
        return model(batch).square().sum()

    buffers = {n: b.clone() for n, b in model.named_buffers()}
    numbers = torch.get_rng_state()
    with pytest.raises(UserError, match="the data give no batch"):
        ll.inject(model, ll.LoRAConfig(init="eva"), data=[], loss=step)
    with pytest.raises(UserError, match=r"init='eva': .*: its inputs hold NaN"):
        ll.inject(model, ll.LoRAConfig(init="eva"), data=[torch.full((2, 3, 8, 8), torch.nan)], loss=step)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.seen == [] and model.kept["all"] == [1] and not model.kept["sum"].any()
    assert not hasattr(model, "other") and all(m.training for m in model.modules())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert model[3].weight.requires_grad and model[3].weight.grad.eq(1).all()


def test_what_is_missing_is_said():
    model = pretrained(cnn)
    for options, told in (
        (
            {"rank": "auto"},
            r"rank='auto': decided by data: give inject\(model, config, data=BATCHES\), or use",
        ),
        (
            {"init": "lora_one"},
            r"init='lora_one': decided by data: give inject\(.*loss=FUNCTION\) of the model",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            ll.inject(model, ll.LoRAConfig(**options))
    with pytest.raises(UserError, match="init='lora_one': a step returns no loss"):
        ll.inject(model, ll.LoRAConfig(init="lora_one"), data=[BATCHES[cnn]()], loss=lambda m, b: m(b))
    with pytest.raises(UserError, match="have no memory yet"):
        ll.inject(pretrained(cnn).to("meta"), ll.LoRAConfig(init="eva"), data=[BATCHES[cnn]()])
    with pytest.raises(ConfigError, match="decided by data on a model that is not adapted yet"):
        ll.add_adapter(adapted(cnn), "other", ll.LoRAConfig(init="eva"))


def test_layers_without_a_gradient_begin_as_by_default():
    """A and B of zero would never train."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x)

    model = Half()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None, init="lora_one"),
              data=[torch.randn(3, 4)], loss=lambda m, x: m(x).sum())  # fmt: skip
    used, idle = (layer.lora["default"]["weight"] for layer in (model.used, model.idle))
    assert used.lora_A.any() and used.lora_B.any()
    assert idle.lora_A.any() and not idle.lora_B.any()


@pytest.mark.parametrize("rank", [2, "auto"])
def test_a_head_of_zeros_which_lets_no_gradient_through_is_told(rank):
    """As a fresh one is: the updates would begin as by default, and every rank that gradients decide be 1."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = ll.LoRAConfig(rank=rank, target_modules=["0"], modules_to_save=["1"], init="lora_one")
    with pytest.raises(UserError, match=r"the gradient of every adapted layer is zero.*give init='eva'"):
        ll.inject(model, config, data=[torch.randn(3, 4)], loss=lambda m, x: m(x).square().sum())
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
