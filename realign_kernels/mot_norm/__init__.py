"""Root-mean-square norm of tokens of two experts, with the residual added in the same pass."""
