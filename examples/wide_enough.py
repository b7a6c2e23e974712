"""Is the network wide enough to behave like its infinite-width limit, and would the limit do as well: an example.

The same CNN at growing width, drawn at random: how far its tangent kernel is from the limit's, and the width at which
it would be within 10 %. Then the limit itself as a classifier of handwritten digits.
"""

import torch
from torch import nn

import ntkit

data = ntkit.data.load("digits")
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
)
wide = ntkit.to_ntk_parametrization(model, w_std=2**0.5, b_std=0.1)
rate = ntkit.convergence(wide, data.x_train[:20], widths=(16, 64, 256), seeds=10)
for width, distance, error in zip(rate.widths, rate.distance, rate.distance_error, strict=True):
    print(f"{width:4d} channels: {distance:.1%} +- {error:.1%} from the limit")
enough = rate.widths[-1] * (float(rate.distance[-1]) / 0.1) ** 2  # the distance falls as 1 / sqrt(width)
print(f"slope {rate.slope:.2f} +- {rate.slope_error:.2f}; within 10 % at about {enough:.0f} channels")

limit = ntkit.InfiniteKernel(model, w_std=2**0.5, b_std=0.1)
x, x_test = data.x_train.double(), data.x_test.double()
K = limit(x)
targets = nn.functional.one_hot(data.y_train, 10).double()
machine = ntkit.KernelRidge(ridge=1e-4 * float(K.diagonal().mean())).fit(K, targets)
accuracy = (machine.predict(limit(x_test, x)).argmax(1) == data.y_test).double().mean()
print(f"the limit calls {accuracy:.1%} of the test digits by their name")

assert abs(rate.slope + 0.5) < 4 * rate.slope_error + 0.05
assert accuracy > 0.97
