"""The report: figures, the paper beside ours, the page."""
