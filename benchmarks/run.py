"""Run every benchmark."""

from __future__ import annotations

from benchmarks import engine, memory, routes, spectrum, start, svm

for benchmark in (start, engine, routes, memory, svm, spectrum):
    benchmark.main()
