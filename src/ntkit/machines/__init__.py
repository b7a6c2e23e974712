"""Machines: what learns from a kernel matrix. ``fit(K, y)``, ``predict(K_test)``, with K_test = k(x_test, x_train)."""

from ntkit.machines.ridge import KernelRidge as KernelRidge
from ntkit.machines.svm import HardMarginSVM as HardMarginSVM
