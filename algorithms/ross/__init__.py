"""ROSS: reconstruct the image from what the language model saw (arXiv 2410.09575)."""
