"""What is trained: gradients reach the masters in float32, and the engine runs on what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.prepare import crop_picture
from tests.train.test_replay import CHECKPOINT, FREE, build_requests
from train.lora import draw_adapters, list_projections
from train.policy import FullPolicy, LoRAPolicy, Policy, PolicyOptions, build_policy, checkpoint_layers
from train.replay import Replayer, list_entries

LORA = PolicyOptions("lora", rank=3, alpha=6.0)


def build_engine(dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(Bagel.from_pretrained(CHECKPOINT, dtype=dtype), PROGRAMS, prepare=crop_picture, record=True)


def run_backward(policy: Policy, entries: list, checkpointing: bool = False) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the entries' log-probs, one forward for each half."""
    replayer = Replayer(policy.engine)
    with policy.differentiate(), checkpoint_layers(policy.engine.model, checkpointing):
        for half, sign in ((entries[:4], 1.0), (entries[4:], -0.5)):
            (sign * replayer.replay(half).logprob_N.sum()).backward()
    grads = {name: master.grad for name, master in policy.masters.items()}
    for master in policy.masters.values():
        master.grad = None
    return grads


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        assert ours[name].dtype == torch.float32
        atol = tolerance * float(grad.abs().max())
        torch.testing.assert_close(ours[name], grad, rtol=tolerance, atol=atol, msg=name)


def set_up_factors(policy: LoRAPolicy) -> None:
    """As after some updates: none is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, master in policy.masters.items():
        if name.endswith(".up"):
            master.data.copy_(0.1 * torch.randn(master.shape, generator=generator))
    policy.publish()


def test_the_generation_expert_and_nothing_else_is_trained() -> None:
    policy = FullPolicy(build_engine(), keeps_reference=False)
    model = policy.engine.model
    entries = list_entries(policy.engine.run(build_requests("flow-grpo", FREE, 1)))
    grads = run_backward(policy, entries)
    assert set(grads) == {n for n, _ in model.named_parameters() if ".gen." in n}
    assert all(grad.any() for grad in grads.values())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("options", [PolicyOptions(), LORA], ids=["full", "lora"])
def test_checkpointing_changes_no_bit(options: PolicyOptions) -> None:
    policy = build_policy(build_engine(), options, False, 0)
    entries = list_entries(policy.engine.run(build_requests("cps", FREE, 1)))
    plain, again = (run_backward(policy, entries, is_on) for is_on in (False, True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert "forward" not in vars(policy.engine.model.decoder.layers[0])


def test_lora_gradients_follow_from_the_full_ones() -> None:
    """`d up = scale dW down^T`, `d down = scale up^T dW`, for every projection of a fused weight."""
    policy = build_policy(build_engine(), LORA, False, 0)
    set_up_factors(policy)
    model = policy.engine.model
    entries = list_entries(policy.engine.run(build_requests("flow-grpo", FREE, 1)))
    grads = run_backward(policy, entries)
    full = run_backward(FullPolicy(policy.engine, False), entries)
    names = {id(module): name for name, module in model.named_modules()}
    expected = {}
    for linear, places in list_projections(model).items():
        for rows, name in places:
            grad_OI = full[f"{names[id(linear)]}.weight"][rows]
            adapter = policy.adapters[name]
            expected[f"{name}.down"] = 2.0 * adapter.up_OR.detach().T @ grad_OI
            expected[f"{name}.up"] = 2.0 * grad_OI @ adapter.down_RI.detach().T
    assert_close(grads, expected, 1e-4)


def test_lora_replays_the_rollouts_bits() -> None:
    policy = build_policy(build_engine(), LORA, False, 0)
    set_up_factors(policy)
    entries = list_entries(policy.engine.run(build_requests("flow-grpo", FREE, 1)))
    with policy.differentiate():
        replayed = Replayer(policy.engine).replay([e for e in entries if e.noisy.index == 1])
    assert torch.equal(replayed.logprob_N, replayed.old_logprob_N)
    assert replayed.logprob_N.requires_grad


@pytest.mark.parametrize("trains_text", [False, True])
@pytest.mark.parametrize("options", [PolicyOptions(), LORA], ids=["full", "lora"])
def test_the_reference_is_where_training_began(options: PolicyOptions, trains_text: bool) -> None:
    engine = build_engine()
    start = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    policy = build_policy(engine, options, True, 0, trains_text)
    for master in policy.masters.values():
        master.data += 0.01
    policy.publish()
    moved = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    assert any(not torch.equal(start[name], moved[name]) for name in start)
    with policy.reference():
        assert all(torch.equal(start[n], t) for n, t in engine.model.state_dict().items())
    assert all(torch.equal(moved[n], t) for n, t in engine.model.state_dict().items())


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    policy = build_policy(build_engine(torch.bfloat16), PolicyOptions(), False, 0)
    entries = list_entries(policy.engine.run(build_requests("cps", FREE, 1)))
    both = run_backward(policy, entries)
    assert all(grad.dtype == torch.float32 for grad in both.values())
    name = "decoder.layers.0.gen.down_proj.weight"
    assert not torch.equal(both[name], both[name].bfloat16().float())


def test_adapters_depend_on_the_seed_alone() -> None:
    model = build_engine().model
    one, same, other = (draw_adapters(model, 3, seed) for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name].down_RI, same[name].down_RI)
        assert not torch.equal(one[name].down_RI, other[name].down_RI)
        assert not one[name].up_OR.any()


def test_texts_are_trained_with_the_decoder_the_embeddings_and_the_head() -> None:
    model = build_engine().model
    policy = FullPolicy(Engine(model, PROGRAMS, record=True), False, trains_text=True)
    parts = ("decoder.", "embed_tokens.", "lm_head.")
    assert set(policy.masters) == {n for n, _ in model.named_parameters() if n.startswith(parts)}
    adapters = draw_adapters(model, 3, 0, ("gen", "und"))
    assert len(adapters) == 2 * len(draw_adapters(model, 3, 0))
    for name, adapter in draw_adapters(model, 3, 0).items():
        assert torch.equal(adapter.down_RI, adapters[name].down_RI), "others with text than without"


@pytest.mark.parametrize(
    ("changes", "message"), [({"kind": "half"}, "kind is 'half'"), ({"rank": 0}, "rank is 0")]
)
def test_options_of_no_use_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyOptions(**changes)
