"""Shared by the benchmarks: models, pictures, other quantisers, plots, and the pages that results are written to."""
