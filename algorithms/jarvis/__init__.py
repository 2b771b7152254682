"""JARVIS: predict what a frozen vision model says of hidden parts of the picture (arXiv 2512.15885)."""
