"""Pages about checkpoints that were attacked: tables, curves and how each number was made."""

from routed_peft.report.checkpoints import Report, write_report

__all__ = ["Report", "write_report"]
