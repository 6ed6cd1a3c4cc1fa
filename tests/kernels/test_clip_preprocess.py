"""clip_preprocess against Pillow itself, bit for bit, and what must not change it."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from realign.runtime.prepare import to_picture
from realign_kernels import clip_preprocess
from realign_kernels.clip_preprocess.plan import resized_size
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.pictures import cut, expect, expected_pixels, make_decoded, make_pictures

MODES = ["shortest", "longest", "squash"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Height and width of pictures, and of the result: one pixel, odd sides, up and down, thin, wide, tall enough
# to go along y first, the size that is asked for, more than one block of pixels, more than one tile.
SIZES = [
    ([(1, 1)], (3, 3)),
    ([(7, 5), (31, 14)], (16, 16)),
    ([(40, 61), (64, 64), (1, 90)], (32, 32)),
    ([(90, 1), (75, 20), (20, 75)], (17, 17)),
    ([(2, 3)], (1, 1)),
    ([(19, 23), (50, 8)], (23, 9)),
    ([(200, 150)], (5, 7)),
]


def run(pictures: list[Tensor], size: tuple[int, int] | int, impl: str, **options) -> Tensor:
    """The op on the device of the implementation; the result on the CPU."""
    device = device_of(impl)
    return clip_preprocess([picture.to(device) for picture in pictures], size, impl=impl, **options).cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sizes", "out"), SIZES)
def test_pixels_are_pillows(sizes, out, mode, impl):
    pictures = make_pictures(sizes)
    actual = run(pictures, out, impl, resize_mode=mode, fill=77)
    assert torch.equal(actual, expect(pictures, out, mode, fill=77))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_decoders_result_is_scored_as_it_is_saved(mode, dtype, impl):
    decoded = make_decoded([(40, 64), (33, 19), (80, 24)], dtype)
    decoded[0][0, :2, :3] = torch.tensor([[math.inf, -math.inf, 1.0], [-1.0, 0.999999, -3.0]])
    saved = []
    for pixels_CHW in decoded:
        file = io.BytesIO()
        to_picture(pixels_CHW).save(file, "png")
        saved.append(torch.from_numpy(np.array(Image.open(file))))
    actual = run(decoded, 32, impl, resize_mode=mode)
    assert torch.equal(actual, expect(saved, (32, 32), mode))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_black(impl):
    decoded = make_decoded([(9, 12)])
    black = decoded[0].clone()
    decoded[0][:, 3:5] = math.nan
    black[:, 3:5] = -1.0
    assert torch.equal(run(decoded, 8, impl), run([black], 8, impl))


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("size", [224, 336])
def test_large_pictures(size, impl):
    pictures = make_pictures([(1024, 1024), (512, 512), (300, 1700), (1700, 300), (224, 224)])
    assert torch.equal(run(pictures, size, impl), expect(pictures, (size, size)))


@pytest.mark.parametrize("impl", KERNELS)
def test_sides_far_apart(impl):
    pictures = make_pictures([(1, 1500), (1500, 1), (7, 999)])
    for mode in MODES:
        actual = run(pictures, 16, impl, resize_mode=mode)
        assert torch.equal(actual, expect(pictures, (16, 16), mode))


@st.composite
def drawn_calls(draw: st.DrawFn) -> dict:
    """Pictures of drawn sizes and kinds, and options."""
    sides = st.one_of(st.integers(1, 3), st.integers(1, 90))
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    seed = draw(st.integers(0, 99))
    decoded_dtype = draw(st.sampled_from([None, *DTYPES]))
    pictures = make_decoded(sizes, decoded_dtype, seed) if decoded_dtype else make_pictures(sizes, seed)
    out = draw(st.one_of(st.integers(1, 40).map(lambda side: (side, side)), st.tuples(sides, sides)))
    return {
        "pictures": pictures,
        "size": out,
        "resize_mode": draw(st.sampled_from(MODES)),
        "fill": draw(st.integers(0, 255)),
    }


def check_drawn_call(call: dict, impl: str) -> None:
    pictures = call["pictures"]
    pixels = pictures if pictures[0].dtype == torch.uint8 else [cut(picture) for picture in pictures]
    actual = run(impl=impl, **call)
    assert torch.equal(actual, expect(pixels, call["size"], call["resize_mode"], call["fill"]))


@given(call=drawn_calls())
@settings(max_examples=100)
def test_any_size_in_the_reference(call):
    check_drawn_call(call, "reference")


@needs_cpp
@given(call=drawn_calls())
@settings(max_examples=200)
def test_any_size_in_cpp(call):
    check_drawn_call(call, "cpp")


@given(call=drawn_calls())
@settings(max_examples=15)
def test_any_size_in_triton(call):
    check_drawn_call(call, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [make_pictures, make_decoded])
def test_a_picture_alone_has_the_bits_it_has_in_a_batch(make, impl):
    pictures = make([(40, 61), (1, 1), (75, 20), (64, 64)])
    batch = run(pictures, 24, impl)
    assert torch.equal(batch, torch.cat([run([picture], 24, impl) for picture in pictures]))


@needs_cpp
@pytest.mark.parametrize("count", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(count):
    pictures = make_pictures([(513, 400), (90, 700), (700, 90), (64, 64), (1, 9)][:count])
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(run(pictures, 224, "cpp"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_in_any_dtype_are_those_in_float32_rounded(dtype, impl):
    pictures = make_pictures([(20, 30)])
    actual = run(pictures, 16, impl, dtype=dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, expect(pictures, (16, 16)).to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_mean_and_std_are_those_asked_for(impl):
    pictures = make_pictures([(20, 30)])
    actual = run(pictures, 16, impl, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    unit = expected_pixels(pictures[0], (16, 16), "shortest", 0).permute(2, 0, 1) / 255
    expected = (unit - torch.tensor([0.5, 0.25, 0.0])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[
        :, None, None
    ]
    assert torch.equal(actual[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_for_all_pictures(impl):
    pictures = torch.stack(make_pictures([(20, 30)] * 3))
    decoded = torch.stack(make_decoded([(24, 16)] * 2, torch.bfloat16))
    for batch in (pictures, decoded):
        batch = batch.to(device_of(impl))
        assert torch.equal(clip_preprocess(batch, 16, impl=impl).cpu(), run(list(batch), 16, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    pictures = make_pictures([(20, 30), (41, 16)])
    decoded = make_decoded([(24, 16), (41, 17)])
    expected, expected_decoded = run(pictures, 16, impl), run(decoded, 16, impl)
    planes = [picture.permute(2, 0, 1).contiguous().permute(1, 2, 0) for picture in pictures]
    framed = [torch.nn.functional.pad(picture, (0, 0, 5, 2, 1, 1))[1:-1, 5:-2] for picture in pictures]
    interleaved = [pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1) for pixels in decoded]
    framed_decoded = [torch.nn.functional.pad(pixels, (3, 5, 1, 1))[:, 1:-1, 3:-5] for pixels in decoded]
    assert not any(picture.is_contiguous() for picture in (*planes, *framed, *interleaved, *framed_decoded))
    for strided in (planes, framed):
        assert torch.equal(run(strided, 16, impl), expected)
    for strided in (interleaved, framed_decoded):
        assert torch.equal(run(strided, 16, impl), expected_decoded)


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_that_is_used_again_is_read_again(impl):
    first, second = make_pictures([(20, 30), (20, 30)])
    picture = first.clone().to(device_of(impl))
    clip_preprocess([picture], 16, impl=impl)
    picture.copy_(second)
    assert torch.equal(clip_preprocess([picture], 16, impl=impl).cpu(), expect([second], (16, 16)))


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_written_to(impl):
    pictures = make_pictures([(20, 30), (75, 20)])
    before = [picture.clone() for picture in pictures]
    run(pictures, 16, impl)
    assert all(map(torch.equal, pictures, before))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_pictures(impl):
    assert clip_preprocess([], 16, impl="reference" if impl == "triton" else impl).shape == (0, 3, 16, 16)
    batch = torch.empty(0, 20, 30, 3, dtype=torch.uint8, device=device_of(impl))
    assert clip_preprocess(batch, (16, 8), impl=impl).shape == (0, 3, 16, 8)


def test_auto_runs_where_a_gradient_is_wanted_but_gives_none():
    decoded = make_decoded([(20, 30)])[0].requires_grad_()
    actual = clip_preprocess([decoded], 16)
    assert not actual.requires_grad
    assert torch.equal(actual, expect([cut(decoded.detach())], (16, 16)))


@pytest.mark.parametrize(
    ("sides", "out", "mode", "expected"),
    [
        ((1024, 768), (224, 224), "shortest", (298, 224)),
        ((768, 1024), (224, 224), "shortest", (224, 298)),
        ((500, 333), (224, 224), "longest", (224, 149)),
        ((333, 500), (224, 336), "shortest", (224, 336)),
        ((640, 480), (336, 224), "longest", (299, 224)),
        ((9, 2), (5, 5), "squash", (5, 5)),
        ((1, 1000), (224, 224), "longest", (1, 224)),
    ],
)
def test_resized_sizes(sides, out, mode, expected):
    assert resized_size(*sides, *out, mode) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pictures": torch.zeros(4, 4, 3, dtype=torch.uint8)},
            r"pictures has shape \(4, 4, 3\): must be uint8",
        ),
        (
            {"pictures": [torch.zeros(3, 4, 4, dtype=torch.uint8)]},
            r"pictures\[0\] .*\(3, 4, 4\): must be \[H, W, 3\]",
        ),
        ({"pictures": [torch.zeros(4, 4, 3)]}, r"pictures\[0\] .*\(4, 4, 3\): must be \[3, H, W\]"),
        ({"pictures": [torch.zeros(3, 4, 0)]}, r"\(3, 4, 0\): must be .* H and W at least 1"),
        (
            {"pictures": [torch.zeros(4, 4, 3, dtype=torch.int32)]},
            r"has dtype torch.int32: must be uint8, or a float",
        ),
        (
            {"pictures": [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)]},
            r"pictures\[1\] is torch.uint8 on cpu: must be as pictures\[0\], torch.float32 on cpu",
        ),
        ({"size": 0}, "size is 0: must be a positive int, or two"),
        ({"size": (8, 8, 8)}, r"size is \(8, 8, 8\): must be"),
        ({"resize_mode": "crop"}, "resize_mode is 'crop': must be one of shortest, longest, squash"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\): must be three numbers"),
        ({"std": (0.5, 0.0, 1.0)}, r"std is \(0.5, 0.0, 1.0\): must be three positive numbers"),
        ({"fill": 256}, "fill is 256: must be from 0 to 255"),
        ({"dtype": torch.float64}, "dtype is torch.float64: must be float32, bfloat16 or float16"),
        ({"impl": "cuda"}, "impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_bad_arguments(change, message):
    call = {"pictures": make_pictures([(8, 8)]), "size": 8, **change}
    with pytest.raises(ValueError, match=message):
        clip_preprocess(**call)


@needs_cpp
def test_explicit_cpp_never_falls_back():
    decoded = make_decoded([(8, 8)])
    with pytest.raises(ValueError, match="impl='cpp' cannot run: it has no gradient"):
        clip_preprocess([decoded[0].requires_grad_()], 8, impl="cpp")
    with pytest.raises(ValueError, match=r"impl='cpp' cannot run: .*not torch.float64"):
        clip_preprocess([make_decoded([(8, 8)])[0].double()], 8, impl="cpp")


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    name = "clip_preprocess" if impl == "cpp" else "clip_preprocess_triton"
    device = device_of(impl)
    clip_preprocess([picture.to(device) for picture in make_pictures([(8, 8)])], 8, impl=impl)
    op = getattr(torch.ops.realign_kernels, name).default
    levels_CV = torch.rand(3, 256, device=device).bfloat16()
    for pictures in (make_pictures([(9, 5), (4, 6)]), make_decoded([(3, 5)])):
        pictures = [picture.to(device) for picture in pictures]
        torch.library.opcheck(op, (pictures, levels_CV, 16, 8, "longest", 3), test_utils=OPCHECK)
