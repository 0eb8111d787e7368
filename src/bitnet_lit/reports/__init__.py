"""A report compares runs: `compare` makes its rows (comparison.py), and the other modules show them.

`statistics.py` has the intervals and the interpolation, `weight_sizes.py` the bytes of a model's weights, `tables.py`
the terminal's table, report.csv and report.md, and `page.py` report.html with its plots.
"""
