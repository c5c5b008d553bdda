"""Pages about experiments: tables, curves and words made from summaries."""

from experiments.report.page import Report, verdict_tables, write_report

__all__ = ["Report", "verdict_tables", "write_report"]
