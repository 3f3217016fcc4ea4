"""The report: run folders to one HTML file that stands alone."""
