"""Does training make the kernel better? Train a small network on two digits; compare the kernels before and after."""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import ntkit

data = ntkit.data.load("digits", classes=(3, 8))
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 1))
kernel = ntkit.TangentKernel(model, outputs="trace")

K0, K0_test = kernel(data.x_train), kernel(data.x_test, data.x_train)
trajectory = ntkit.train(
    model,
    (data.x_train, data.y_train),
    loss=lambda out, y: binary_cross_entropy_with_logits(out[:, 0], y.float()),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    steps=300,
)
K1, K1_test = kernel(data.x_train), kernel(data.x_test, data.x_train)

y = 2.0 * data.y_train - 1
for when, K, K_test in (("before", K0, K0_test), ("after", K1, K1_test)):
    svm = ntkit.HardMarginSVM().fit(K, data.y_train)
    error = float((svm.predict(K_test) != data.y_test).float().mean())
    print(
        f"{when:6s} training: SVM test error {error:.1%}, {svm.status_} (gap {svm.gap_:.0e}), "
        f"alignment with the labels {ntkit.alignment(K, y):.3f}, effective rank {ntkit.effective_rank(K):.2f}"
    )
    assert svm.status_ == "optimal"
    assert svm.gap_ < 1e-6
assert ntkit.alignment(K1, y) > ntkit.alignment(K0, y)
