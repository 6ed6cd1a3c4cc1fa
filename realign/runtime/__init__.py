"""Makes the model fast and keeps samples apart: contexts, guidance, sampling, text decoding, batching."""
