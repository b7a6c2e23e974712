"""Run every benchmark."""

from __future__ import annotations

from benchmarks import after_kernel, busy, engine, infinite, memory, path, routes, solvers, spectrum, start, store, svm

for benchmark in (start, engine, busy, routes, memory, svm, solvers, spectrum, store, infinite, path):
    benchmark.main()
after_kernel.main([])
