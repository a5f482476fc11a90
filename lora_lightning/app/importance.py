"""How much each option of a search matters, as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

FILE = "importance.png"
FEWEST = 4  # trials by which anything can be told


def write_importance(study: Any, folder: Path) -> str:
    """Draw a bar for each option: its share of the variance of the scores (fANOVA, Hutter et al. 2014).

    Returns:
        A line that says where the picture is, or why there is none.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if len(done) < FEWEST or len({t.value for t in done}) < 2:
        return f"Too few scores that differ for {FILE}."
    missing = [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]
    if missing:
        return f"{FILE} needs {' and '.join(missing)}: pip install 'lora-lightning[tune]'"
    import optuna
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    figure = Figure(figsize=(6, 1 + 0.4 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="#d9552b")
    axes.set_xlabel(f"share of the score's variance, {len(done)} trials")
    axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FILE, dpi=150)
    return f"What matters: {', '.join(f'{n} {s:.0%}' for n, s in shares.items())} ({FILE})"
