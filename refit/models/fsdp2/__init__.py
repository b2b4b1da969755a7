"""transformers models under tensor parallelism and FSDP2."""
