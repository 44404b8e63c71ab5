"""The report of a run: pictures and one HTML page."""

from .history import BASELINE_NAMES
from .report import write_report

__all__ = ["BASELINE_NAMES", "write_report"]
