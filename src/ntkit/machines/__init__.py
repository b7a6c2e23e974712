"""Machines: what learns from a kernel matrix. ``fit(K, y)``, ``predict(K_test)``, with K_test = k(x_test, x_train)."""

from ntkit.machines.flow import GradientFlow as GradientFlow
from ntkit.machines.gaussian_process import GaussianProcess as GaussianProcess
from ntkit.machines.gaussian_process import Posterior as Posterior
from ntkit.machines.ridge import KernelRidge as KernelRidge
from ntkit.machines.svm import HardMarginSVM as HardMarginSVM
