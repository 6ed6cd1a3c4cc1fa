"""Re-Align's ablation in miniature: `python -m train.ablation --out runs/ablation`, or `make ablation`."""
