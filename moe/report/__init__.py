"""The report of a run: pictures and one HTML page."""

from .report import write_report

__all__ = ["write_report"]
