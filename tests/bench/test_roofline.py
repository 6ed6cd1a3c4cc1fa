"""The roofline's operations are those that are counted elsewhere; its times follow from the chip's rates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.align.flops import count_iteration
from bench.generate.baseline import Made
from bench.generate.flops import count_requests
from bench.generate.models import BAGEL_7B, RandomTokenizer
from bench.generate.workloads import CHAIN_TOKENS, build_workloads
from bench.roofline.__main__ import main
from bench.roofline.alignment import NUM_NOISY, SCORED_SIDE, VIT_L_14, build_iteration, estimate_iteration
from bench.roofline.chips import CHIPS, Phase
from bench.roofline.estimate import GENERATION, Estimate
from realign.libraries import import_open_clip
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.request import TextTurn
from realign.runtime.settings import NoiseSettings


@pytest.fixture(scope="module")
def model() -> Bagel:
    with torch.device("meta"):
        model = Bagel(BAGEL_7B)
    model.tokenizer = RandomTokenizer(BAGEL_7B.llm.vocab_size)
    return model


def make(request) -> Made:
    """What would come of a request: a chain of the workloads' length, if it reasons."""
    turn = (
        TextTurn((0,) * CHAIN_TOKENS, "", False) if PROGRAMS[request.settings.reasoning].does_reason else None
    )
    picture = Image.new("1", (request.settings.width, request.settings.height))
    return Made(turn, torch.empty(0), picture)


@pytest.mark.parametrize("name", ["W1", "W3", "W3t", "W4"])
def test_operations_are_those_of_the_benchmark(model, name):
    for workload in build_workloads(BAGEL_7B, name, max_samples=2):
        estimate = Estimate.of(BAGEL_7B, workload.requests)
        counted = count_requests(model, workload.requests, [make(one) for one in workload.requests])
        for phase in GENERATION:
            assert estimate.phases[phase].flops == pytest.approx(counted.get(phase, 0), rel=2e-3), phase


def test_a_faster_chip_takes_less_time_and_a_group_shares_its_references():
    shared, _, apart = (
        Estimate.of(BAGEL_7B, workload.requests) for workload in build_workloads(BAGEL_7B, "W3")
    )
    chip = CHIPS["h200"]
    twice = replace(chip, matrix_tflops=2 * chip.matrix_tflops, bandwidth_tbs=2 * chip.bandwidth_tbs)
    for name in ("reading", "denoising", "autoencoder"):
        assert shared.seconds(twice)[name] == pytest.approx(shared.seconds(chip)[name] / 2)
    assert apart.seconds(chip)["reading"] > 20 * shared.seconds(chip)["reading"]
    assert shared.seconds(chip, is_fp8=True)["denoising"] < 0.75 * shared.seconds(chip)["denoising"]


def test_writing_waits_for_weights():
    """A step of 32 chains reads the understanding expert and the output layer, and little else."""
    workload = build_workloads(BAGEL_7B, "W4")[0]
    seconds = Estimate.of(BAGEL_7B, workload.requests).seconds(CHIPS["h200"])["reasoning"]
    llm = BAGEL_7B.llm
    weights = 233e6 * llm.num_hidden_layers + llm.hidden_size * llm.vocab_size
    least = CHAIN_TOKENS * 2 * weights / (CHIPS["h200"].bandwidth_tbs * 1e12)
    assert least < seconds < 1.2 * least


def test_an_iteration_has_the_operations_that_its_benchmark_counts(model):
    noise = NoiseSettings("cps", 0.8, (0, NUM_NOISY))
    requests = [
        replace(request, settings=replace(request.settings, noise=noise))
        for request in build_iteration(256)[:2]
    ]
    estimate = estimate_iteration(BAGEL_7B, requests)
    counted = count_iteration(model, requests, [make(one) for one in requests], "lora")
    for phase in (*GENERATION, "replay"):
        assert estimate.phases[phase].flops == pytest.approx(counted[phase], rel=2e-3), phase


def test_scoring_has_the_operations_of_open_clips_model():
    counter, phase = FlopCounterMode(display=False), Phase()
    with torch.device("meta"):
        model = import_open_clip().create_model("ViT-L-14", pretrained=None, device="meta")
        pixels_3CHW = torch.empty(3, 3, 224, 224)
        text_3L = torch.zeros(3, 77, dtype=torch.long)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.encode_image(pixels_3CHW)
            model.encode_text(text_3L)
    VIT_L_14.add_scoring(phase, 3, SCORED_SIDE)
    assert phase.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_training_takes_three_forwards_and_two_where_weights_are_frozen():
    forward, full, frozen = Phase(product_flops=6e15, attention_flops=1e15), Phase(), Phase()
    full.add_training(forward, has_weight_gradients=True)
    frozen.add_training(forward, has_weight_gradients=False)
    assert (full.flops, frozen.flops) == (21e15, 15e15)
    assert full.seconds(CHIPS["h200"]) == pytest.approx(3 * forward.seconds(CHIPS["h200"]))


def test_rows_are_written_with_their_rates(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main(["--workload", "W3t", "CLIP", "--chip", "h100", "b200", "--out", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["chip"], row["workload"]) for row in rows] == [
        (chip, name) for chip in ("H100", "B200") for name in ("W3t", "W3t", "CLIP")
    ]
    for row in rows:
        assert row["seconds"] == pytest.approx(sum(row["phases"].values()), rel=2e-3)
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"], rel=2e-3)
        assert row["commit"]
    assert f"rows written to {path}" in capsys.readouterr().out


def test_the_command_prints_a_table_a_chip(capsys):
    assert main(["--chip", "h200", "h20", "--workload", "W3", "--bandwidth-tbs", "4"]) == 0
    printed = capsys.readouterr().out
    assert "H200: 790 TFLOP/s, 4 TB/s" in printed
    assert "H20: 133 TFLOP/s, 4 TB/s" in printed
    assert printed.count("W3 guided") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--small", "500"], "--small 500: give a multiple of 16"),
        (["--matrix-tflops", "0"], "give a number above 0"),
    ],
)
def test_bad_numbers_are_refused(arguments, said, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
