"""What the log says of an iteration: rewards, ratios, seconds, memory.

N samples or entries, R terms of a reward, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from realign.runtime.memory import read_peak_mb
from train.ranks import Ranks
from train.rollouts import Rollout
from train.update import UpdateNumbers


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def measure_spreads(total_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """The standard deviation of rewards within each group, float64 [G]."""
    groups = [total_N[group_N == group] for group in range(num_groups)]
    return torch.stack([own.double().std(correction=0) for own in groups])


def measure_chains(rollouts: Sequence[Rollout], ranks: Ranks) -> dict[str, float]:
    """Of all processes' reasoning chains, if there are any: the share of distinct ones in their groups, which
    may span processes, and of malformed ones.
    """
    own = [(rollout.group, rollout.sample.reasoning) for rollout in rollouts]
    chains = ranks.gather_list([(group, r.text, r.error is not None) for group, r in own if r is not None])
    if not chains:
        return {}
    distinct = {(group, text) for group, text, _ in chains}
    failures = sum(is_malformed for *_, is_malformed in chains)
    return {"distinct_chains": len(distinct) / len(chains), "failures": failures / len(chains)}


def measure_updates(made: Sequence[UpdateNumbers], clip_low: float, clip_high: float) -> dict[str, float]:
    """An iteration's updates: ratios of all of them, the first's distance from one, KLs, gradients."""
    ratio_N = torch.cat([one.ratio_N for one in made])
    first_N = made[0].ratio_N
    return {
        "ratio_mean": float(ratio_N.mean()),
        "ratio_min": float(ratio_N.min()),
        "ratio_max": float(ratio_N.max()),
        "first_ratio_error": float((first_N - 1).abs().max()),
        "clipped_low": float((ratio_N < 1 - clip_low).float().mean()),
        "clipped_high": float((ratio_N > 1 + clip_high).float().mean()),
        "approx_kl": float(torch.cat([one.approx_kl_N for one in made]).mean()),
        "kl": float(torch.cat([one.kl_N for one in made]).mean()),
        "grad_norm": sum(one.grad_norm for one in made) / len(made),
    }


def measure_pace(seconds: dict[str, float], num_samples: int) -> dict[str, float]:
    """Samples a second of the whole iteration, and pictures a second while they were made."""
    return {
        "samples_per_second": round(num_samples / sum(seconds.values()), 3),
        "images_per_second": round(num_samples / seconds["rollout"], 3),
    }


def measure_memory(ranks: Ranks) -> dict[str, float]:
    """GB (2^30 bytes) of the process that needed most so far: what torch had allocated on a GPU, else what
    the process held.
    """
    most = ranks.gather(torch.tensor([read_peak_mb(torch.device(ranks.device))])).max()
    return {"memory_gb": round(float(most) / 1024, 3)}
