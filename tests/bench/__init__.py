"""How fast it is, beside what the bare substrate does in the same run: `make bench`.

Nothing here asserts a time. `test_bench` runs everything with tiny counts, so that it cannot rot.
"""
