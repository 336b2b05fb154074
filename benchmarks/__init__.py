"""Each bench_*.py is a table of providers, a list of shapes and a formula; `python -m benchmarks` runs them."""
