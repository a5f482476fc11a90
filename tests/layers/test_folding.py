"""Frozen norms folded into the convolutions before them: which, when, and that nothing but bits changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.adapters.inject import freeze_norms
from lora_lightning.kernels import conv_form
from lora_lightning.layers.folding import NormBehind
from lora_lightning.layers.norm import FrozenNorm

EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Block(nn.Module):
    """Convolution, norm, activation, twice; beside them a way around."""

    def __init__(self, i, o, stride=1, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=options.pop("bias", False), **options)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.act = nn.ReLU(inplace=True)
        self.around = nn.Sequential(nn.Conv2d(i, o, 1, stride=stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.around(x))


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(Block(4, 8, **options), Block(8, 8, 2), nn.Flatten(), nn.Linear(8 * 9, 3))
    return randomized(model)


def randomized(model):
    for module in model.modules():
        if hasattr(module, "running_var"):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()  # negative scales too
            module.running_var.uniform_(0.5, 2)
    return model.double()


def adapted(model, fold, **options):
    model = copy.deepcopy(model)
    settings = {"rank": 2, "target_modules": r".*(conv\d|around\.0)", "modules_to_save": None, **options}
    torch.manual_seed(1)
    ll.inject(model, ll.LoRAConfig(fold_norms=fold, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture
def folded(monkeypatch):
    """How many convolutions have handed their output over."""
    count, plain = [], NormBehind.hand_over
    monkeypatch.setattr(NormBehind, "hand_over", lambda self, y: count.append(1) or plain(self, y))
    return count


def step(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y, x.grad, *[p.grad for p in model.parameters() if p.requires_grad]


def agree(one, other, x=None, tolerance=EXACT):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64) if x is None else x
    for got, wanted in zip(step(one, x), step(other, x), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("road", ["cpu", "dense", "merged"])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        ({}, {}),
        ({"bias": True}, {"train_bias": "lora_only"}),
        ({"groups": 4}, {"use_dora": True}),
        ({"padding_mode": "reflect"}, {"use_dora": True}),
        ({"groups": 2}, {"dropout": 0.5}),
        ({}, {"dropout": 0.5, "use_dora": True}),
    ],
    ids=["plain", "bias", "depthwise-dora", "dora", "dropout", "dropout-dora"],
)
def test_values_and_gradients(road, build, options, folded, request, monkeypatch, drops_alike):
    if road != "cpu":
        request.getfixturevalue("off_cpu")
        monkeypatch.setattr(conv_form, "dense_pays", lambda *given: road == "dense")
        monkeypatch.setattr(
            torch, "native_dropout", lambda x, p, t: (drops_alike(x, p), drops_alike(x * 0 + 1) > 0)
        )
    model = network(**build)
    agree(adapted(model, True, **options), adapted(model, False, **options))
    assert len(folded) == 6


def test_the_forms_of_small_layers_and_1d_and_3d(monkeypatch, folded):
    for conv, norm, size in ((nn.Conv1d, nn.BatchNorm1d, (9,)), (nn.Conv3d, nn.BatchNorm3d, (4, 4, 4))):
        model = randomized(nn.Sequential(conv(3, 6, 2), norm(6), nn.GELU(), conv(6, 4, 1), norm(4)))
        for small in (0, 2**19):
            monkeypatch.setattr(conv_form, "SMALL", small)
            models = [adapted(model, fold, target_modules=["0", "3"]) for fold in (True, False)]
            agree(*models, torch.randn(2, 3, *size, dtype=torch.float64))
    assert len(folded) == 8


@pytest.mark.parametrize("dense", [True, False])
def test_channels_last(dense, off_cpu, monkeypatch, folded):
    """1×1 kernels are products there, with the bias in passing."""
    monkeypatch.setattr(conv_form, "dense_pays", lambda *given: dense)
    products, plain = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda b, *given, **o: products.append(b.dim()) or plain(b, *given, **o)
    )
    models = [adapted(network(), fold).to(memory_format=torch.channels_last) for fold in (True, False)]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    agree(*models, x)
    assert products.count(1) == 3 and len(folded) == 6  # not the one with a stride
    assert models[0](x).stride() == models[1](x).stride()


def test_training_is_the_same(off_cpu, folded):
    model, x = network(), torch.randn(4, 4, 6, 6, dtype=torch.float64)
    models = [adapted(model, fold) for fold in (True, False)]
    for one in models:
        optimizer = torch.optim.SGD(ll.lora_parameters(one), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert len(folded) == 18
    agree(*models, x)
    for got, wanted in zip(ll.lora_parameters(models[0]), ll.lora_parameters(models[1]), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision(weights, off_cpu, folded):
    model, x = network(), torch.randn(2, 4, 6, 6)
    exact = step(adapted(model, False), x.bfloat16().double())
    half = adapted(model, True).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found = step(half, x.to(weights))
    assert len(folded) == 6
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_second_derivatives(off_cpu):
    models = [adapted(network(), fold) for fold in (True, False)]
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model in models:
        (dX,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dX.square().sum(), list(ll.lora_parameters(model))))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, off_cpu):
    model = network()
    models = [adapted(model, fold) for fold in (True, False)]

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model[2:](checkpoint(self.model[:2], x, use_reentrant=reentrant))

    class Plain(Checkpointed):
        def forward(self, x):
            return self.model(x)

    agree(Checkpointed(models[0]), Plain(models[1]))


class TestNobodyLooks:
    """Where something else may see what is between the two, and where nothing trains, nothing is folded."""

    @pytest.mark.parametrize("where", ["conv1", "bn1"])
    @pytest.mark.parametrize(
        "register",
        ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
    )
    def test_hooks(self, where, register, folded):
        plain, model = (adapted(network(), fold) for fold in (False, True))
        model[0].act = nn.ReLU()  # what a hook gave cannot be changed in place
        handle = getattr(model[0].get_submodule(where), register)(lambda *given: None)
        agree(model, plain)
        assert len(folded) == 5
        handle.remove()
        agree(model, plain)
        assert len(folded) == 11

    def test_a_hook_on_all_modules(self, folded):
        model = adapted(network(), True)
        seen = []
        with nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(y.clone())):
            model(torch.randn(2, 4, 6, 6, dtype=torch.float64))
        assert seen and not folded

    def test_without_training(self, folded):
        model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        with ll.adapters_off(model.train()):
            off = model(x)
        assert torch.equal(off, network().eval()(x)) and not folded
        ll.merge(model)
        model(x)
        assert not folded
        ll.unmerge(model)
        model(x)
        assert len(folded) == 6

    def test_another_adapter(self, folded):
        model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        ll.add_adapter(
            model, "other", config={"rank": 2, "target_modules": ["conv1"], "modules_to_save": None}
        )
        ll.set_adapter(model, "other")
        model(x)
        assert not folded
        ll.set_adapter(model, "default")
        model(x)
        assert len(folded) == 6

    def test_a_sum_with_an_adapter_that_trains_norms(self):
        model = adapted(network(), True)
        norms = {"rank": 2, "target_modules": ["conv1"], "modules_to_save": None, "train_norm": "both"}
        ll.add_adapter(model, "other", config=norms)
        ll.combine(model, ["default", "other"], [1.0, 1.0], into="sum")
        ll.set_adapter(model, "sum")
        assert all(layer.lora_norm is None for layer in ll.layers.registry.lora_layers(model).values())

    def test_a_norm_that_trains(self, folded):
        model = adapted(network(), True)
        model[0].bn1.weight.requires_grad_(True)
        model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).sum().backward()
        assert len(folded) == 5 and model[0].bn1.weight.grad.any()


class Other(nn.Module):
    """Forwards with a second reader, and some in which the norm is not behind a convolution alone."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.bn, self.way = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), way

    def forward(self, x):
        y = self.conv(x)
        if self.way == "residual":
            return self.bn(y) + y
        if self.way == "twice":
            return self.bn(y) + self.bn(self.conv(x))
        if self.way == "norm twice":
            return self.bn(self.bn(y))
        if self.way == "returned":
            return self.bn(y) + torch.stack([y, y]).sum()
        if self.way == "kept":
            self.kept = y
            return self.bn(y)
        if self.way == "between":
            return self.bn(y * 2)
        if self.way == "pre-activation":
            return self.conv(self.bn(x))
        if self.way == "in place":
            return self.bn(y.mul_(2))
        return self.bn(y) if y.mean() > 0 else self.bn(-y)


@pytest.mark.parametrize(
    "way",
    ["residual", "twice", "norm twice", "returned", "kept", "between", "pre-activation", "in place", "data"],
)
def test_other_readers(way, folded):
    model = randomized(nn.Sequential(Other(way), nn.Flatten()))
    one, other = (adapted(model, fold, target_modules=["conv"]) for fold in (True, False))
    assert "kept" not in one[0].__dict__
    agree(one, other)
    assert not folded


def test_shared_modules_are_left_alone(folded):
    block = Block(4, 4)
    model = randomized(nn.Sequential(block, nn.Sequential(block.conv1, nn.BatchNorm2d(4))))
    one, other = (adapted(model, fold) for fold in (True, False))
    agree(one, other)
    assert len(folded) == 2  # conv2 and around


def test_modules_in_a_list(folded):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
            self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(4) for i in range(2)})

        def forward(self, x):
            for i, conv in enumerate(self.convs):
                x = self.norms[str(i)](conv(x)).relu()
            return x

    model = randomized(Listed())
    agree(*(adapted(model, fold, target_modules=["0", "1"]) for fold in (True, False)))
    assert len(folded) == 2


def test_what_does_not_reach_the_norm_is_refused():
    model = adapted(network(), True)
    y = model[0].conv1(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    with pytest.raises(ll.UserError, match=r"0\.conv1 computed did not reach 0\.bn1"):
        y.sum().backward()


def test_new_statistics_are_seen(folded):
    model, other = (adapted(network(), fold) for fold in (True, False))
    agree(model, other)
    for one in (model, other):
        one[0].bn1.running_var.mul_(2)
        one[1].bn2.weight.data = one[1].bn2.weight.data * 3
    agree(model, other)
    assert len(folded) == 12


def test_names_copies_and_the_way_back(folded):
    base = network()
    model, other = (adapted(base, fold) for fold in (True, False))
    assert list(model.state_dict()) == list(other.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0].conv1.lora_norm.norm is again[0].bn1
        agree(again, other)
    assert len(folded) == 12
    ll.eject(model)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), base.modules(), strict=True))
    assert not any(name.startswith("lora") for m in model.modules() for name in m.__dict__)


def test_norms_that_another_tool_replaces(folded):
    model = adapted(network(), True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze_norms(model)
    agree(model, adapted(network(), False))
    assert len(folded) == 6


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_networks_of_libraries(library, folded):
    if library == "timm":
        import timm

        model = timm.create_model("test_efficientnet", num_classes=3)
        count = sum("BatchNormAct2d" in type(m).__name__ for m in model.modules())
    else:
        from torchvision.models import resnet18
        from torchvision.ops.misc import FrozenBatchNorm2d

        model = resnet18(num_classes=3, norm_layer=FrozenBatchNorm2d)
        count = 20
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2), module.running_mean.normal_(std=0.1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    one, other = (adapted(model.double(), fold, target_modules="all") for fold in (True, False))
    agree(one, other, x, {"rtol": 1e-7, "atol": 1e-9})
    assert len(folded) == count
    ll.eject(one)
    assert not any(isinstance(m, FrozenNorm) for m in one.modules())
    assert [m.training for m in one.modules()] == [m.training for m in model.modules()]


def test_the_line_in_the_log(monkeypatch):
    lines = []
    monkeypatch.setattr("lora_lightning.adapters.fold.rank_zero_info", lines.append)
    adapted(nn.Sequential(network(), randomized(Other("data"))), True)
    assert len(lines) == 1 and lines[0].startswith("fold_norms: 6 of 7 frozen norms are folded")
    assert "1.bn" in lines[0] and "The forward of 1 cannot be traced (TraceError" in lines[0]
    adapted(network(), True)
    assert lines[1] == "fold_norms: 6 of 6 frozen norms are folded into the convolutions before."


@pytest.mark.parametrize("options", [{"train_norm": "both"}, {"implementation": "reference"}])
def test_what_does_not_go_together_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ll.ConfigError, match=f"folds no norm with {name}='{value}': set {name} to"):
        ll.LoRAConfig(fold_norms=True, **options)
    assert ll.LoRAConfig.problems({"fold_norms": True, **options}, "lora.")[0].startswith("lora.fold_norms=")


@pytest.mark.slow
def test_a_compiler_sees_both_and_folds_nothing(folded):
    model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert not folded
    torch.testing.assert_close(y, model(x), **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_on_a_gpu(last, folded):
    models = [adapted(network(), fold).cuda() for fold in (True, False)]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, device="cuda")
    if last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
        x = x.contiguous(memory_format=torch.channels_last)
    agree(*models, x)
    agree(*models, x)
    assert len(folded) == 12
