"""``report.html``: one self-contained page with scores, plots, analyses and a wall of pictures."""

from .page import write_report

__all__ = ["write_report"]
