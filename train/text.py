"""The policy gradient of what the model wrote: GRPO on the tokens of its reasoning.

It trains the understanding expert, with a reward of its own. Texts and pictures are one loss, and one step of
the optimiser (R3, arXiv 2602.15772; UniGRPO, arXiv 2603.23500).

N samples, G groups, R rewards, T tokens of texts, packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from realign.rewards.base import WeightedSum
from realign.rewards.spec import build_reward, parse_spec
from realign_kernels import AdvantageRule, group_advantage, grpo_loss
from train.policy import Policy
from train.ranks import Ranks
from train.rollouts import Rollout, RolloutOptions, score
from train.text_replay import TextEntry, TextReplayer, list_texts

NORMALIZATIONS = ("token", "sample")


@dataclass(frozen=True)
class TextOptions:
    """GRPO on texts. Their reward is their format alone unless it is said otherwise: a caption that is
    rewarded for its picture learns to be easy.

    Attributes:
        reward: of the texts, as `realign score` takes it; advantages are made by the recipe's rule.
        clip_low, clip_high: how far a token's ratio may leave 1, below and above (R3's, arXiv 2602.15772).
        weight: of the texts' loss beside the pictures'.
        learning_rate: of the understanding expert; the generation expert keeps `update.learning_rate`.
        kl_beta: weight of the pull to the model that training began with: the k3 estimate at each token,
            `exp(d) - d - 1`, d being what that model's log-prob is above today's (GRPO, arXiv 2402.03300,
            eq. 4); 0: none.
        normalization: "token": the mean over the tokens of all texts (DAPO, arXiv 2503.14476, eq. 8);
            "sample": over each text's tokens, then over the texts (GRPO, eq. 3).
        micro_batch: texts in one forward.
    """

    reward: str = "format"
    clip_low: float = 0.2
    clip_high: float = 0.2
    weight: float = 1.0
    learning_rate: float = 1e-6
    kl_beta: float = 0.0
    normalization: str = "token"
    micro_batch: int = 8

    def __post_init__(self) -> None:
        parse_spec(self.reward)
        if self.normalization not in NORMALIZATIONS:
            known = ", ".join(NORMALIZATIONS)
            raise ValueError(f"text normalization is {self.normalization!r}: must be one of {known}")
        for name in ("clip_low", "clip_high", "weight", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"text {name} is {getattr(self, name)}: must be above 0")
        if self.clip_low > 1:
            raise ValueError(f"text clip_low is {self.clip_low}: must be at most 1")
        if self.kl_beta < 0:
            raise ValueError(f"text kl_beta is {self.kl_beta}: must be 0 or more")
        if self.micro_batch < 1:
            raise ValueError(f"text micro_batch is {self.micro_batch}: must be at least 1")


@dataclass(frozen=True, eq=False)
class TrainedText:
    """A text, and all that its loss takes. T of its tokens; tensors are on the CPU.

    Attributes:
        advantage: of all its tokens.
        share: of each token in the loss.
        old_T: log-probs under the rollout's weights, by a replay.
        kept_K2: see `TextReplayer.find_kept`.
        reference_T: log-probs under the weights that training began with; None without a pull to them.
    """

    entry: TextEntry
    advantage: float
    share: float
    old_T: Tensor
    kept_K2: Tensor | None
    reference_T: Tensor | None


class TextTrainer:
    """Makes the texts of an iteration ready, and their gradients in each of its updates."""

    def __init__(
        self,
        policy: Policy,
        options: TextOptions,
        rollout: RolloutOptions,
        rule: AdvantageRule,
        ranks: Ranks,
    ) -> None:
        self.policy, self.options, self.rollout, self.rule, self.ranks = policy, options, rollout, rule, ranks
        self.reward: WeightedSum = build_reward(options.reward, ranks.device)
        self.replayer = TextReplayer(policy.engine)

    def prepare(self, parts: Sequence[Sequence[Rollout]]) -> tuple[list[list[TrainedText]], dict[str, float]]:
        """The texts of each part of this process's rollouts, while the weights are still the rollout's; and
        what the log says of those of all processes.
        """
        advantages, row = self._judge([rollout for part in parts for rollout in part])
        starts = accumulate((len(part) for part in parts), initial=0)
        entries = [self._list_own(part, start) for part, start in zip(parts, starts, strict=False)]
        texts = iter(self._remember(entries, advantages))
        prepared = [[next(texts) for _ in own] for own in entries]
        gaps = [_find_gap(text) for part in prepared for text in part]
        row["text_gap"] = float(self.ranks.gather(torch.tensor([max(gaps, default=0.0)])).max())
        count = sum(len(text.old_T) for part in prepared for text in part)
        count = self.ranks.sum(torch.tensor(count, device=self.policy.engine.model.device))
        return prepared, {**row, "text_tokens": int(count)}

    def count(self, texts: Sequence[TrainedText]) -> int:
        """What the sum of the loss is divided by, this process's part of it: tokens, or samples."""
        if self.options.normalization == "token":
            return sum(len(text.old_T) for text in texts)
        return len({text.entry.number for text in texts})

    def accumulate(self, texts: Sequence[TrainedText], count: float, collect: Callable[[], None]) -> Tensor:
        """Adds the gradients of texts, all of an update.

        Args:
            count: `count` of all processes' texts of the update.
            collect: is called after each backward pass.

        Returns: ratios and KLs of the tokens that were replayed, float32 [T, 2] on the CPU.
        """
        rows = [torch.empty(0, 2)]
        for pack in self._leave_out(self._pack(texts)):
            rows.append(self._accumulate(pack, count))
            collect()
        return torch.cat(rows)

    def _accumulate(self, pack: Sequence[TrainedText], count: float) -> Tensor:
        options = self.options
        logprob_T = self.replayer.score([t.entry for t in pack], [t.kept_K2 for t in pack])
        old_T = torch.cat([text.old_T for text in pack]).to(logprob_T)
        advantage_T, share_T = (
            torch.cat([torch.full((len(t.old_T),), getattr(t, name)) for t in pack]).to(logprob_T)
            for name in ("advantage", "share")
        )
        clip = (options.clip_low, options.clip_high)
        loss, metrics = grpo_loss(logprob_T, old_T, advantage_T, clip, weight_N=share_T, denominator=count)
        kl_T = torch.zeros_like(old_T)
        if options.kl_beta:
            kl_T = estimate_kl(logprob_T, torch.cat([t.reference_T for t in pack]).to(logprob_T))
            loss = loss + options.kl_beta * (kl_T * share_T).sum() / count
        (options.weight * loss).backward()
        return torch.stack((metrics.ratio_N, kl_T.detach()), dim=1).float().cpu()

    def _judge(self, rollouts: Sequence[Rollout]) -> tuple[list[float], dict[str, float]]:
        """The advantages of the texts of this process's rollouts, and what the log says of all.

        A chain that a group shares was sampled once: it has the mean of its samples' rewards, and is compared
        with the other groups' chains.
        """
        rewards_NR = self.ranks.gather(score(self.reward, rollouts))
        group_N, rank_N = (
            self.ranks.gather(torch.tensor(numbers, dtype=torch.int64))
            for numbers in ([rollout.group for rollout in rollouts], [self.ranks.rank] * len(rollouts))
        )
        weights_R = torch.tensor([weight for _, weight in self.reward.terms], dtype=torch.float32)
        num_groups = self.rollout.prompts
        if self.rollout.shared_chain:
            means = [rewards_NR[group_N == group].mean(0) for group in range(num_groups)]
            one_G = torch.zeros(num_groups, dtype=torch.int64)
            found = group_advantage(torch.stack(means), one_G, 1, weights_R, self.rule)
            advantage_N = found.advantage_N[group_N]
        else:
            found = group_advantage(rewards_NR, group_N, num_groups, weights_R, self.rule)
            advantage_N = found.advantage_N
        row = {"text_reward": float((rewards_NR @ weights_R).mean())}
        row["text_degenerate"] = float(found.is_degenerate_G.float().mean())
        return advantage_N[rank_N == self.ranks.rank].tolist(), row

    def _list_own(self, part: Sequence[Rollout], start: int) -> list[TextEntry]:
        """The part's texts, samples numbered from `start`; of one that a group shares, its first sample's."""
        tokenizer = self.policy.engine.model.tokenizer
        entries = list_texts([rollout.sample for rollout in part], tokenizer.bos, tokenizer.eos)
        if self.rollout.shared_chain:
            entries = [one for one in entries if part[one.number].number % self.rollout.group == 0]
        return [replace(entry, number=start + entry.number) for entry in entries]

    @torch.no_grad()
    def _remember(
        self, parts: Sequence[Sequence[TextEntry]], advantages: Sequence[float]
    ) -> list[TrainedText]:
        """What the texts are now, in the forwards that they will be in."""
        packs = [pack for entries in parts for pack in self._pack(entries)]
        kept = [self.replayer.find_kept(pack) for pack in packs]
        entries = [entry for pack in packs for entry in pack]
        olds = self._score(packs, kept)
        references: Sequence[Tensor | None] = [None] * len(entries)
        if self.options.kl_beta:
            with self.policy.reference():
                references = self._score(packs, kept)
        rest = (self._share(entries), olds, [one for own in kept for one in own], references)
        own = zip(entries, *rest, strict=True)
        return [TrainedText(entry, advantages[entry.number], *given) for entry, *given in own]

    def _score(
        self, packs: Sequence[Sequence[TextEntry]], kept: Sequence[Sequence[Tensor | None]]
    ) -> list[Tensor]:
        """Log-probs of each text, on the CPU."""
        found: list[Tensor] = []
        for pack, own in zip(packs, kept, strict=True):
            found += self.replayer.score(pack, own).cpu().split([len(entry.tokens) for entry in pack])
        return found

    def _share(self, entries: Sequence[TextEntry]) -> list[float]:
        """What each text's tokens weigh: a sample's texts are 1 together where samples count alike."""
        if self.options.normalization == "token":
            return [1.0] * len(entries)
        lengths: dict[int, int] = {}
        for entry in entries:
            lengths[entry.number] = lengths.get(entry.number, 0) + len(entry.tokens)
        return [1.0 / lengths[entry.number] for entry in entries]

    def _pack(self, texts: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.options.micro_batch
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def _leave_out(self, packs: list[Sequence[TrainedText]]) -> list[Sequence[TrainedText]]:
        """The packs that have a gradient; at least one, that the ratio is seen."""
        if self.options.kl_beta:
            return packs
        return [pack for pack in packs if any(text.advantage for text in pack)] or packs[:1]


def estimate_kl(logprob_T: Tensor, reference_T: Tensor) -> Tensor:
    """The k3 estimate of KL(policy | reference) at tokens that the policy drew: `exp(d) - d - 1`, never
    negative, d being `reference - logprob`.
    """
    difference_T = reference_T - logprob_T
    return difference_T.exp() - difference_T - 1


def measure_texts(made: Sequence[Tensor], options: TextOptions) -> dict[str, float]:
    """What the log says of an iteration's updates; ratios and KLs [T, 2] of each."""
    ratio_T, kl_T = torch.cat(list(made)).unbind(1)
    return {
        "text_ratio_mean": float(ratio_T.mean()),
        "text_ratio_min": float(ratio_T.min()),
        "text_ratio_max": float(ratio_T.max()),
        "first_text_ratio_error": float((made[0][:, 0] - 1).abs().max()),
        "text_clipped_low": float((ratio_T < 1 - options.clip_low).float().mean()),
        "text_clipped_high": float((ratio_T > 1 + options.clip_high).float().mean()),
        "text_kl": float(kl_T.mean()),
    }


def _find_gap(text: TrainedText) -> float:
    """The largest difference of log-probs as sampled and as replayed."""
    return float((torch.tensor(text.entry.sampled) - text.old_T).abs().max())


def check_text(options: TextOptions, rollout: RolloutOptions) -> None:
    """Raise ValueError for rollouts whose texts cannot be trained."""
    if rollout.reasoning == "none":
        raise ValueError("text is trained, and rollout reasoning is 'none': nothing is written; take ic-cot")
    if rollout.temperature == 0:
        raise ValueError("text is trained, and rollout temperature is 0: texts have to be sampled; take 1.0")
    if rollout.shared_chain and rollout.prompts < 2:
        what = "text is trained, and the only prompt of an iteration has one shared_chain"
        raise ValueError(
            f"{what}: there is nothing to compare it with; take more prompts, or no shared_chain"
        )
