"""What runs in the engine's processes, with the Python of vLLM's environment: it imports torch and vLLM only."""
