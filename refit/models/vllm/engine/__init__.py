"""Sides that a running vLLM serves: the engine is a process of its own environment, whose memory the ranks map."""
