"""fp8: scales, products, the decoder on them, and the file that keeps the scales."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from realign.model.bagel import Bagel
from realign.model.fp8 import (
    LINEARS,
    Fp8Linear,
    Fp8Scales,
    check_device,
    find_scale,
    recording_inputs,
    use_fp8,
)
from realign.model.linear import RowLinear
from realign.model.mot import Route
from realign_kernels import quantize_fp8

from .helpers import relative_error
from .test_mot import CausalAttention

# Of one product of normal numbers: two roundings of 3 bits, whose errors average out over the sum.
PRODUCT_ERROR = 0.05


@pytest.fixture
def model(checkpoint: Path) -> Bagel:
    """One of its own: fp8 stays on."""
    return Bagel.from_pretrained(checkpoint)


def run(model: Bagel, hidden_LE: torch.Tensor, is_gen: torch.Tensor) -> torch.Tensor:
    route = Route.from_mask(is_gen)
    with torch.no_grad():
        return model.decoder(hidden_LE, torch.arange(len(hidden_LE)), route, CausalAttention())


def draw_tokens(model: Bagel, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_LE = torch.randn(length, model.config.llm.hidden_size, generator=generator)
    return hidden_LE, torch.arange(length) % 4 != 0


def calibrate(model: Bagel) -> Fp8Scales:
    with recording_inputs(model) as find_scales:
        run(model, *draw_tokens(model))
        return Fp8Scales("mine", find_scales())


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (449.0, 2.0), (447.0, 1.0), (224.0, 0.5), (225.0, 1.0), (7.0, 2.0**-6), (0.0, 1.0)],
)
def test_a_scale_is_the_least_power_of_two_that_holds_all(largest: float, scale: float) -> None:
    assert find_scale(largest) == scale


@pytest.mark.parametrize("largest", [math.inf, math.nan])
def test_there_is_no_scale_for_what_is_not_finite(largest: float) -> None:
    with pytest.raises(ValueError, match="there is no scale for it"):
        find_scale(largest)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product(bias: bool, dtype: torch.dtype) -> None:
    """Exactly that of the rounded numbers; near that of the numbers themselves."""
    torch.manual_seed(0)
    linear = RowLinear(96, 40, bias=bias, dtype=dtype)
    x_LI = torch.randn(7, 96)
    scale = find_scale(float(x_LI.abs().max()))
    quantized = Fp8Linear(linear, scale)
    codes_LI = quantize_fp8(x_LI, scale)
    with torch.no_grad():
        found, plain = quantized(codes_LI), linear(x_LI.to(dtype))
    weight_OI = quantized.codes_OI.double() * float(quantized.weight_scale_1)
    exact = codes_LI.double() * scale @ weight_OI.T + (linear.bias.double() if bias else 0)
    assert found.dtype == dtype
    assert relative_error(found, exact) < 2 * torch.finfo(dtype).eps + 1e-6
    assert relative_error(found, plain) < PRODUCT_ERROR
    assert relative_error(weight_OI, linear.weight) < 2.0**-4


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_product_is_the_same(bias: bool) -> None:
    """What runs on a GPU, with the arguments that it has there."""
    torch.manual_seed(0)
    quantized = Fp8Linear(RowLinear(96, 48, bias=bias, dtype=torch.bfloat16), 0.25)
    codes_LI = quantize_fp8(3 * torch.randn(7, 96), 0.25)
    with torch.no_grad():
        found, expected = quantized.multiply(codes_LI), quantized.multiply_dequantised(codes_LI)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 2 * torch.finfo(torch.bfloat16).eps


def test_a_weight_is_quantised_anew_in_place() -> None:
    linear = RowLinear(32, 16, bias=False)
    quantized = Fp8Linear(linear, 1.0)
    places = [t.data_ptr() for t in (quantized.codes_OI, quantized.weight_scale_1)]
    with torch.no_grad():
        linear.weight.mul_(-64.0)
    old = quantized.codes_OI.float()
    quantized.requantize()
    assert torch.equal(quantized.codes_OI.float(), -old)
    assert [t.data_ptr() for t in (quantized.codes_OI, quantized.weight_scale_1)] == places


def test_the_scales_hold_the_largest_input_seen(model: Bagel) -> None:
    largest: dict[str, float] = {}
    layer = model.decoder.layers[1].gen

    def watch(name: str):
        return lambda module, inputs: largest.update({name: float(inputs[0].abs().max())})

    handles = [getattr(layer, name).register_forward_pre_hook(watch(name)) for name in LINEARS]
    scales = calibrate(model)
    assert scales.layers[1] == {name: find_scale(largest[name]) for name in LINEARS}
    for handle in handles:
        handle.remove()
    for one in model.decoder.layers:
        assert not any(getattr(one.gen, name)._forward_pre_hooks for name in LINEARS)


def test_generation_is_near_and_understanding_alone_untouched(model: Bagel) -> None:
    hidden_LE, is_gen = draw_tokens(model)
    none = torch.zeros_like(is_gen)
    plain, plain_und, plain_gen = (run(model, hidden_LE, own) for own in (is_gen, none, ~none))
    version = model.weights_version
    use_fp8(model, calibrate(model))
    assert model.weights_version == version + 1  # contexts that were read before are dropped
    found = run(model, hidden_LE, is_gen)
    assert not torch.equal(found, plain)
    assert float((found - plain).norm() / plain.norm()) < 0.1
    assert torch.equal(run(model, hidden_LE, none), plain_und)
    assert 0 < float((run(model, hidden_LE, ~none) - plain_gen).norm() / plain_gen.norm()) < 0.1


def test_a_token_has_its_own_bits(model: Bagel) -> None:
    """Those before it are the same: what comes after, and how many there are, is nothing to it."""
    hidden_LE, is_gen = draw_tokens(model, 61)
    use_fp8(model, calibrate(model))
    whole = run(model, hidden_LE, is_gen)
    for length in (1, 2, 5, 60):
        torch.testing.assert_close(
            run(model, hidden_LE[:length], is_gen[:length]), whole[:length], rtol=0, atol=1e-5
        )


def test_scales_of_another_model(model: Bagel) -> None:
    scales = calibrate(model)
    scales.check_model("mine")
    with pytest.raises(ValueError, match="are of another checkpoint: `realign calibrate` makes this one's"):
        scales.check_model("other")
    with pytest.raises(ValueError, match="the fp8 scales are of 1 layers: the model has 2"):
        use_fp8(model, Fp8Scales("mine", scales.layers[:1]))
    assert all(layer.fp8 is None for layer in model.decoder.layers)


def test_what_changes_is_quantised_anew(model: Bagel, checkpoint: Path) -> None:
    """As in a model that had the new weights from the start; what did not change stays as it is."""
    scales, other = calibrate(model), Bagel.from_pretrained(checkpoint)
    use_fp8(model, scales)
    changed = "decoder.layers.1.gen.down_proj.weight"
    for one in (model, other):
        with torch.no_grad():
            one.get_parameter(changed).mul_(3.0).add_(0.01)
    stale = run(model, *draw_tokens(model))
    model.announce_weights({changed, "decoder.layers.0.und.o_proj.weight"})
    use_fp8(other, scales)
    assert torch.equal(run(model, *draw_tokens(model)), run(other, *draw_tokens(other)))
    assert not torch.equal(run(model, *draw_tokens(model)), stale)


def test_the_file_of_scales(tmp_path: Path, model: Bagel) -> None:
    scales = calibrate(model)
    scales.save(tmp_path / "scales.json")
    assert Fp8Scales.load(tmp_path / "scales.json") == scales


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no fp8 scales: `realign calibrate` makes them"),
        ("[]", "holds no fp8 scales"),
        (json.dumps({"model": "x", "layers": [{"qkv_proj": 1.0}]}), "holds no fp8 scales"),
        (
            json.dumps({"model": "x", "layers": [dict.fromkeys(LINEARS, -1.0)]}),
            "has a scale that is not a pos",
        ),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Fp8Scales.load(tmp_path / "scales.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json cannot be read \(No such file"):
        Fp8Scales.load(tmp_path / "no.json")


def test_devices_without_a_float8_product_are_refused(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(model)
    monkeypatch.setattr(Bagel, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or more: cuda is none"):
        check_device(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"needs the dtype bfloat16: the model is torch\.float32"):
        check_device(model)
    check_device(model.bfloat16())
