"""The report of a run, or of the runs of a sample: one HTML file that needs nothing else, and its pictures.

`gathering` reads the tables of a processing once, chunk by chunk; `numbers` makes figures and words of them,
`sections` puts both into an order, with what `pictures` draws; `writing` makes the page.
"""

from flows.report.writing import ReportRequest, ReportResult, write_processing_report, write_report

__all__ = ["ReportRequest", "ReportResult", "write_processing_report", "write_report"]
