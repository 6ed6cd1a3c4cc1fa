"""Public ops of realign: one folder per op, each defined by its `reference.py`.

`api.py` of a folder holds the signature, the formula, the checks and the dispatch (`impl=`). README.md shows
every op's formula and use.
"""

from realign_kernels.arguments import Guidance, LogProbCoefficients, NoiseKeys, RatioBias, StepCoefficients
from realign_kernels.clip_preprocess.api import clip_preprocess
from realign_kernels.clip_score.api import clip_score
from realign_kernels.decode_attention.api import decode_attention
from realign_kernels.flow_step.api import flow_step
from realign_kernels.group_advantage.api import group_advantage
from realign_kernels.group_advantage.reference import AdvantageRule, GroupAdvantages
from realign_kernels.grpo_loss.api import grpo_loss
from realign_kernels.grpo_loss.reference import GrpoMetrics, RatioGuard, VelocityKL
from realign_kernels.guided_flow_step.api import guided_flow_step
from realign_kernels.guided_velocity.api import guided_velocity
from realign_kernels.merge_attention.api import merge_attention
from realign_kernels.mot_norm.api import mot_norm
from realign_kernels.mot_norm_fp8.api import mot_norm_fp8
from realign_kernels.mot_rope.api import mot_rope
from realign_kernels.mot_rope.arguments import KeyCache, QKNorm, RopeTable
from realign_kernels.philox_normal.api import philox_normal
from realign_kernels.quantize_fp8.api import quantize_fp8
from realign_kernels.sde_logprob.api import sde_logprob
from realign_kernels.swiglu.api import swiglu
from realign_kernels.swiglu_fp8.api import swiglu_fp8

__all__ = [
    "AdvantageRule",
    "GroupAdvantages",
    "GrpoMetrics",
    "Guidance",
    "KeyCache",
    "LogProbCoefficients",
    "NoiseKeys",
    "QKNorm",
    "RatioBias",
    "RatioGuard",
    "RopeTable",
    "StepCoefficients",
    "VelocityKL",
    "clip_preprocess",
    "clip_score",
    "decode_attention",
    "flow_step",
    "group_advantage",
    "grpo_loss",
    "guided_flow_step",
    "guided_velocity",
    "merge_attention",
    "mot_norm",
    "mot_norm_fp8",
    "mot_rope",
    "philox_normal",
    "quantize_fp8",
    "sde_logprob",
    "swiglu",
    "swiglu_fp8",
]
