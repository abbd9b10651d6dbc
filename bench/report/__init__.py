"""Results: rows in JSON files, tables, a plot, and the page of the documentation."""
