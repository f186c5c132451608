"""Offline slicing of language models (SliceGPT, arXiv 2401.15024)."""
