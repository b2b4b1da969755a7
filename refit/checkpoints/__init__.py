"""Checkpoints of Hugging Face on disk: their files and headers, which of their tensors has which box, reading, writing."""
