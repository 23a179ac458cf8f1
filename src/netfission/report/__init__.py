"""Write `report.html`, a page about one run or several side by side."""

from netfission.report.build import write_report

__all__ = ["write_report"]
