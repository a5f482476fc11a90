"""Kinds of models and of adapters. By default each is met in some pairs, in `-m slow` in all."""

import pytest
from small import cnn, encoder, mlp, vit

MODELS = [mlp, cnn, vit, encoder]
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "affine": {"train_norm": "affine"},
    "bias": {"train_bias": "all"},
}
PAIRS = {
    (mlp, "plain"), (mlp, "dora"), (cnn, "dora"), (cnn, "affine"), (cnn, "bias"), (vit, "rslora"),
    (vit, "affine"), (encoder, "plain"), (encoder, "bias"),
}  # fmt: skip
pairs = pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(
            build, options, id=f"{kind}-{build.__name__}",
            marks=[] if (build, kind) in PAIRS else pytest.mark.slow,
        )
        for build in MODELS
        for kind, options in CONFIGS.items()
    ],
)  # fmt: skip
