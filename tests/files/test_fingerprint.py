"""The base is known by its frozen values: the same base through everything that we do, and no other."""

import pytest
import torch
from small import BATCHES, Classifier, cnn, encoder, mlp, vit

import lora_lightning as ll
from lora_lightning.files.fingerprint import fingerprint_of, other_tensors, short
from lora_lightning.utils.digests import SAMPLES


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
def test_it_is_the_same_through_injection_training_merging_and_ejection(build):
    model = seeded(build)
    before = fingerprint_of(model)
    ll.inject(model, ll.LoRAConfig(rank=2, train_norm="both"))
    ll.add_adapter(model, "other", ll.LoRAConfig(rank=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.train()(BATCHES[build]())
    adapted = fingerprint_of(model)
    assert adapted and not other_tensors(before, adapted)
    ll.merge(model)
    assert fingerprint_of(model) == adapted
    with ll.adapters_off(model):
        assert fingerprint_of(model) == adapted
    ll.unmerge(model)
    ll.eject(model)
    assert fingerprint_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_base_is_the_same_base(dtype):
    assert not other_tensors(fingerprint_of(seeded(vit)), fingerprint_of(seeded(vit).to(dtype)))


def test_the_order_of_memory_does_not_count():
    plain = fingerprint_of(seeded(cnn))
    assert fingerprint_of(seeded(cnn).to(memory_format=torch.channels_last)) == plain


@pytest.mark.gpu
def test_the_device_does_not_count():
    assert fingerprint_of(seeded(vit).cuda()) == fingerprint_of(seeded(vit))


def test_another_base_differs_in_every_weight_and_one_changed_tensor_is_named():
    one, other = fingerprint_of(seeded(vit)), fingerprint_of(seeded(vit, 1))
    weights = [n for n, p in vit().named_parameters() if p.dim() > 1]
    assert set(weights) <= set(other_tensors(one, other))
    assert short(one) != short(other)
    changed = seeded(vit)
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.weight.mul_(1.01)
    assert other_tensors(one, fingerprint_of(changed)) == ["blocks.1.mlp.fc1.weight"]
    assert short(one) == short({f"model.{n}": d for n, d in one.items()})


def test_large_tensors_are_sampled_with_both_ends():
    layer = torch.nn.Linear(97, 3 * SAMPLES, bias=False)
    before = fingerprint_of(layer)
    for place in (0, -1):
        with torch.no_grad():
            layer.weight.flatten()[place] += 1
        assert fingerprint_of(layer) != before
        before = fingerprint_of(layer)


def test_tensors_without_memory_are_left_out():
    with torch.device("meta"):
        assert fingerprint_of(mlp()) == {}


def test_another_base_is_refused_unless_asked(tmp_path):
    model = seeded(vit)
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path)
    other = seeded(vit, 1)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    told = "was trained on another base model: 1[0-9] of 30 frozen tensors differ .*check_base=False"
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.load_adapter(other, tmp_path)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    assert not hasattr(other, "lora_state")
    ll.load_adapter(other, tmp_path, check_base=False)
    adapted = Classifier(seeded(cnn, 1))
    ll.inject(adapted, ll.LoRAConfig(rank=2, target_modules=["model.3", "model.6"]))
    ll.save_adapter(adapted, tmp_path)
    with pytest.raises(ll.AdapterFileError, match="another base model"):
        ll.load_adapter(seeded(cnn, 2), tmp_path, check_base=True)
    ll.load_adapter(seeded(cnn, 1), tmp_path)  # the bare network of the LightningModule
    ll.load_adapter(seeded(lambda: Classifier(vit())).model, save(tmp_path / "vit"))
    ll.load_adapter(seeded(vit).bfloat16(), tmp_path / "vit")


def save(folder):
    model = seeded(lambda: Classifier(vit()))
    ll.inject(model, ll.LoRAConfig(rank=2))
    return ll.save_adapter(model, folder)
