"""transformers models under DeepSpeed's automatic tensor parallelism (AutoTP) and ZeRO."""
