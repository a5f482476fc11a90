"""Adapter files: what is kept of an adapted model, written whole, checked before it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterFileError, ConfigError, did_you_mean
from lora_lightning.files import write_whole
from lora_lightning.inject import carry_out, grow, own_names, refuse_merged, replace
from lora_lightning.layers import lora_layers
from lora_lightning.layers.layer import slot_key
from lora_lightning.plans import Plan
from lora_lightning.record import Adapter, Injection, as_before, injection_of, is_injected, own_tensors
from lora_lightning.sharding import FIRST, gathered, is_flattened, is_sharded, refuse_sharded
from lora_lightning.structure import targets_of

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
FORMAT = "lora_lightning"
VERSION = 1


def trained_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that training can change, under their names in `model.state_dict()`: the adapter's
    updates, its heads, other trainable parameters, and the running statistics that are not frozen.

    Args:
        adapter: None is the first selected one. Of another the values stand in the record on the model.
    """
    injection = injection_of(model)
    adapter = injection.adapter if adapter is None else adapter
    record = injection.named(adapter)
    updates: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        if adapter in layer.lora:
            updates.update(layer.lora[adapter].named_parameters(prefix=f"{path}.lora.{adapter}".lstrip(".")))
    own = own_tensors(model, record.own)
    if adapter == injection.adapter:
        flagged = {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora." not in f".{n}"}
        own = {**flagged, **own}
    else:
        own = {n: record.values.get(n, t) for n, t in own.items()}
    return {n: t.detach() for n, t in {**updates, **own}.items()}


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """What `save_adapter` writes: `trained_tensors` without the adapter's name in the keys, so that
    `blocks.0.attn.qkv.lora.default.weight.lora_A` becomes `blocks.0.attn.qkv.lora_A`.

    Args:
        adapter: None is the first selected one.

    Raises:
        UserError: the model is not adapted, or has no adapter of this name.
    """
    injection = injection_of(model)
    adapter = injection.adapter if adapter is None else adapter
    names = {
        f"{p.module}.lora.{adapter}.{slot_key(p.slot)}".lstrip("."): p.name
        for p in injection.named(adapter).plan.layers
    }
    stored = {}
    for name, tensor in trained_tensors(model, adapter).items():
        update, _, leaf = name.rpartition(".")
        stored[f"{names.get(update, update)}.{leaf}".lstrip(".")] = tensor
    return stored


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all.

    Where FSDP2 has sharded the model, every process must call this, and the first one writes.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        folder: made when it does not exist.
        adapter: None is the first selected one.

    Returns:
        The folder.

    Raises:
        UserError: the model is not adapted, has no adapter of this name, or FSDP has flattened it.
        OSError: the folder cannot be written; a file that stood there before is untouched.
    """
    injection = injection_of(model)
    injection.settled()
    if is_flattened(model):
        refuse_sharded(model, "save_adapter", "Take it from a checkpoint: docs/distributed.md shows how.")
    record = injection.named(injection.adapter if adapter is None else adapter)
    tensors = {n: t.contiguous().cpu() for n, t in gathered(lora_state_dict(model, adapter)).items()}
    if is_sharded(model) and torch.distributed.get_rank() != 0:
        return Path(folder)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "config": record.config.to_dict(),
        "plan": record.plan.to_dict(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "sha256": _digest(tensors)}
    write_whole(folder / TENSOR_FILE, lambda path: save_file(tensors, path, metadata))
    text = json.dumps(about, indent=2) + "\n"
    write_whole(folder / CONFIG_FILE, lambda path: Path(path).write_text(text))
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None) -> None:
    """Load what `save_adapter` wrote. A model that is not adapted yet is adapted as the file says.

    An adapter saved from a LightningModule that holds the network as `self.model` loads into the bare
    network as well, and the other way round.

    Args:
        adapter: name under which it is loaded. An adapter of this name takes the values where its
            layers, ranks and scaling are those of the file (nothing is rebuilt or compiled anew), and is
            replaced where they are not; otherwise one is added, not selected. None is the first selected
            adapter, which is never replaced.

    Raises:
        AdapterFileError: the files are missing, damaged, foreign or made for another model. All is
            checked before the model is touched.
        ConfigError: the name is no identifier.
        UserError: the model is merged, sharded, or within `adapters_off` or `adapters_for`.
    """
    refuse_sharded(model, "load_adapter", FIRST)
    about, tensors = read_adapter(folder)
    if any(p.is_meta for p in model.parameters()):
        raise AdapterFileError(
            f"the model is on the meta device and cannot hold what {folder} contains: give it memory and "
            "load its own weights first."
        )
    fresh = not is_injected(model)
    if not fresh:
        refuse_merged(model)
    name = adapter or ("default" if fresh else injection_of(model).adapter)
    record = None if fresh else injection_of(model).adapters.get(name)
    with as_before(model):
        planned, tensors = _aligned(model, about.plan, tensors)
        _check_layers(model, planned, folder)
        shapes = _expected_shapes(model, about.config, planned)
        own = own_names(model, about.config, planned)
    differences = _differences(record, about.config, planned) if record else []
    if adapter is None:
        _refuse(differences, folder)
    fits = record and not differences and (adapter is None or {*own} == {*record.own})
    if fits:
        shapes = {n: t.shape for n, t in lora_state_dict(model, name).items()}
    _check_tensors(shapes, tensors, folder)
    if fresh:
        carry_out(model, about.config, planned, name)
    elif not fits:
        _check_scope(injection_of(model), planned, folder)
        (replace if record else grow)(model, about.config, planned, name)
    targets = lora_state_dict(model, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            targets[key].copy_(tensor)


def _check_scope(injection: Injection, planned: Plan, folder: str | os.PathLike[str]) -> None:
    ours, theirs = injection.plan.scope, planned.scope
    if ours != theirs:
        _refuse([f"backbone {ours!r} in the model, {theirs!r} in the file"], folder)


@dataclass(frozen=True)
class AdapterInfo:
    """What stands in an adapter's `adapter_config.json`."""

    config: LoRAConfig
    plan: Plan


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Read and check an adapter's two files, without a model.

    Raises:
        AdapterFileError: a file is missing, damaged, of another format or of a newer version.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise AdapterFileError(
                f"{folder} is not an adapter: it has no {name}. "
                f"Give a folder that save_adapter wrote; it holds {CONFIG_FILE} and {TENSOR_FILE}."
            )
    return _read_config(folder / CONFIG_FILE), _read_tensors(folder / TENSOR_FILE)


def _read_config(path: Path) -> AdapterInfo:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Save the adapter again.") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        other = " It was written by PEFT." if isinstance(about, dict) and "peft_type" in about else ""
        raise AdapterFileError(f"{path} is not an adapter of lora_lightning.{other}")
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{path} has format version {about.get('version')!r}; this release of lora_lightning reads "
            f"version {VERSION}. Upgrade lora-lightning."
        )
    try:
        return AdapterInfo(LoRAConfig(**about["config"]), Plan.from_dict(about["plan"]))
    except (TypeError, KeyError, ConfigError, AttributeError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Save the adapter again.") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}.") from None
    if stated != _digest(tensors):
        raise AdapterFileError(f"{path} is damaged: its contents do not match its checksum.")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _aligned(model: nn.Module, planned: Plan, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """Names of the file made names of the model, which may hold the network one level up or down."""
    modules = [n for n, _ in model.named_modules()]
    names = [p.module for p in planned.layers] + planned.heads
    first = names[0].split(".")[0] if names else ""

    def fits(rename: Callable[[str], str]) -> bool:
        return {rename(n) for n in names} <= set(modules)

    renames: list[Callable[[str], str]] = [lambda n: n]
    if all(n.startswith(f"{first}.") for n in [*names, *tensors]):
        renames.append(lambda n: n.removeprefix(f"{first}.") if n != first else "")
    renames += [lambda n, m=m: f"{m}.{n}" for m in modules if m and "." not in m]  # type: ignore[misc]
    rename = next((r for r in renames if fits(r)), renames[0])
    return planned.renamed(rename), {rename(n): t for n, t in tensors.items()}


def _check_layers(model: nn.Module, planned: Plan, folder: str | os.PathLike[str]) -> None:
    modules = dict(model.named_modules())
    targets, refused = targets_of(model)
    problems = [f"no module {n}" for n in planned.heads if n not in modules]
    for layer in planned.layers:
        if layer.module in refused:
            problems.append(f"{layer.module}: {refused[layer.module]}")
        elif layer.name not in targets:
            problems.append(f"no layer {layer.name}{did_you_mean(layer.name, targets)}")
        elif (shape := targets[layer.name].shape) != layer.shape:
            problems.append(f"{layer.name}: weight {shape}, in the file {layer.shape}")
    _refuse(problems, folder)


def _differences(record: Adapter, config: LoRAConfig, planned: Plan) -> list[str]:
    """Why an adapter of the model cannot take the values of one with this configuration and plan."""
    here = {p.name: p for p in record.plan.layers}
    there = {p.name: p for p in planned.layers}
    problems = [f"{n} is not adapted in the file" for n in here if n not in there]
    problems += [f"{n} is not adapted in the model" for n in there if n not in here]
    for name in here.keys() & there.keys():
        for option in ("rank", "alpha"):
            ours, theirs = getattr(here[name], option), getattr(there[name], option)
            if ours != theirs:
                problems.append(f"{name}: {option} {ours} in the model, {theirs} in the file")
    for option in ("use_rslora", "use_dora"):
        ours, theirs = getattr(record.config, option), getattr(config, option)
        if ours != theirs:
            problems.append(f"{option}: {ours} in the model, {theirs} in the file")
    return sorted(problems)


def _expected_shapes(model: nn.Module, config: LoRAConfig, planned: Plan) -> dict[str, torch.Size]:
    """What the file of such an adapter of this plain model holds."""
    targets, _ = targets_of(model)
    shapes: dict[str, torch.Size] = {}
    for layer in planned.layers:
        slot, shape = targets[layer.name].slot, layer.shape
        prefix = f"{layer.name}.".lstrip(".")
        A, B = slot.factors(shape, layer.rank)
        shapes[f"{prefix}lora_A"], shapes[f"{prefix}lora_B"] = torch.Size(A), torch.Size(B)
        if config.use_dora:
            shapes[f"{prefix}lora_magnitude"] = torch.Size(shape[:1])
    own = own_tensors(model, own_names(model, config, planned))
    return {**shapes, **{n: t.shape for n, t in own.items()}}


def _check_tensors(
    expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    problems = [f"{n} is missing in the file" for n in expected if n not in found]
    problems += [f"{n} has no place in the model" for n in found if n not in expected]
    problems += [
        f"{n}: {tuple(expected[n])} in the model, {tuple(found[n].shape)} in the file"
        for n in expected
        if n in found and expected[n] != found[n].shape
    ]
    _refuse(problems, folder)


def _refuse(problems: list[str], folder: str | os.PathLike[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterFileError(
            f"the adapter in {folder} does not fit this model: {'; '.join(problems[:3])}{more}."
        )
