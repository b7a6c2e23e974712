"""Benchmarks: run all with ``make bench``; each writes raw results, with the machine they were measured on."""
