"""Side-by-side measurements, one script a question; each runs with `python -m benchmarks.NAME`."""
