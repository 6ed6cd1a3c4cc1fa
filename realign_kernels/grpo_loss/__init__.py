"""GRPO's loss on sampler steps: clipped surrogate, KL to a reference velocity, and what people watch."""
