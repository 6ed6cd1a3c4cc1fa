"""The work of an iteration of alignment, and of CLIP scoring alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.align.workloads import PROMPT, SCORED
from bench.generate.workloads import CHAIN_TOKENS, GROUP, RL_TIMESTEPS
from bench.roofline.chips import BYTES, Phase
from bench.roofline.estimate import Estimate, count_layer_weights
from realign.model.config import BagelConfig
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from train.rollouts import WindowOptions

NUM_NOISY = WindowOptions().size
NUM_SCORED, _, SCORED_SIDE = SCORED["cuda"]
CLIP_BATCH = 64  # pictures, and captions, in one forward


@dataclass(frozen=True)
class Tower:
    """A transformer of CLIP's; `num_inputs` numbers make a token by a product, for 0 they are looked up."""

    num_tokens: int
    width: int
    num_layers: int
    num_inputs: int = 0

    def add_forward(self, phase: Phase, count: int) -> None:
        """So many pictures or captions, `CLIP_BATCH` at a time."""
        weights = self.num_layers * 12 * self.width**2
        num_tokens = count * self.num_tokens
        phase.product_flops += 2 * num_tokens * (weights + self.num_inputs * self.width)
        phase.attention_flops += self.num_layers * 4 * num_tokens * self.num_tokens * self.width
        phase.product_bytes += BYTES * weights * -(-count // CLIP_BATCH)
        # Two norms with the residual, both ways; the hidden layer's activation.
        phase.element_bytes += BYTES * self.num_layers * num_tokens * 16 * self.width


@dataclass(frozen=True)
class Clip:
    """A CLIP's two towers."""

    picture: Tower
    text: Tower

    def add_scoring(self, phase: Phase, count: int, side: int) -> None:
        """So many pictures of `side` pixels square that lie on the device, each with a caption of its own."""
        phase.element_bytes += BYTES * 3 * count * side**2
        self.picture.add_forward(phase, count)
        self.text.add_forward(phase, count)


VIT_L_14 = Clip(Tower(257, 1024, 24, num_inputs=3 * 14**2), Tower(77, 768, 12))


def build_iteration(side: int) -> list[Request]:
    """As `bench.align` measures it: a prompt without references, free-text chains, a group of 24, text
    guidance 4 on every step.
    """
    guidance, text = GuidanceSettings(4.0, 1.0, (0.0, 1.0)), TextSettings(CHAIN_TOKENS)
    settings = Settings(side, side, "think", RL_TIMESTEPS, guidance=guidance, text=text)
    prompt = Prompt.build([PROMPT])
    return [Request(f"RGA/{number}", prompt, settings=settings) for number in range(GROUP)]


def estimate_iteration(config: BagelConfig, requests: Sequence[Request]) -> Estimate:
    """Rollouts, ViT-L/14's rewards, the replay of two steps for LoRA's gradients, adapters merged anew."""
    estimate = Estimate.of(config, requests)
    VIT_L_14.add_scoring(estimate.phases["rewards"], len(requests), requests[0].settings.height)
    forward = Phase()
    for rows in estimate.steps[:NUM_NOISY]:
        estimate.add_forward(forward, rows, is_gen=True)
    estimate.phases["replay"].add_training(forward, has_weight_gradients=False)
    merged = config.llm.num_hidden_layers * count_layer_weights(config.llm)
    estimate.phases["publishing"].element_bytes += 2 * BYTES * merged
    return estimate


def estimate_scoring(config: BagelConfig) -> tuple[Estimate, int]:
    """ViT-L/14 alone; and of how many pictures."""
    estimate = Estimate(config)
    VIT_L_14.add_scoring(estimate.phases["rewards"], NUM_SCORED, SCORED_SIDE)
    return estimate, NUM_SCORED
