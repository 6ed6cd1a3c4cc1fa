"""The system text of every reasoning mode, read before the prompt: in SFT, generation and RGA alike."""

from __future__ import annotations

# To the letter what BAGEL's weights were trained to read (ByteDance-Seed/Bagel, Apache-2.0).
THINK = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)

IC_COT = "Write the picture's <out_caption>, then a <relation_N> for each image; then make the picture."

SYSTEM_TEXTS = {"think": THINK, "ic-cot": IC_COT}
