"""Adapter files: saved and loaded, looked into, converted, checked and merged."""

from .checkpoint import check_checkpoint, convert_file, merge_checkpoint
from .files import load_lora, save_lora
from .summary import FileSummary, UpdateSummary, file_summary

__all__ = [
    "FileSummary",
    "UpdateSummary",
    "check_checkpoint",
    "convert_file",
    "file_summary",
    "load_lora",
    "merge_checkpoint",
    "save_lora",
]
