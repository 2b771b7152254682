"""JARVIS: predict the hidden blocks of an image inside the language model (arXiv 2512.15885)."""

from .jarvis import JARVIS

__all__ = ["JARVIS"]
