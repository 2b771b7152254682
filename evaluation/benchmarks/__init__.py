"""Suites of benchmarks whose official files the user has, and of our own scenes: one factory each, as YAML names them."""

from .circular import mmbench
from .generic import multiple_choice, open_answers
from .own_scenes import scenes
from .paired import cv_bench, mmvp
from .yes_no import hallusion_bench, pope

__all__ = [
    "cv_bench",
    "hallusion_bench",
    "mmbench",
    "mmvp",
    "multiple_choice",
    "open_answers",
    "pope",
    "scenes",
]
