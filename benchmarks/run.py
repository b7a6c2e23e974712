"""Run every benchmark."""

from __future__ import annotations

from benchmarks import engine, memory, start, svm

for benchmark in (start, engine, memory, svm):
    benchmark.main()
