"""Readers of question files in the forms in which benchmarks are handed out; without torch."""

from .addresses import local_file, question_files
from .pictures import FolderPicture, check_pictures, pictures_of
from .rows import FORMS, Row, read_rows

__all__ = [
    "FORMS",
    "FolderPicture",
    "Row",
    "check_pictures",
    "local_file",
    "pictures_of",
    "question_files",
    "read_rows",
]
