"""Triton's interpreter is right about bfloat16 in these tests too: they run the ops as their own tests do."""

from __future__ import annotations

from realign_kernels import launch
from tests.kernels.interpreter import install_bfloat16

if launch.is_interpreting():
    install_bfloat16()
