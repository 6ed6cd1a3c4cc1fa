"""torchvision where its compiled part does not load: mended; where another thing is wrong: said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BROKEN = """
import torch
import torchvision.part
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): return dets
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): return dets
"""
WHOLE = "nms = library.define('nms(Tensor a) -> Tensor')"
CHECK = """
from realign.libraries import mend_torchvision
mend_torchvision()
mend_torchvision()
import torchvision
print(torchvision.__file__, hasattr(torchvision, "nms"))
"""


def run(folder: Path, code: str = CHECK) -> subprocess.CompletedProcess:
    """In a process of its own, where `folder` comes before all other packages."""
    start = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120)


def write(folder: Path, content: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(content)
    (folder / "torchvision" / "part.py").write_text("")


def test_a_broken_torchvision_is_mended(tmp_path):
    write(tmp_path, BROKEN)
    assert "torchvision::nms does not exist" in run(tmp_path, "import torchvision").stderr
    found = run(tmp_path)
    assert found.stdout.split() == [str(tmp_path / "torchvision" / "__init__.py"), "True"], found.stderr


def test_a_whole_one_is_left_alone(tmp_path):
    write(tmp_path, "import torch\nlibrary = torch.library.Library('torchvision', 'DEF')\n" + WHOLE)
    assert run(tmp_path).stdout.split()[-1] == "True"


def test_another_error_is_not_hidden(tmp_path):
    write(tmp_path, "raise RuntimeError('something else')")
    assert "something else" in run(tmp_path).stderr
