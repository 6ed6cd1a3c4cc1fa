"""Work that is counted from the configuration is what torch counts when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.generate.baseline import Baseline
from bench.generate.flops import count_autoencoder, count_decoder, count_requests, count_vit
from bench.generate.forward import Cache, lay_out_picture, run_decoder
from bench.generate.models import load_model
from bench.generate.workloads import build_workloads
from realign.model.bagel import Bagel


@pytest.fixture(scope="module")
def mini() -> Bagel:
    return load_model("mini", torch.device("cpu"), torch.float32)


def count(run: Callable[[], object]) -> int:
    """What torch counts; of attention it knows the products of the plain form alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_a_forward(mini):
    cache = Cache()
    hidden_LE = torch.randn(12, 128)

    def read():
        run_decoder(mini, hidden_LE, lay_out_picture(cache, 12, mini.device, True), cache, does_update=True)
        cache.length = 12

    assert count(read) == count_decoder(mini.config.llm, 12, 0)
    assert count(read) == count_decoder(mini.config.llm, 12, 12)


def test_a_causal_forward_sees_half(mini):
    full, causal = (count_decoder(mini.config.llm, 9, 5, is_causal) for is_causal in (False, True))
    assert full - causal == 4 * 128 * mini.config.llm.num_hidden_layers * (9 * 8 // 2)


def test_the_vit(mini):
    vit = mini.config.vit
    bounds = torch.tensor([0, 16], dtype=torch.int32)
    given = (torch.randn(16, vit.patch_dim), torch.arange(16), bounds)
    assert count(lambda: mini.embed_vit(*given)) == count_vit(vit, 128, 16)


def test_the_autoencoder(mini):
    encode = count(lambda: mini.autoencoder.encode(torch.zeros(1, 3, 32, 64)))
    assert count_autoencoder(mini.config.autoencoder, 32, 64, is_decode=False) == encode
    decode = count(lambda: mini.autoencoder.decode(torch.zeros(1, 16, 4, 8)))
    assert count_autoencoder(mini.config.autoencoder, 32, 64, is_decode=True) == decode


def test_a_request(mini):
    """A single request shares nothing, so that the baseline does what is needed, up to what is not counted:
    time embeddings, projections of latents, what causal texts do not see, reading of what was written.
    """
    workload = next(w for w in build_workloads(mini.config, "W4") if w.variant == "guided")
    settings = workload.requests[0].settings
    settings = replace(settings, num_timesteps=4, text=replace(settings.text, max_tokens=9))
    request, made = replace(workload.requests[0], settings=settings), []
    done = count(lambda: made.append(Baseline(mini).run(request)))
    needed = sum(count_requests(mini, [request], made).values())
    assert needed < done < 1.15 * needed
