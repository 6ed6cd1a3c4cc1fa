"""CUDA path of `guided_flow_step`: one launch, on GPUs with thread-block clusters (Hopper and later).

A cluster of thread blocks works on a sample and keeps its guided velocity in their shared memory, so that the
global renorm reads nothing twice: 16 blocks hold 3.5 MB, at 64 channels 14,000 tokens. What a larger sample
has beyond that is read again. L packed tokens, C channels, B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels import native

# Where `impl="auto"` takes this path, because it was measured to be faster there than Triton's two launches:
# ranges of the mean number of tokens of a sample, and of the number of samples. Empty: not measured yet.
MEASURED_FASTER: tuple[tuple[range, range], ...] = ()

SCHEMA = (
    "(Tensor sample, Tensor a, Tensor b, Tensor? std, Tensor? noise, Tensor? noise_key, Tensor? noise_step, "
    "Tensor? logprob_weight, Tensor? logprob_constant, bool reduce_sum, Tensor cond, Tensor? text_uncond, "
    "Tensor? image_uncond, Tensor cu_seqlens, Tensor text_scale, Tensor? image_scale, Tensor? renorm, "
    "Tensor? renorm_min, int common_renorm=0, int max_tokens=0, int cluster_size=0) -> (Tensor, Tensor)"
)


def is_faster(sample_LC: Tensor, cu_seqlens: Tensor) -> bool:
    """True where samples of this mean length, so many of them, were measured to be faster on this path."""
    num_samples = cu_seqlens.numel() - 1
    mean = sample_LC.shape[0] // max(num_samples, 1)
    is_measured = any(mean in tokens and num_samples in samples for tokens, samples in MEASURED_FASTER)
    return is_measured and native.has_cuda() and has_clusters(sample_LC.device)


def has_clusters(device: torch.device) -> bool:
    """True for a GPU that has thread-block clusters."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@torch.library.custom_op("realign_kernels::guided_flow_step_cuda", mutates_args=(), schema=SCHEMA)
def guided_flow_step_cuda(
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    noise_key: Tensor | None,
    noise_step: Tensor | None,
    logprob_weight: Tensor | None,
    logprob_constant: Tensor | None,
    reduce_sum: bool,
    cond: Tensor,
    text_uncond: Tensor | None,
    image_uncond: Tensor | None,
    cu_seqlens: Tensor,
    text_scale: Tensor,
    image_scale: Tensor | None,
    renorm: Tensor | None,
    renorm_min: Tensor | None,
    common_renorm: int = 0,
    max_tokens: int = 0,
    cluster_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """`guided_flow_step` in one launch; the next samples and the log-probs, [0] where not asked for.

    `max_tokens` is the length of the longest sample, for which shared memory is set aside; 0 takes the mean,
    as the lengths are on the device. `cluster_size` is the number of blocks a sample, 0 leaves the choice to
    the launcher. Neither changes a bit of the result.
    """
    given = {name: value for name, value in locals().items() if isinstance(value, Tensor)}
    arrays = {name: tensor.contiguous() for name, tensor in given.items()}
    num_samples = cu_seqlens.numel() - 1
    out_LC = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    logprob_B = torch.empty(0 if logprob_weight is None else num_samples, device=sample.device)
    arrays["out"] = out_LC
    if logprob_weight is not None:
        arrays["logprob"] = logprob_B
    params = native._C_CUDA.ClusterStepParams()
    params.num_samples, params.num_channels = num_samples, sample.shape[1]
    params.max_tokens = max_tokens or -(-sample.shape[0] // max(num_samples, 1))
    params.velocity_dtype = native.DTYPE_CODES[cond.dtype]
    params.sample_dtype = native.DTYPE_CODES[sample.dtype]
    params.common_renorm, params.reduce_sum = common_renorm, reduce_sum
    for name, array in arrays.items():
        setattr(params, name, array.data_ptr())
    params.device, stream = find_stream(sample.device)
    native._C_CUDA.guided_flow_step(params, cluster_size, stream)
    return out_LC, logprob_B


def find_stream(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream. Raises ValueError for a GPU without clusters."""
    if not has_clusters(device):
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ValueError(
            f"impl is 'cuda' and {name} has compute capability {major}.{minor}: "
            "thread-block clusters need 9.0; use impl='triton'"
        )
    return device.index, torch.cuda.current_stream(device).cuda_stream


@guided_flow_step_cuda.register_fake
def _(sample, a, b, std, noise, noise_key, noise_step, logprob_weight, *rest, **more):
    num_samples = 0 if logprob_weight is None else logprob_weight.shape[0]
    logprob_B = torch.empty(num_samples, device=sample.device)
    return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device), logprob_B
