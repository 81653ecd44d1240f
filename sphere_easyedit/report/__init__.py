"""Figures and an HTML report from run directories."""

from .build import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
