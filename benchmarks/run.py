"""Run every benchmark."""

from __future__ import annotations

from benchmarks import engine, memory, routes, start, svm

for benchmark in (start, engine, routes, memory, svm):
    benchmark.main()
