"""`quantize_fp8`: see `api.py`."""
