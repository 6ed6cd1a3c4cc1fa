"""What a GPU reaches, and how long it takes for operations and bytes."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of a number in bf16


@dataclass(frozen=True)
class Chip:
    """What a GPU reaches: dense bf16 products in TFLOP/s, attention as a share of that, memory in TB/s.

    `fp8_factor`: how many times faster products of e4m3 numbers are.
    """

    name: str
    matrix_tflops: float
    bandwidth_tbs: float
    attention_share: float = 0.75
    fp8_factor: float = 1.9


# Products: 80% of the dense bf16 peak, which is what 8192x8192x8192 random numbers reach on an H200; an H100
# has the same processors; 90% on the H20, whose few multipliers nothing else holds up. Attention: what
# FlashAttention 3 publishes for 4,096 tokens on Hopper (590 TFLOP/s, on an H20 126: flash-attention's issue
# 1310), FlashAttention 4 on a B200 (up to 1,749). Copies: 90% of the peak.
CHIPS = {
    "h20": Chip("H20", 133, 3.6, attention_share=0.95),
    "h100": Chip("H100", 790, 3.0),
    "h200": Chip("H200", 790, 4.3),
    "b200": Chip("B200", 1800, 7.2, attention_share=0.9),
}


@dataclass
class Phase:
    """Operations and bytes of one phase; `gen_flops` of its products are the generation expert's."""

    product_flops: float = 0.0
    gen_flops: float = 0.0
    product_bytes: float = 0.0
    attention_flops: float = 0.0
    attention_bytes: float = 0.0
    element_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    def add_training(self, forward: Phase, has_weight_gradients: bool) -> None:
        """Adds a forward and its backward pass, both in bf16: of a product's two gradients that of its input,
        and that of its weight if it has one; twice the forward for attention and per element.
        """
        num_products = 3 if has_weight_gradients else 2
        self.product_flops += num_products * forward.product_flops
        self.product_bytes += num_products * forward.product_bytes
        self.attention_flops += 3 * forward.attention_flops
        self.attention_bytes += 3 * forward.attention_bytes
        self.element_bytes += 3 * forward.element_bytes

    def seconds(self, chip: Chip, is_fp8: bool = False) -> float:
        """The least time; with `is_fp8` the generation expert's products are e4m3's."""
        rate, bandwidth = chip.matrix_tflops * 1e12, chip.bandwidth_tbs * 1e12
        saved = self.gen_flops * (1 - 1 / chip.fp8_factor) if is_fp8 else 0.0
        products = max((self.product_flops - saved) / rate, self.product_bytes / bandwidth)
        attention_rate = chip.attention_share * rate
        attention = max(self.attention_flops / attention_rate, self.attention_bytes / bandwidth)
        return products + attention + self.element_bytes / bandwidth
