"""extract_lora: an adapter made of the difference between a base and any fine-tuned model of it."""

from __future__ import annotations

from torch import nn

from lora_lightning.adapters.extract import extract
from lora_lightning.adapters.inject import check_name
from lora_lightning.files.tuned import Tuned, tuned_state
from lora_lightning.methods.shortening import Approximation, Energy, Rank, one_limit
from lora_lightning.utils.checks import require
from lora_lightning.utils.sharding import FIRST, refuse_sharded


def extract_lora(
    base: nn.Module,
    tuned: Tuned,
    *,
    rank: Rank = None,
    energy: Energy = None,
    adapter: str = "default",
    modules_to_save: str | list[str] | None = "auto",
    backbone: str | None = None,
) -> Approximation:
    """Adapt `base` in place so that it computes what a fine-tuned model of it does.

    Each layer's change W_tuned - W_base becomes the update of lower rank that is nearest to it, by a
    truncated singular value decomposition (Eckart & Young 1936), group by group, one layer after the other.
    What differs beside the layers' weights is kept as it is: heads, norms with their running statistics,
    biases, tables of positions. What does not differ is left out. Then `save_adapter`, `merge` and all the
    rest are as after training.

    Where the fine-tuned weights are of a narrower type than the base's, such as bfloat16, the change is that
    from the base rounded likewise: what rounding alone has moved is no training.

    Args:
        base: a plain model; a LightningModule that holds it will do.
        tuned: the fine-tuned model, its state dict, a file of it (.safetensors, one of torch.save, a
            Trainer's checkpoint), or a folder: of a run of method=full, or with the weights in one file or
            several.
        rank: the highest rank of each layer.
        energy: the part of Σσ² of each layer's change to keep, with the smallest rank that does.
        adapter: name of the updates, an identifier.
        modules_to_save: as in `LoRAConfig`. A head may have another number of classes than the base's, which
            gets its shape; without the adapter such a head is zero.
        backbone: as in `LoRAConfig`.

    Returns:
        The ranks, and the relative error of each layer; `print` it for a table.

    Raises:
        ConfigError: neither or both of rank and energy, or a bad one; the base is adapted already, or
            quantized; nothing differs, or something that no adapter can hold. The base is untouched.
        AdapterFileError: names or shapes do not match, with near misses; a damaged file, or one that holds an
            adapter or code, which is not run. The base is untouched.
    """
    require(extract_lora, locals(), [one_limit(rank=rank, energy=energy)])
    check_name(adapter)
    refuse_sharded(base, "extract_lora", FIRST)
    state, where = tuned_state(tuned)
    return extract(base, state, where, rank, energy, adapter, modules_to_save, backbone)
