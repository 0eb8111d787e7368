"""`python -m bitnet_lit.report` compares runs: a table, report.csv, report.md and report.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import ReportConfig


def _report(config: ReportConfig) -> None:
    from bitnet_lit.reports.report_files import report

    report(config)


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("report", _report)


if __name__ == "__main__":
    main()
