"""Which cases a promise is checked on by default; on the others it is slow."""

import pytest

from .models import CASES

# Where ways of compiling differ most, beside test_compiled_states.py, and a few settings of each family; the
# rest is the long tail.
COMPILED = {"ConvTranspose2d", "EmbeddingBag-mean", "Attention-q-v", "weight-norm"}
TYPICAL = COMPILED | {
    "Conv1d", "Conv2d-groups", "Conv2d-depthwise-dora", "ConvTranspose1d-groups", "Embedding-padding",
    "EmbeddingBag-sparse", "Attention-kdim", "EncoderLayer", "fused-qkv-dora", "LSTM", "LSTM-deep",
    "LSTM-gates-dora", "GRU-packed", "LSTMCell", "Linear", "Conv1D", "StdConv2d", "weight-norm-LSTM",
    "spectral-norm-conv", "own-class",
}  # fmt: skip


def cases(quick: set[str]) -> pytest.MarkDecorator:
    assert quick <= set(CASES)
    names = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
    return pytest.mark.parametrize("name", names)


every_case, typical_cases, compiled_cases = cases(set(CASES)), cases(TYPICAL), cases(COMPILED)
