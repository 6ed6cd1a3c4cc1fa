"""Calls that ask for configurations of Triton kernels that bench entries do not: for compiling ahead of time.

The entries have the options that are worth a time, in the dtypes of the model; here are the others, and odd
sizes. Each function makes small tensors on the CPU and calls an op, whose launches are recorded: results are
garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from realign_kernels import (
    AdvantageRule,
    Guidance,
    KeyCache,
    LogProbCoefficients,
    NoiseKeys,
    QKNorm,
    RatioBias,
    RatioGuard,
    RopeTable,
    StepCoefficients,
    VelocityKL,
    clip_preprocess,
    clip_score,
    decode_attention,
    flow_step,
    group_advantage,
    grpo_loss,
    guided_flow_step,
    guided_velocity,
    merge_attention,
    mot_norm,
    mot_rope,
    philox_normal,
    sde_logprob,
    swiglu,
)

FLOAT, BF16, HALF = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, TOKENS, CHANNELS, ODD = 3, 48, 64, 5
MIXED = ("global", "channel", "text_channel")
OFFSETS = torch.tensor([0, 16, 16, TOKENS], dtype=torch.int32)
# Dtypes of velocities and of samples, and channels: the sampler's own, then others.
FORMATS = ((BF16, FLOAT, CHANNELS), (FLOAT, FLOAT, CHANNELS), (HALF, HALF, CHANNELS), (BF16, FLOAT, ODD))

BAGEL, MINI = (28, 4, 128), (4, 2, 32)
# Dtypes, and query heads, key heads and head dim: those of the models, then others.
HEADS = ((BF16, BAGEL), (FLOAT, BAGEL), (HALF, BAGEL), (FLOAT, MINI), (BF16, MINI), (BF16, (3, 1, 6)))


def make_fields(count: int, dtype: torch.dtype, width: int = CHANNELS) -> list[Tensor]:
    """Tensors of tokens."""
    return [torch.zeros(TOKENS, width, dtype=dtype) for _ in range(count)]


def make_guidance(renorm: str | tuple[str, ...] = MIXED) -> Guidance:
    """All branches on."""
    return Guidance(torch.full((BATCH,), 4.0), torch.full((BATCH,), 2.0), renorm, torch.zeros(BATCH))


def make_logprob(reduction: str = "mean") -> LogProbCoefficients:
    """Of a step."""
    return LogProbCoefficients(torch.ones(BATCH), torch.ones(BATCH), reduction)


def make_keys() -> NoiseKeys:
    """Of noise made inside."""
    return NoiseKeys(torch.zeros(BATCH, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64))


def make_step(noise: Tensor | NoiseKeys | None, logprob: LogProbCoefficients | None = None) -> dict:
    """What a step takes beside tensors of tokens."""
    std_B = None if noise is None else torch.ones(BATCH)
    coefficients = StepCoefficients(torch.ones(BATCH), torch.ones(BATCH), std_B)
    return {"coefficients": coefficients, "noise": noise, "logprob": logprob, "impl": "triton"}


def go_back(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Call the function and its backward."""
    with torch.enable_grad():
        leaves = [tensor.requires_grad_() for tensor in inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.zeros_like(result) for result in results]
        torch.autograd.grad(results, leaves, grads, allow_unused=True)


def call_guided_velocity() -> None:
    """Each renorm, dtype and number of branches."""
    for renorm in ("none", "channel", "text_channel"):
        guided_velocity(make_fields(3, BF16), OFFSETS, make_guidance(renorm), impl="triton")
    for dtype, _, channels in FORMATS:
        guided_velocity(make_fields(3, dtype, channels), OFFSETS, make_guidance(), FLOAT, impl="triton")
    for count in (1, 2):
        guidance = Guidance(torch.full((BATCH,), float(count)))
        guided_velocity(make_fields(count, BF16), OFFSETS, guidance, impl="triton")


def call_flow_step() -> None:
    """Each dtype with noise from keys and a log-prob; given noise, no noise."""
    for dtype, sample_dtype, channels in FORMATS:
        fields = (*make_fields(1, sample_dtype, channels), *make_fields(1, dtype, channels))
        flow_step(*fields, OFFSETS, **make_step(make_keys(), make_logprob("sum")))
    for noise in (*make_fields(1, BF16), None):
        flow_step(*make_fields(2, BF16), OFFSETS, **make_step(noise))


def call_guided_flow_step() -> None:
    """Each dtype with mixed renorms, noise from keys and a log-prob; each renorm; given noise."""
    for dtype, sample_dtype, channels in FORMATS:
        sample_LC, fields = *make_fields(1, sample_dtype, channels), make_fields(3, dtype, channels)
        step = make_step(make_keys(), make_logprob("sum"))
        guided_flow_step(sample_LC, fields, OFFSETS, make_guidance(), **step)
    for renorm in ("none", "channel", "text_channel"):
        sample_LC, noise_LC = make_fields(2, BF16)
        step = make_step(noise_LC, make_logprob())
        guided_flow_step(sample_LC, make_fields(3, BF16), OFFSETS, make_guidance(renorm), **step)


def call_philox_normal() -> None:
    """Channels that blocks of four do not fill."""
    philox_normal(make_keys(), OFFSETS, TOKENS, ODD, impl="triton")


def call_sde_logprob() -> None:
    """Each dtype, with a bias and without, and both reductions."""
    for (dtype, _, channels), reduction in product(FORMATS, ("mean", "sum")):
        velocity_LC, old_LC = make_fields(2, dtype, channels)
        step = tuple(make_fields(2, FLOAT, channels))
        coefficients, logprob = (
            StepCoefficients(torch.ones(BATCH), torch.ones(BATCH)),
            make_logprob(reduction),
        )
        bias = RatioBias(old_LC, torch.ones(BATCH)) if reduction == "mean" else None

        def run(leaf_LC, step=step, coefficients=coefficients, logprob=logprob, bias=bias):
            return sde_logprob(step, leaf_LC, OFFSETS, coefficients, logprob, bias, impl="triton")

        go_back(run, velocity_LC)


def call_group_advantage() -> None:
    """Each kind of standard deviation, order of sum and normalisation, and dtype."""
    group_N = torch.arange(TOKENS) % BATCH
    for std, normalize in product(("group", "global", "none"), ("sum", "each")):
        rule = AdvantageRule(std, normalize, clamp=5.0)
        group_advantage(torch.zeros(TOKENS, 3), group_N, BATCH, torch.ones(3), rule, impl="triton")
    for dtype in (BF16, HALF):
        group_advantage(torch.zeros(TOKENS, dtype=dtype), group_N, BATCH, impl="triton")


def call_grpo_loss() -> None:
    """Each dtype with all that there is, and none of it."""
    ones_B = torch.ones(BATCH)
    guard = RatioGuard(ones_B, ones_B, ones_B)

    def run(logprob_B, velocity_LC=None, guard=guard, weight_B=ones_B):
        kl = VelocityKL(velocity_LC, velocity_LC.detach(), OFFSETS, 0.04, ones_B) if guard else None
        numbers = (logprob_B.detach(), torch.zeros(BATCH), (0.1, 0.2), guard, kl, weight_B)
        return grpo_loss(logprob_B, *numbers, impl="triton")[0]

    for dtype, _, channels in FORMATS:
        go_back(run, torch.zeros(BATCH), *make_fields(1, dtype, channels))
    go_back(lambda logprob_B: run(logprob_B, None, None, None), torch.zeros(BATCH))


def call_mot_norm() -> None:
    """Each dtype and width with two experts and a residual, and without."""
    for dtype, width in ((FLOAT, 3584), (HALF, 3584), (FLOAT, 128), (BF16, 128), (BF16, 72)):
        for expert_L in (torch.zeros(TOKENS, dtype=torch.int32), None):
            weights = [torch.ones(width, dtype=dtype) for _ in range(1 if expert_L is None else 2)]

            def run(hidden_LE, residual_LE, *weights, expert_L=expert_L):
                residual_LE = None if expert_L is None else residual_LE
                return mot_norm(hidden_LE, weights, 1e-6, expert_L, residual_LE, impl="triton")

            go_back(run, *make_fields(2, dtype, width), *weights)


def call_decode_attention() -> None:
    """Each dtype and number of heads in slots by token, a prefix that all rows share; lengths of 32 bits."""
    for dtype, (queries, keys, width) in HEADS:
        query_RHD = torch.zeros(BATCH, queries, width, dtype=dtype)
        slots = (
            torch.zeros(2, 1, TOKENS, keys, width, dtype=dtype).transpose(2, 3).expand(2, BATCH, -1, -1, -1)
        )
        decode_attention(query_RHD, *slots, torch.zeros(BATCH, dtype=torch.int32), impl="triton")


def call_merge_attention() -> None:
    """Each dtype and number of heads, the values those of wider rows."""
    for dtype, (queries, _, width) in HEADS:
        out_LHD = torch.zeros(TOKENS, 2 * queries, width, dtype=dtype)[:, :queries]
        lse_LH = torch.zeros(TOKENS, queries)
        merge_attention(out_LHD, lse_LH, out_LHD, lse_LH, impl="triton")


def call_mot_rope() -> None:
    """Fused projections of each dtype and number of heads, with two experts' norms; without, into a cache."""
    for dtype, (queries, keys, width) in HEADS:
        rope = RopeTable.build(torch.arange(TOKENS), width, 1e6)
        fused = torch.zeros(TOKENS, queries + 2 * keys, width, dtype=dtype)
        fields = fused.split((queries, keys, keys), dim=1)[:2]
        cache = KeyCache(torch.zeros_like(fields[1]), torch.arange(TOKENS))
        mot_rope(*fields, rope, key_cache=cache, impl="triton")

        def run(query_LHD, key_LKD, *weights, rope=rope):
            norm = QKNorm(weights[:2], weights[2:])
            expert_L = torch.zeros(TOKENS, dtype=torch.int32)
            return mot_rope(query_LHD, key_LKD, rope, norm, expert_L, torch.arange(TOKENS), impl="triton")

        go_back(
            run, *(field.detach() for field in fields), *(torch.ones(width, dtype=dtype) for _ in range(4))
        )


def call_swiglu() -> None:
    """Each dtype, a size that nothing divides, and both halves in one tensor."""
    for dtype, width in ((FLOAT, 18944), (HALF, 18944), (BF16, ODD)):
        go_back(lambda gate, up: swiglu(gate, up, impl="triton"), *make_fields(2, dtype, width))
    go_back(lambda halves: swiglu(halves, impl="triton"), *make_fields(1, BF16, 2 * 18944))


def call_clip_score() -> None:
    """Each dtype and mode, and an odd width."""
    for dtype, mode, width in product(DTYPES, ("pairs", "all"), (768, ODD)):
        clip_score(*make_fields(2, dtype, width), mode, torch.ones(()), impl="triton")


def call_clip_preprocess() -> None:
    """Pictures as bytes and as floats of each dtype; results of each dtype; every fit."""
    for mode, dtype in zip(("shortest", "longest", "squash"), DTYPES, strict=True):
        pictures = [torch.zeros(64, 48, 3, dtype=torch.uint8), torch.zeros(33, 31, 3, dtype=torch.uint8)]
        clip_preprocess(pictures, 224, mode, dtype=dtype, impl="triton")
        decoded = [torch.zeros(3, 64, 48, dtype=dtype), torch.zeros(3, 33, 31, dtype=dtype)]
        clip_preprocess(decoded, 224, mode, dtype=dtype, impl="triton")
        clip_preprocess(decoded[:1], 224, mode, impl="triton")


VARIANTS: dict[str, Callable[[], None]] = {
    "clip_preprocess": call_clip_preprocess,
    "clip_score": call_clip_score,
    "decode_attention": call_decode_attention,
    "flow_step": call_flow_step,
    "group_advantage": call_group_advantage,
    "grpo_loss": call_grpo_loss,
    "guided_flow_step": call_guided_flow_step,
    "guided_velocity": call_guided_velocity,
    "merge_attention": call_merge_attention,
    "mot_norm": call_mot_norm,
    "mot_rope": call_mot_rope,
    "philox_normal": call_philox_normal,
    "sde_logprob": call_sde_logprob,
    "swiglu": call_swiglu,
}
