"""Sides in the layout of vLLM's inference engines: real tensors and a reference forward pass. vLLM is not needed."""
