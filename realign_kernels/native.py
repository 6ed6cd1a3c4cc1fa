"""The compiled extension `realign_kernels._C`, as torch custom ops.

`csrc` knows nothing of torch: it takes addresses and counts. The ops here check nothing (the `api.py` of each
op has); they make tensors contiguous, allocate the result, fill the parameters and launch.
L packed tokens, C channels.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RENORM_CODES = {"none": 0, "global": 1, "channel": 2, "text_channel": 3}


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module("realign_kernels._C")
    except ImportError as error:
        return None, f"no compiled extension, plain torch runs in its place ({error})"
    return extension, f"compiled extension: {extension.__file__}"


_C, _STATE = _load_extension()


def is_available() -> bool:
    """True if the compiled extension was built and loads."""
    return _C is not None


def describe() -> str:
    """One line: where the extension is, or why it is not."""
    return _STATE


def has_cuda() -> bool:
    """True if the CUDA kernels were built."""
    return False


def describe_cuda() -> str:
    """One line: where the CUDA kernels are, or why they are not."""
    return "no compiled CUDA kernels"


def _launch(like_LC: Tensor, velocity_LC: Tensor, renorm: list[int], **arrays: Tensor | None) -> Tensor:
    """Run the core on named arrays; the result is like `like_LC`."""
    out_LC = torch.empty(like_LC.shape, dtype=like_LC.dtype)
    contiguous = {name: array.contiguous() for name, array in arrays.items() if array is not None}
    params = _C.FlowParams()
    params.num_tokens, params.num_channels = velocity_LC.shape
    params.num_samples = contiguous["cu_seqlens"].numel() - 1
    params.num_threads = torch.get_num_threads()
    params.velocity_dtype = DTYPE_CODES[velocity_LC.dtype]
    params.sample_dtype = DTYPE_CODES[like_LC.dtype]
    params.renorm = renorm
    params.out = out_LC.data_ptr()
    for name, array in contiguous.items():
        setattr(params, name, array.data_ptr())
    _C.guided_flow_step(params)
    return out_LC


_GUIDANCE = (
    "Tensor cond, Tensor? text_uncond, Tensor? image_uncond, "
    "Tensor cu_seqlens, Tensor text_scale, Tensor? image_scale"
)
_STEP = "Tensor a, Tensor b, Tensor? std, Tensor? noise"
_RENORM = "int[] renorm, Tensor? renorm_min"


@torch.library.custom_op(
    "realign_kernels::guided_velocity",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_GUIDANCE}, {_RENORM}) -> Tensor",
)
def guided_velocity_cpp(
    cond: Tensor,
    text_uncond: Tensor | None,
    image_uncond: Tensor | None,
    cu_seqlens: Tensor,
    text_scale: Tensor,
    image_scale: Tensor | None,
    renorm: list[int],
    renorm_min: Tensor | None,
) -> Tensor:
    """`guided_velocity` on the CPU; `renorm` as `RENORM_CODES`, one per sample."""
    return _launch(
        cond,
        cond,
        renorm,
        cond=cond,
        text_uncond=text_uncond,
        image_uncond=image_uncond,
        cu_seqlens=cu_seqlens,
        text_scale=text_scale,
        image_scale=image_scale,
        renorm_min=renorm_min,
    )


@torch.library.custom_op(
    "realign_kernels::flow_step",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor sample, Tensor velocity, Tensor cu_seqlens, {_STEP}) -> Tensor",
)
def flow_step_cpp(
    sample: Tensor,
    velocity: Tensor,
    cu_seqlens: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """`flow_step` on the CPU."""
    return _launch(
        sample,
        velocity,
        [],
        sample=sample,
        cond=velocity,
        cu_seqlens=cu_seqlens,
        a=a,
        b=b,
        std=std,
        noise=noise,
    )


@torch.library.custom_op(
    "realign_kernels::guided_flow_step",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor sample, {_GUIDANCE}, {_STEP}, {_RENORM}) -> Tensor",
)
def guided_flow_step_cpp(
    sample: Tensor,
    cond: Tensor,
    text_uncond: Tensor | None,
    image_uncond: Tensor | None,
    cu_seqlens: Tensor,
    text_scale: Tensor,
    image_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    renorm: list[int],
    renorm_min: Tensor | None,
) -> Tensor:
    """`guided_flow_step` on the CPU; `renorm` as `RENORM_CODES`, one per sample."""
    return _launch(
        sample,
        cond,
        renorm,
        sample=sample,
        cond=cond,
        text_uncond=text_uncond,
        image_uncond=image_uncond,
        cu_seqlens=cu_seqlens,
        text_scale=text_scale,
        image_scale=image_scale,
        a=a,
        b=b,
        std=std,
        noise=noise,
        renorm_min=renorm_min,
    )


@guided_velocity_cpp.register_fake
def _(cond, *rest):
    return torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)


@flow_step_cpp.register_fake
@guided_flow_step_cpp.register_fake
def _(sample, *rest):
    return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
