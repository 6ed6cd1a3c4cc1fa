"""One update of a policy: its entries replayed, GRPO's loss, the optimiser, the new weights published.

N entries, one step of one sample each; L latent tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from realign_kernels import RatioGuard, VelocityKL, grpo_loss
from train.optimizer import AveragedAdamW
from train.policy import Policy, checkpoint_layers, is_generation
from train.ranks import Ranks
from train.replay import PACKINGS, Entry, Replayed, Replayer, pack_entries
from train.text import TextTrainer, TrainedText
from train.zero import ScaleOptions, build_optimizer

KL_SPACES = ("velocity", "mean")


class Stopped(RuntimeError):
    """A guard ended the run; the text is one line that says why."""


@dataclass(frozen=True)
class UpdateOptions:
    """The loss, AdamW, and how an iteration's entries are cut up.

    Attributes:
        updates: parts that the rollouts of an iteration are cut into, each with an update of its own.
        epochs: how often the parts are gone through.
        packing: how entries go into forwards; "rollout" is as they were sampled, and its first ratio is
            exactly one; "dense" is `micro_batch` at a time. See `train.replay.pack_entries`.
        clip_low, clip_high: how far the ratio may leave 1, below and above.
        guard: GRPO-Guard's normalised ratio and weights (arXiv 2510.22319).
        kl_beta, kl_space: weight of the pull to the weights that training began with, in the space of
            velocities or of the steps' means; 0: none.
        through_contexts: the gradient reaches the weights also through the keys and values of what was read
            (reference pictures run through the generation expert); what reading takes is kept for it.
        warmup: updates over which the learning rate rises.
        ema_decay: of the average that is exported; 0: the last weights are.
    """

    learning_rate: float = 1e-5
    updates: int = 1
    epochs: int = 1
    packing: str = "rollout"
    micro_batch: int = 8
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    guard: bool = False
    kl_beta: float = 0.0
    kl_space: str = "velocity"
    through_contexts: bool = False
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("packing", PACKINGS), ("kl_space", KL_SPACES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"update {name} is {getattr(self, name)!r}: must be one of {', '.join(known)}"
                )
        for name in ("updates", "epochs", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"update {name} is {getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "clip_low", "clip_high", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"update {name} is {getattr(self, name)}: must be above 0")
        if self.clip_low > 1:
            raise ValueError(f"update clip_low is {self.clip_low}: must be at most 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"update betas is {list(self.betas)}: both must be from 0 to below 1")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"update {name} is {getattr(self, name)}: must be 0 or more")
        if self.kl_beta < 0 or not 0 <= self.ema_decay < 1:
            what = f"update kl_beta is {self.kl_beta}, ema_decay {self.ema_decay}"
            raise ValueError(f"{what}: must be 0 or more, and the decay below 1")

    def rate(self, num_done: int) -> float:
        """The learning rate of an update, counted from 0."""
        return self.learning_rate * min(1.0, (num_done + 1) / max(1, self.warmup))

    def average(self, num_done: int) -> float:
        """The decay of the moving average after so many updates: short at first."""
        return min(self.ema_decay, (1 + num_done) / (10 + num_done))


@dataclass(frozen=True, eq=False)
class UpdateNumbers:
    """What an update was like, over all processes. All float32 [N] on the CPU but for the norm.

    `kl_N` is 0 where there is none; `approx_kl_N` is half the squared difference of the log-probs. N are the
    entries that were replayed: those of degenerate groups may be left out. `text_T2` are ratios and KLs of
    texts' tokens, where texts are trained; the norm is of both gradients together.
    """

    ratio_N: Tensor
    kl_N: Tensor
    approx_kl_N: Tensor
    grad_norm: float
    text_T2: Tensor | None = None


class Updater:
    """Changes a policy by entries and their advantages."""

    def __init__(
        self,
        policy: Policy,
        replayer: Replayer,
        options: UpdateOptions,
        ranks: Ranks,
        scale: ScaleOptions = ScaleOptions(),  # noqa: B008 (frozen)
        text: TextTrainer | None = None,
    ) -> None:
        self.policy, self.replayer, self.options, self.ranks = policy, replayer, options, ranks
        self.text = text
        self.optimizer = build_optimizer(policy, self._build_adamw, options.grad_clip, ranks, scale)
        self.num_done = 0

    def _build_adamw(self, masters: Sequence[Tensor]) -> AveragedAdamW:
        """Of the policy's masters, in their order."""
        options, share = self.options, 1.0
        if self.text is not None:
            share = self.text.options.learning_rate / options.learning_rate
        return AveragedAdamW(
            group_masters(dict(zip(self.policy.masters, masters, strict=True)), share),
            has_average=options.ema_decay > 0,
            lr=options.learning_rate,
            betas=tuple(options.betas),
            weight_decay=options.weight_decay,
        )

    @torch.no_grad()
    def find_references(self, entries: Sequence[Entry]) -> dict[int, Tensor]:
        """The velocities of entries under the weights that training began with, on the CPU, by `id`."""
        found = {}
        with self.policy.reference():
            for pack in self._pack(entries):
                replayed = self.replayer.replay(pack)
                parts = replayed.velocity_LC.cpu().split(replayed.cu_seqlens.diff().tolist())
                found.update(zip(map(id, pack), parts, strict=True))
        self.replayer.forget()
        return found

    def update(
        self,
        entries: Sequence[Entry],
        advantages: Sequence[float],
        references: dict[int, Tensor],
        texts: Sequence[TrainedText] = (),
    ) -> UpdateNumbers:
        """One step of the optimiser; the loss is the mean over the entries of all processes.

        Args:
            advantages: of each sample, by `Entry.number`.
            references: as `find_references` gives them; empty without a KL.
            texts: as `TextTrainer.prepare` gives them, with advantages of their own.
        """
        device = self.policy.engine.model.device
        counts = [len(entries), 0 if self.text is None else self.text.count(texts)]
        count, text_count = self.ranks.sum(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        rows, text_T2 = [torch.empty(0, 3)], None
        with (
            self.policy.differentiate(),
            checkpoint_layers(self.policy.engine.model, self.policy.checkpointing),
        ):
            for pack in _leave_out(self._pack(entries), advantages, references):
                rows.append(self._accumulate(pack, advantages, references, count))
            if self.text is not None:
                text_T2 = self.text.accumulate(texts, text_count, self.optimizer.collect)
        norm = self._step()
        ratio_N, kl_N, approx_kl_N = self.ranks.gather(torch.cat(rows)).unbind(dim=1)
        text_T2 = None if text_T2 is None else self.ranks.gather(text_T2)
        return UpdateNumbers(ratio_N, kl_N, approx_kl_N, norm, text_T2)

    def _accumulate(
        self, pack: Sequence[Entry], advantages: Sequence[float], references: dict[int, Tensor], count: float
    ) -> Tensor:
        """Adds a pack's gradients; its ratios, KLs and approximate KLs [N, 3]."""
        replayed = self.replayer.replay(pack)
        advantage_N = torch.tensor([advantages[e.number] for e in pack]).to(replayed.logprob_N)
        loss, metrics = grpo_loss(
            replayed.logprob_N,
            replayed.old_logprob_N,
            advantage_N,
            (self.options.clip_low, self.options.clip_high),
            self._guard(replayed) if self.options.guard else None,
            self._pull(pack, replayed, references) if references else None,
            denominator=count,
        )
        loss.backward()
        self.optimizer.collect()
        difference_N = replayed.logprob_N.detach() - replayed.old_logprob_N
        kl_N = torch.zeros_like(difference_N) if metrics.kl_N is None else metrics.kl_N
        return torch.stack((metrics.ratio_N, kl_N, difference_N.square() / 2), dim=1).float().cpu()

    def _guard(self, replayed: Replayed) -> RatioGuard:
        scale_N, weight_N = (
            torch.tensor([getattr(step, name) for step in replayed.steps]).to(replayed.old_logprob_N)
            for name in ("ratio_scale", "policy_weight")
        )
        return RatioGuard(replayed.bias_N, scale_N, weight_N)

    def _pull(self, pack: Sequence[Entry], replayed: Replayed, references: dict[int, Tensor]) -> VelocityKL:
        reference_LC = torch.cat([references[id(entry)] for entry in pack]).to(replayed.velocity_LC.device)
        weight_N = None
        if self.options.kl_space == "mean":
            weight_N = torch.tensor([step.kl_weight for step in replayed.steps]).to(replayed.old_logprob_N)
        return VelocityKL(
            replayed.velocity_LC, reference_LC, replayed.cu_seqlens, self.options.kl_beta, weight_N
        )

    def _step(self) -> float:
        """Gradients of all processes to new weights; the norm of the gradient before it was clipped.

        Without a gradient (all groups degenerate) nothing is changed, by momentum and decay neither.
        """
        rate, decay = self.options.rate(self.num_done), self.options.average(self.num_done + 1)
        norm = self.optimizer.step(rate, decay)
        self.replayer.forget()  # the next rollouts have need of the memory, and the samples are others
        if not math.isfinite(norm):
            raise Stopped(f"the gradient's norm is {norm}: lower the learning rate, or look at the rewards")
        if norm > 0:
            self.num_done += 1
            self.policy.publish()
        return norm

    def _pack(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        return pack_entries(entries, self.options.packing, self.options.micro_batch)


def group_masters(masters: Mapping[str, nn.Parameter], text_share: float) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with its `share` of the learning rate: the generation expert's masters,
    and the others, if there are any.
    """
    groups = {1.0: [], text_share: []} if text_share != 1 else {1.0: []}
    for name, master in masters.items():
        groups[1.0 if is_generation(name) else text_share].append(master)
    return [{"params": own, "share": share} for share, own in groups.items() if own]


def _leave_out(
    packs: list[list[Entry]], advantages: Sequence[float], references: dict[int, Tensor]
) -> list[list[Entry]]:
    """The packs that have a gradient; at least one, that the ratio is seen."""
    if references:
        return packs
    return [pack for pack in packs if any(advantages[entry.number] for entry in pack)] or packs[:1]
