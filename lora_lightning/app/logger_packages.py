"""Which packages the trackers need, and which tracker there is no more. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

NEEDED = {  # by the function that makes a logger: what is imported, what is installed
    "wandb_logger": ("wandb", "wandb"),
    "mlflow_logger": ("mlflow", "mlflow"),
    "comet_logger": ("comet_ml", "comet-ml"),
    "aim_logger": ("aim", "aim"),
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
}
ENDED = {  # choices of the group `logger` that many a user knows
    "neptune": "Neptune ended its service in March 2026, and Lightning has no logger for it any more",
}


def missing_packages(loggers: Mapping[str, Any]) -> list[str]:
    """A line for each logger whose package is not installed.

    Args:
        loggers: the nodes of the group `logger`, by name.
    """
    problems = []
    for name, node in loggers.items():
        target = str(node.get("_target_", "")) if isinstance(node, Mapping) else ""
        module, package = NEEDED.get(target.rpartition(".")[2], ("", ""))
        if module and find_spec(module) is None:
            problems.append(f"logger={name}: needs {package}, which is not installed: pip install {package}")
    return problems
