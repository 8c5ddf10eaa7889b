"""The KV cache layer, what becomes of it outside the compiled model, and what it kept."""
