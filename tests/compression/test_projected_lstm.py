"""compress on LSTMs against numpy and torch's own layers: errors, states, readers, what stays as it is."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lora_lightning as ll
from lora_lightning.compression.recurrent import Stack

H = 12
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Tagger(nn.Module):
    """A linear layer at every step of an LSTM."""

    def __init__(self, layers=2, **options):
        super().__init__()
        self.lstm = nn.LSTM(5, H, layers, **options)
        self.head = nn.Linear(H * (1 + self.lstm.bidirectional), 7)

    def forward(self, x, lengths=None):
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, self.lstm.batch_first, enforce_sorted=False)
        out = self.lstm(x)[0]
        if lengths is not None:
            out, _ = pad_packed_sequence(out, self.lstm.batch_first)
        return self.head(out)


class Streaming(Tagger):
    """It takes a state and gives one."""

    def forward(self, x, state=None):
        out, state = self.lstm(x, state)
        return self.head(out), state


class Last(Tagger):
    """The last hidden states of both directions, read by two layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.other = nn.Linear(H * (1 + self.lstm.bidirectional), 3)

    def forward(self, x):
        _, (hidden, _) = self.lstm(x)
        hidden = torch.cat(list(hidden[-1 - self.lstm.bidirectional :]), -1)
        return self.head(hidden).relu() + 1, self.other(hidden)


def waves(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_dead(model):
    """No one reads the last hidden unit, so that a projection to one less loses nothing."""
    lstm, size = model.lstm, model.lstm.hidden_size
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "weight_ih_l0" not in name:
                weight[:, size - 1 :: size] = 0
    assert lstm.weight_hh_l0[:, -1].abs().sum() == 0 and lstm.weight_hh_l0[:, -2].abs().sum() > 0
    return model


OPTIONS = [
    {},
    {"batch_first": True, "bias": False, "layers": 1},
    {"bidirectional": True, "dropout": 0.3},
    {"bidirectional": True, "batch_first": True, "layers": 3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plain", [True, False])
def test_a_projection_to_all_that_is_read_is_exact(options, plain):
    """As torch's own LSTM with its own states, whatever directions, layers, biases and layout."""
    for kind, given in (
        (Tagger, (waves(6, 3, 5),)),
        (Last, (waves(6, 3, 5),)),
        (Streaming, (waves(6, 3, 5),)),
    ):
        torch.manual_seed(0)
        model = one_dead(kind(**options)).train()
        before = copy.deepcopy(model).eval()
        told = ll.compress(model, ranks={"lstm": H - 1}, data=[given], plain=plain)
        assert model.training and type(model.lstm) is nn.LSTM and model.lstm.proj_size == H - 1
        assert told.layers[0].error < 1e-3
        mine, theirs = model.eval()(*given), before(*given)
        if kind is Streaming:
            (mine, (hidden, cell)), (theirs, (_, cells)) = mine, theirs
            assert hidden.shape[-1] == H - 1
            torch.testing.assert_close(cell, cells, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_packed_sequences():
    model = one_dead(Tagger(bidirectional=True, batch_first=True)).eval()
    given, before = (waves(4, 9, 5), torch.tensor([9, 2, 5, 1])), copy.deepcopy(model)
    told = ll.compress(model, ranks={"lstm": H - 1}, data=[given])
    torch.testing.assert_close(model(*given), before(*given), rtol=1e-5, atol=1e-6)
    entries = 2 * (2 * 4 * H * (H - 1) + 2 * (H - 1) * H + 4 * H * (5 + 2 * (H - 1)))
    assert told.layers[0].flops[1] == 2 * (
        17 * entries + 4 * 9 * 7 * 2 * (H - 1)
    )  # the head reads the padding


def test_state_carried_over_chunk_by_chunk_is_the_whole():
    model, x = Streaming(batch_first=True).eval(), waves(2, 12, 5)
    ll.compress(model, ranks={"lstm": 5}, data=[x])
    whole, parts, state = model(x)[0], [], None
    for chunk in x.split(4, 1):
        part, state = model(chunk, state)
        parts.append(part)
    assert state[0].shape == (2, 2, 5) and state[1].shape == (2, 2, H)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_plain_error_is_that_of_the_best_joint_factors(rank):
    """Of the recurrent matrix above the next layer's (Eckart and Young), and what the modules hold."""
    model = Tagger().eval()
    before = {n: p.detach().double().numpy() for n, p in model.lstm.named_parameters()}
    head = model.head.weight.detach().double().numpy()
    told = ll.compress(model, ranks={"lstm": rank}, data=[waves(4, 3, 5)], plain=True).layers[0]
    own = before["weight_hh_l1"]
    head_scale = np.linalg.norm(own) / np.linalg.norm(head)
    new = {n: p.detach().double().numpy() for n, p in model.lstm.named_parameters()}
    errors = []
    for matrix, left, name in (
        (np.vstack([before["weight_hh_l0"], before["weight_ih_l1"]]), ["weight_hh_l0", "weight_ih_l1"], "l0"),
        (np.vstack([own, head * head_scale]), ["weight_hh_l1"], "l1"),
    ):
        singular = np.linalg.svd(matrix, compute_uv=False)
        errors.append(np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum()))
        factor = [new[n] for n in left]
        if name == "l1":
            factor.append(model.head.weight.detach().double().numpy() * head_scale)
        real = np.linalg.norm(matrix - np.vstack(factor) @ new[f"weight_hr_{name}"]) / np.linalg.norm(matrix)
        assert real == pytest.approx(errors[-1], rel=1e-5)
    assert told.error == pytest.approx(max(errors), rel=1e-5)


def gates_of(lstm, x):
    """An LSTM step by step: its outputs and the preactivations of its gates (time, batch, 4 * hidden)."""
    hidden = cell = torch.zeros(x.shape[1], lstm.hidden_size)
    gates, outputs = [], []
    for step in x:
        gate = step @ lstm.weight_ih_l0.T + hidden @ lstm.weight_hh_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        gates.append(gate)
        i, f, g, o = gate.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs), gates


def test_error_on_data_weighs_gates_by_what_they_do_to_the_outputs():
    """The best factors for inputs and gates as a loop over the steps has them."""
    model, x = Tagger(layers=1).eval(), waves(8, 6, 5)
    lstm, head = model.lstm, model.head.weight.detach().double().numpy()
    outputs, gates = gates_of(lstm, x)
    signs = torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    slopes = torch.stack(torch.autograd.grad((outputs * signs).sum(), gates)).flatten(0, 1)
    weigh = slopes.square().mean(0).sqrt().double().numpy()
    hidden = outputs.flatten(0, 1).detach().double().numpy()
    own = lstm.weight_hh_l0.detach().double().numpy() * np.maximum(weigh, 0.01 * weigh.mean())[:, None]
    seen, read = own @ hidden.T, head @ hidden.T
    both = np.vstack([seen, read * np.linalg.norm(seen) / np.linalg.norm(read)])
    singular = np.linalg.svd(both, compute_uv=False)
    told = ll.compress(model, ranks={"lstm": 4}, data=[x]).layers[0]
    assert told.error == pytest.approx(np.sqrt((singular[4:] ** 2).sum() / (singular**2).sum()), rel=1e-3)


def test_budgets_count_the_readers_too():
    for option in ("parameters", "flops"):
        model, x = Last(bidirectional=True).eval(), waves(6, 3, 5)
        told = ll.compress(model, data=[x], **{option: 0.6})
        assert [p.name for p in told.layers] == ["lstm"]
        assert told.layers[0].readers == ("head", "other")
        assert told.parameters[1] == sum(p.numel() for p in model.parameters())
        before, after = getattr(told, option)
        assert 0.4 * before < after <= 0.6 * before


def test_built_again_from_a_description_and_from_files(tmp_path):
    model, x = Streaming(bidirectional=True).eval(), waves(6, 3, 5)
    fresh = copy.deepcopy(model)
    told = ll.compress(model, parameters=0.6, data=[x])
    ll.save_compressed(model, told, tmp_path / "small")
    again = ll.load_compressed(copy.deepcopy(fresh), tmp_path / "small").eval()
    torch.testing.assert_close(again(x)[0], model(x)[0], rtol=0, atol=0)
    other = ll.compressed(copy.deepcopy(fresh), told.description())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x)[0], model(x)[0], rtol=0, atol=0)
    for change, message in (
        ({"name": "lstn"}, "no LSTM 'lstn'"),
        ({"readers": ["heed"]}, "read by 'heed'"),
        ({"readers": 3}, "read by 3"),
        ({"rank": [H]}, "with rank 12"),
        ({"shape": [5, H, 1, 2]}, "there,"),
    ):
        bad = told.description()
        bad["layers"][0] |= change
        with pytest.raises(ll.AdapterFileError, match=message):
            ll.compressed(copy.deepcopy(fresh), bad)


class Odd(nn.Module):
    """An LSTM that something else than a linear layer reads, or whose caller counts on its size."""

    def __init__(self, how, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.norm, self.head = kind(H, H), nn.LayerNorm(H), nn.Linear(H, 4)
        self.how = how

    def forward(self, x):
        zeros = x.new_zeros(1, x.shape[1], H)
        out, _ = self.rnn(x, (zeros, zeros) if self.how == "zeros" else None)
        if self.how == "residual":
            out = out + x
        if self.how == "norm":
            out = self.norm(out)
        if self.how == "both":
            return self.head(out), out
        return self.head(out)


@pytest.mark.parametrize(
    ("how", "kind", "why"),
    [
        ("norm", nn.LSTM, "something else than a linear layer reads"),
        ("residual", nn.LSTM, "something else than a linear layer reads"),
        ("both", nn.LSTM, "something else than a linear layer reads"),
        ("zeros", nn.LSTM, "size of its states"),
        ("", nn.GRU, "nn.GRU has no projection"),
        ("", nn.RNN, "nn.RNN has no projection"),
    ],
)
def test_what_stays_as_it_is_by_name(how, kind, why):
    model, x = Odd(how, kind).eval(), waves(6, 3, H)
    before = copy.deepcopy(model.state_dict())
    told = ll.compress(model, ranks={"head": 2}, data=[x])
    assert why in told.dense["rnn"]
    assert model.rnn.hidden_size == H and not getattr(model.rnn, "proj_size", 0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    assert not model.rnn._forward_hooks and not model.head._forward_hooks


def test_what_is_asked_by_hand_or_left_out():
    model, x = Tagger().eval(), waves(6, 3, 5)
    with pytest.raises(ll.ConfigError, match="go up to 11"):
        ll.compress(model, ranks={"lstm": H}, data=[x])
    with pytest.raises(ll.ConfigError, match="can have the forms projected"):
        ll.compress(model, ranks={"lstm": "svd:3"}, data=[x])
    told = ll.compress(copy.deepcopy(model), ranks={"head": 3}, data=[x], exclude=["lstm"])
    assert told.dense["lstm"] == "excluded" and told.layers[0].name == "head"
    told = ll.compress(copy.deepcopy(model), ranks={"head": 3}, plain=True)
    assert "give data=" in told.dense["lstm"]
    told = ll.compress(model, ranks={"lstm": "projected:3"}, data=[x])
    assert "error %" in str(told) and model.head.in_features == 3


def test_flags_biases_and_types_stay():
    model, x = Tagger(bidirectional=True).double().train(), waves(6, 3, 5).double()
    model.lstm.weight_hh_l0.requires_grad_(False)
    bias, head_bias, state = model.lstm.bias_hh_l1_reverse, model.head.bias, torch.get_rng_state()
    ll.compress(model, ranks={"lstm": 4}, data=[x])
    assert torch.equal(state, torch.get_rng_state())
    lstm = model.lstm
    assert lstm.bias_hh_l1_reverse is bias and model.head.bias is head_bias
    assert not lstm.weight_hh_l0.requires_grad and not lstm.weight_hr_l0.requires_grad
    assert lstm.weight_hh_l1.requires_grad and all(p.dtype == torch.float64 for p in model.parameters())
    model(x).sum().backward()
    assert lstm.weight_hr_l1_reverse.grad.abs().sum() > 0


def test_sizes_of_a_stack_are_those_of_its_modules():
    for options in OPTIONS:
        model = Tagger(**options)
        stack = Stack(model.lstm, {"head": model.head})
        for rank in (None, 1, 7):
            made = {"": model.lstm, "head": model.head} if rank is None else stack.empty(rank)
            real = sum(p.numel() for m in made.values() for n, p in m.named_parameters() if "weight" in n)
            assert stack.parameters(rank) == real


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_what_stays_is_said_where_nothing_or_not_enough_can_be_compressed(kind):
    class Heard(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.rnn, self.head = kind(20, 32), head

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    data = [waves(6, 3, 20)]
    why = "no linear layer reads it" if kind is nn.LSTM else "nn.GRU has no projection in torch"
    with pytest.raises(ll.UserError, match=rf"no layer can be compressed: rnn \({why}\)"):
        ll.compress(Heard(nn.Tanh()), parameters=0.5, data=data)
    if kind is nn.GRU:
        stays = rf"of 1 layer leave 0\.899 of the model \(rnn \({why}\) stays\)"
        with pytest.raises(ll.UserError, match=stays):
            ll.compress(Heard(nn.Linear(32, 20)), parameters=0.5, data=data)
