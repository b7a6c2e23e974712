"""Which training images made the network say what it says? Exactly, with a certificate.

A small CNN learns handwritten digits with momentum and minibatches. Each of its logits for five test images is then
written as a sum: the logit before training, one number per training image, and what weight decay added.
"""

import torch
from torch import nn

import ntkit

data = ntkit.data.load("digits")
x, y = data.x_train[:600].double(), data.y_train[:600]
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10)
).double()
run = ntkit.train(
    model,
    (x, y),
    nn.functional.cross_entropy,
    lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
    steps=150,
    batch_size=50,
)

test, labels = data.x_test[:5].double(), data.y_test[:5]
parts = ntkit.PathKernel(run).decompose(test)  # [5 images, 10 logits, 600 training images]
print(f"initial + contributions + weight decay - prediction: {parts.error:.0e} of the largest logit")

best = parts.top(3)  # for the logit that is largest, of each test image
worst = parts.top(3, against=True)
by_class = parts.by_class(y)
for i in range(5):
    predicted = int(parts.prediction[i].argmax())
    print(
        f"a {int(labels[i])} is called a {predicted}: for it {[int(y[e]) for e in best.examples[i]]} "
        f"({best.values[i, 0]:+.3f} ...), against it {[int(y[e]) for e in worst.examples[i]]} "
        f"({worst.values[i, 0]:+.3f} ...); all {predicted}s together {by_class[i, predicted, predicted]:+.2f}"
    )

assert parts.error < 1e-12
assert torch.allclose(parts.prediction, model(test).detach(), rtol=1e-12)
