"""Adapter files: saved and loaded, looked into, converted, merged and combined."""

from .checkpoint import check_checkpoint, combine_files, convert_file, merge_checkpoint, resize_file
from .extraction import extract_checkpoint, extract_lora
from .files import load_lora, save_lora
from .summary import FileSummary, UpdateSummary, file_summary, plot_summary

__all__ = [
    "FileSummary",
    "UpdateSummary",
    "check_checkpoint",
    "combine_files",
    "convert_file",
    "extract_checkpoint",
    "extract_lora",
    "file_summary",
    "load_lora",
    "merge_checkpoint",
    "plot_summary",
    "resize_file",
    "save_lora",
]
