"""`mot_norm_fp8`: see `api.py`."""
