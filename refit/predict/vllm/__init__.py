"""vLLM's engines, predicted from the flags: no model, no vLLM, no torch."""
