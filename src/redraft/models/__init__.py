"""The target: loading it, its chat template, its KV cache, its head."""
