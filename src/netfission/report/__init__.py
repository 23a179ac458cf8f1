"""`report.html`: what is known of one run, or of several side by side, as one page."""

from netfission.report.build import write_report

__all__ = ["write_report"]
