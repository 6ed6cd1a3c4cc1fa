"""Rewards over steps, of several runs with several seeds each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73")  # of Okabe and Ito: also apart for colour-blind eyes
SPAN = 15  # iterations that a point of the line is the mean of
PANELS = {"reward": "mean reward of an iteration", "spread": "its spread within groups"}


def draw_rewards(logs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """A panel for reward and for spread; a line a run: the mean over seeds, smoothed, and each seed, thin."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for panel, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for color, (title, paths) in zip(COLORS, logs.items(), strict=False):
            seeds = [smooth(read_column(log, name)) for log in paths]
            for values in seeds:
                panel.plot(range(1, 1 + len(values)), values, color=color, linewidth=0.5, alpha=0.5)
            length = min(map(len, seeds))
            mean = np.mean([values[:length] for values in seeds], axis=0)
            panel.plot(range(1, 1 + length), mean, color=color, linewidth=1.8, label=title)
        panel.set_xlabel("iteration")
        panel.set_title(label, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def read_column(log: Path, name: str) -> np.ndarray:
    """A number of every line of a JSONL log."""
    return np.asarray([json.loads(line)[name] for line in log.read_text().splitlines()])


def smooth(values: np.ndarray) -> np.ndarray:
    """Each the mean of the last `SPAN`, of fewer at the beginning."""
    return np.asarray([values[max(0, end - SPAN) : end].mean() for end in range(1, 1 + len(values))])
