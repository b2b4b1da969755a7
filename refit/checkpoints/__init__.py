"""Checkpoints of Hugging Face on disk: their files, which of their tensors has which box, reading and writing."""
