"""The forms by name. Where the inputs' second moments are known, every form keeps what matters for the output
(SVD-LLM, arXiv 2403.07378). A new form is a class in a file of its own and a line in `FORMS`."""

from __future__ import annotations

from lora_lightning.compression.embedding import Table
from lora_lightning.compression.form import Form, Layer
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.multiplied import Multiplied
from lora_lightning.compression.spatial import Spatial
from lora_lightning.compression.svd import SVD, Channel
from lora_lightning.compression.tucker import Tucker

FORMS: dict[str, Form] = {
    "svd": SVD(),
    "channel": Channel(),
    "spatial": Spatial(),
    "tucker": Tucker(),
    "product": Multiplied(),
    "embedding": Table(),
}


def forms_of(layer: Layer, moment: Moment) -> dict[str, Form]:
    """The forms that a layer can be brought into, by name."""
    return {n: form for n, form in FORMS.items() if form.fits(layer) and (moment.whole or not form.whole)}
