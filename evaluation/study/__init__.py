"""What a study of methods says: statistics of its runs, ``ablation.json`` and a page."""

from .analyse import analyse
from .page import write_study_report
from .power import planned

__all__ = ["analyse", "planned", "write_study_report"]
