"""`realign verify`: its table, its exit codes, and that it sees what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from realign.cli.__main__ import main
from realign.evals.parity import Golden, check_golden

from .conftest import DEFAULT


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEFAULT, tmp_path / "golden", ignore=shutil.ignore_patterns("rl.*"))


def change_tensor(folder, name, change):
    tensors = load_file(folder / "cases.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "cases.safetensors")


def change_cases(folder, change):
    content = json.loads((folder / "cases.json").read_text())
    change(content)
    (folder / "cases.json").write_text(json.dumps(content))


def test_all_cases_pass_in_a_table(capsys):
    assert main(["verify", str(DEFAULT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "max", "error", "tolerance"]
    assert lines[-1] == f"{len(lines) - 2} of {len(lines) - 2} cases passed"
    named = {line.split()[0] for line in lines[1:-1]}
    recorded = {"vit.hidden", "vae.decoded", "time.embedding", "context.full", "text.tokens", "text.logits"}
    recorded |= {"flow.both_channel.latent", "flow.both_global.image", "batch.latent.1", "train.grad_norms"}
    assert recorded | {"interleave.text", "interleave.image", "resize", "tokens"} <= named


def test_bfloat16_passes_within_its_own_tolerances():
    results = check_golden(DEFAULT, dtype=torch.bfloat16)
    assert [result for result in results if not result.passed] == []
    assert max(result.tolerance for result in results if result.name.startswith("context")) > 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flow.both_global.latent", lambda t: t * (1 + 1e-3)),
        ("text.logits", lambda t: t + t.abs().max() * 1e-3),
        ("context.no_image.value.1", lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))),
        ("batch.latent.1", lambda t: t[:-1].clone()),
        ("interleave.image", lambda t: t.bitwise_xor(torch.tensor(16, dtype=torch.uint8))),
    ],
)
def test_a_wrong_output_fails(folder, capsys, name, change):
    change_tensor(folder, name, change)
    assert main(["verify", str(folder)]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert len(failed) == 1
    assert name.startswith(failed[0])


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda c: c["cases"]["context.full"].update(rope=57), "context.full"),
        (lambda c: c["token_ids"].update(eos_token_id=3), "tokens"),
        (lambda c: c["resize"][3].update(resized=[1024, 192]), "resize"),
        (lambda c: c["cases"]["train"]["grad_norms"].update({"lm_head.other": 1.0}), "train.grad_norms"),
        (lambda c: c["cases"]["interleave"].update(text="something else"), "interleave.text"),
    ],
)
def test_a_wrong_number_fails(folder, change, failed):
    change_cases(folder, change)
    golden = Golden(folder)
    group = {"context.full": "contexts", "train.grad_norms": "train", "interleave.text": "interleave"}
    results = golden.check(group.get(failed, failed))
    assert [result.name for result in results if not result.passed] == [failed]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: shutil.rmtree(f), "cases.json: cannot be read"),
        (lambda f: (f / "cases.json").write_text("{"), "cases.json: broken JSON"),
        (lambda f: (f / "cases.json").write_text("[]"), "cases.json: must be a JSON object"),
        (lambda f: (f / "cases.json").write_bytes(b"\xff"), "cases.json: broken JSON"),
        (lambda f: change_cases(f, lambda c: c.pop("token_ids")), "field 'token_ids' is missing"),
        (lambda f: change_cases(f, lambda c: c["cases"]["batch"].pop("sizes")), "field 'sizes' is missing"),
        (lambda f: (f / "cases.safetensors").unlink(), "cases.safetensors: no such file"),
        (lambda f: (f / "cases.safetensors").write_bytes(b"x" * 99), "not a safetensors file"),
        (lambda f: (f / "checkpoint" / "ae.safetensors").unlink(), "ae.safetensors"),
    ],
)
def test_a_bad_folder_is_one_line_and_exit_code_2(folder, capsys, spoil, complaint):
    spoil(folder)
    assert main(["verify", str(folder)]) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_device_that_is_not_there_is_exit_code_2(capsys):
    assert main(["verify", str(DEFAULT), "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used here" in capsys.readouterr().err


def test_another_greedy_token_fails(folder):
    change_tensor(folder, "text.tokens", lambda t: torch.cat((t[:-1], t[-1:] + 1)))
    tokens = Golden(folder).check("text")[0]
    assert (tokens.name, tokens.passed) == ("text.tokens", False)
