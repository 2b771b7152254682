"""Procedural scenes with exact facts: pictures, captions, questions, splits."""
