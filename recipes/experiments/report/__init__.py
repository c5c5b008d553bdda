"""From summaries to a page: what experiments and attacks have shown, in tables, curves and words."""

from experiments.report.page import Report, verdict_tables, write_report

__all__ = ["Report", "verdict_tables", "write_report"]
