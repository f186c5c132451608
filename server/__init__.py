"""Serving of sliced checkpoints: the vLLM model plugin and the OpenAI-compatible application."""
