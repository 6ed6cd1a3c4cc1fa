"""Gated SiLU, the activation of Qwen2's MLP."""
