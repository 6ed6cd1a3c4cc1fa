"""The ViT over packed patches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from realign.model.bagel import Bagel
from realign.model.vit import attend_fully

from .helpers import relative_error


def _packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(sum(lengths), 588), torch.arange(sum(lengths)), bounds


def test_golden(golden_model: Bagel, golden: dict[str, torch.Tensor]) -> None:
    packed = golden["vit.patches"], golden["vit.position_ids"], golden["vit.cu_seqlens"]
    with torch.no_grad():
        assert relative_error(golden_model.vit(*packed), golden["vit.hidden"]) < 1e-5
        assert relative_error(golden_model.embed_vit(*packed), golden["vit.tokens"]) < 1e-5


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 4, 4, 2, 4], [3]])
def test_each_picture_alone(golden_model: Bagel, lengths: list[int]) -> None:
    patches_LP, position_L, bounds = _packed(lengths)
    with torch.no_grad():
        together = golden_model.vit(patches_LP, position_L, bounds)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            alone = golden_model.vit(
                patches_LP[start:end], position_L[start:end], torch.tensor([0, end - start]).int()
            )
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-5)


def test_no_picture_and_empty_pictures(golden_model: Bagel) -> None:
    patches_LP, position_L, _ = _packed([3])
    with torch.no_grad():
        assert golden_model.vit(patches_LP[:0], position_L[:0], torch.tensor([0]).int()).shape == (0, 48)
        some = golden_model.vit(patches_LP, position_L, torch.tensor([0, 0, 3, 3]).int())
        plain = golden_model.vit(patches_LP, position_L, torch.tensor([0, 3]).int())
    assert torch.equal(some, plain)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], []])
def test_bounds_that_do_not_fit(golden_model: Bagel, bounds: list[int]) -> None:
    patches_LP, position_L, _ = _packed([3])
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the number of patches, 3"):
        golden_model.vit(patches_LP, position_L, torch.tensor(bounds).int())


def test_every_parameter_has_a_gradient(small_model: Bagel) -> None:
    patches_LP, position_L, bounds = _packed([4, 4, 2])
    small_model.embed_vit(patches_LP, position_L, bounds).square().mean().backward()
    for module in (small_model.vit, small_model.connector):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            for number, part in enumerate(parameter.grad.chunk(3 if "qkv_proj" in name else 1)):
                # a softmax does not see what is added to all its scores
                is_of_keys = name.endswith("qkv_proj.bias") and number == 1
                assert part.any() or is_of_keys, (name, number)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(golden_model: Bagel, golden: dict[str, torch.Tensor], autocast: bool) -> None:
    packed = golden["vit.patches"], golden["vit.position_ids"], golden["vit.cu_seqlens"]
    vit = golden_model.vit if autocast else copy.deepcopy(golden_model.vit).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert relative_error(vit(*packed), golden["vit.hidden"]) < 0.03


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_attention_is_no_worse_than_the_fused_op(autocast: bool) -> None:
    """Values and gradients; error against float64, at most twice that of torch's own bf16."""
    heads = [torch.randn(2, 3, 37, 16).bfloat16().requires_grad_() for _ in range(3)]
    weight = torch.randn(2, 3, 37, 16)

    def outcome(attend: Callable, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        out = attend(*heads)
        return [out, *torch.autograd.grad((out * weight).sum(), heads)]

    exact = outcome(attend_fully, [head.detach().double().requires_grad_() for head in heads])
    fused = outcome(torch.nn.functional.scaled_dot_product_attention, heads)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = outcome(attend_fully, heads)
    assert ours[0].dtype == torch.bfloat16
    for value, reference, expected in zip(ours, fused, exact, strict=True):
        assert relative_error(value, expected) <= 2 * relative_error(reference, expected)
