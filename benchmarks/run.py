"""Run every benchmark."""

from __future__ import annotations

from benchmarks import engine, start, svm

for benchmark in (start, engine, svm):
    benchmark.main()
