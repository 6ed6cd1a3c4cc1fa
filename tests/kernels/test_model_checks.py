"""Every wrong argument of an op of the model is a ValueError that names the argument and its value."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import KeyCache, QKNorm, RopeTable, mot_norm, mot_rope, swiglu

ROWS = {"hidden_LE": torch.zeros(3, 4), "weights": [torch.zeros(4), torch.zeros(4)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_LE": torch.zeros(3)}, r"hidden_LE has shape \(3,\): must be packed tokens"),
        ({"hidden_LE": torch.zeros(3, 4).int()}, "hidden_LE has dtype torch.int32: must be float32"),
        ({"weights": []}, "weights has 0 tensors: must be understanding's, or also generation's"),
        ({"weights": [torch.zeros(4)] * 3}, "weights has 3 tensors"),
        (
            {"weights": [torch.zeros(4), torch.zeros(3)]},
            r"weights\[1\] is torch.float32 \(3,\) on cpu: must be float \[4\] on cpu, a number per channel",
        ),
        ({"weights": [torch.zeros(4).int()]}, r"weights\[0\] is torch.int32 \(4,\)"),
        ({"weights": [torch.zeros(4, device="meta")]}, r"weights\[0\] is torch.float32 \(4,\) on meta"),
        (
            {"expert_L": torch.zeros(3).long()},
            r"expert_L is torch.int64 \(3,\) on cpu: must be int32 \[3\] on cpu, a number per token",
        ),
        ({"expert_L": torch.zeros(2).int()}, r"expert_L is torch.int32 \(2,\)"),
        ({"expert_L": torch.tensor([0, 2, 1]).int()}, "expert_L holds 2: must be from 0 to 1"),
        ({"expert_L": torch.tensor([0, -1, 1]).int()}, "expert_L holds -1: must be from 0 to 1"),
        (
            {"expert_L": torch.tensor([0, 1, 0]).int(), "weights": [torch.zeros(4)]},
            "expert_L holds 1: must be from 0 to 0",
        ),
        (
            {"residual_LE": torch.zeros(2, 4)},
            r"residual_LE is \(2, 4\) on cpu: must be \(3, 4\) on cpu, as hidden_LE",
        ),
        ({"residual_LE": torch.zeros(3, 4, device="meta")}, r"residual_LE is \(3, 4\) on meta"),
        ({"impl": "cuda"}, "mot_norm: impl is 'cuda': must be one of auto, reference, cpp, triton"),
        ({"hidden_LE": torch.zeros(3, 4).double(), "impl": "cpp"}, "impl='cpp' cannot run"),
    ],
)
def test_mot_norm_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        mot_norm(**{**ROWS, **change})


HEADS = {
    "query_LHD": torch.zeros(3, 2, 4),
    "key_LKD": torch.zeros(3, 1, 4),
    "rope": RopeTable(torch.zeros(3, 2), torch.zeros(3, 2)),
}
WEIGHT = torch.zeros(4)
SLOTS, SLOT = torch.zeros(5, 1, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_LHD": torch.zeros(3, 4)},
            r"query_LHD has shape \(3, 4\): must be tokens by heads by head dim",
        ),
        ({"key_LKD": torch.zeros(3, 1, 4).int()}, "key_LKD has dtype torch.int32: must be float32"),
        ({"query_LHD": torch.zeros(3, 2, 5)}, "query_LHD has head dim 5: must be even"),
        (
            {"key_LKD": torch.zeros(2, 1, 4)},
            r"key_LKD is torch.float32 \(2, 1, 4\) on cpu: must be torch.float32 \[3, K, 4\] on cpu",
        ),
        ({"key_LKD": torch.zeros(3, 1, 4).half()}, r"key_LKD is torch.float16 \(3, 1, 4\)"),
        (
            {"rope": RopeTable(torch.zeros(3, 2), torch.zeros(3, 4))},
            r"rope.sin_LA is \(3, 4\) on cpu: must be \(3, 2\) on cpu, half a head for each token",
        ),
        ({"norm": QKNorm([WEIGHT[:3]], [WEIGHT])}, r"norm.query_weights\[0\] is torch.float32 \(3,\)"),
        ({"norm": QKNorm([WEIGHT], [])}, "norm.key_weights has 0 tensors"),
        (
            {"norm": QKNorm([WEIGHT] * 2, [WEIGHT])},
            "norm has 2 query_weights and 1 key_weights: must be one each, or two each",
        ),
        (
            {"norm": QKNorm([WEIGHT] * 2, [WEIGHT] * 2), "expert_L": torch.tensor([0, 1, 3]).int()},
            "expert_L holds 3: must be from 0 to 1",
        ),
        (
            {"out_index_L": torch.tensor([0, 1, 2]).int()},
            r"out_index_L is torch.int32 \(3,\) on cpu: must be int64 \[3\] on cpu, a row per token",
        ),
        ({"out_index_L": torch.tensor([0, 2, 2])}, "out_index_L does not name each of 0 to 2 once"),
        ({"out_index_L": torch.tensor([0, 1, 3])}, "out_index_L does not name each of 0 to 2 once"),
        (
            {"key_cache": KeyCache(torch.zeros(5, 2, 4), SLOT)},
            r"key_cache.slots_SKD has shape \(5, 2, 4\), strides \(8, 4, 1\): must be \[S, 1, 4\]",
        ),
        ({"key_cache": KeyCache(torch.zeros(4, 1, 5).permute(2, 1, 0), SLOT)}, r"strides \(1, 5, 5\)"),
        (
            {"key_cache": KeyCache(SLOTS.half(), SLOT)},
            "key_cache.slots_SKD is torch.float16 on cpu: must be torch.float32 on cpu, as key_LKD",
        ),
        ({"key_cache": KeyCache(SLOTS, SLOT.int())}, r"key_cache.slot_L is torch.int32 \(3,\)"),
        ({"key_cache": KeyCache(SLOTS, SLOT + 3)}, "key_cache.slot_L holds 5: must be from 0 to 4"),
        (
            {"key_cache": KeyCache(SLOTS, SLOT), "query_LHD": torch.zeros(3, 2, 4, requires_grad=True)},
            "key_cache is given and a tensor requires a gradient",
        ),
        ({"impl": "cuda"}, "mot_rope: impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_mot_rope_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        mot_rope(**{**HEADS, **change})


@pytest.mark.parametrize(
    ("gate", "up", "impl", "message"),
    [
        (
            torch.zeros(2, 4),
            torch.zeros(2, 3),
            "auto",
            r"up has shape \(2, 3\): must be that of gate, \(2, 4\)",
        ),
        (torch.zeros(2).half(), torch.zeros(2), "auto", r"up has dtype torch.float32: must be that of gate"),
        (torch.zeros(2).int(), torch.zeros(2).int(), "auto", "gate has dtype torch.int32: must be float32"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "auto", "up is on meta: must be on cpu"),
        (torch.zeros(2).double(), torch.zeros(2).double(), "cpp", "impl='cpp' cannot run"),
        (torch.zeros(2, 3), None, "auto", r"gate has shape \(2, 3\) and up is None: its width must be even"),
        (torch.zeros(()), None, "auto", r"gate has shape \(\) and up is None"),
        (
            torch.zeros(2),
            torch.zeros(2),
            "cuda",
            "impl is 'cuda': must be one of auto, reference, cpp, triton",
        ),
    ],
)
def test_swiglu_arguments(gate, up, impl, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up, impl=impl)
