"""Measurements of fd2fast, part of the source checkout: `fd2fast bench NAME` or `python -m bench.NAME` at its root."""
