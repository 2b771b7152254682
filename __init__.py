"""Opsin: vision-centric instruction tuning, as MosaicML Composer algorithms for Hugging Face VLMs."""

from __future__ import annotations

__version__ = "0.1.0"
