"""Your own model, your own loop, three added lines; then the kernel along training, and a page with pictures."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import ntkit

torch.manual_seed(0)
x = ntkit.grid(16).float()
y = torch.sin(6 * x.norm(dim=1, keepdim=True))  # ripples around the center
hidden = [nn.Linear(64, 64), nn.LeakyReLU()]
model = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(), *hidden, nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1200, gamma=0.5)
folder = Path(tempfile.mkdtemp())

with ntkit.record(model, optimizer, path=folder / "run") as rec:  # 1: around the loop
    for _ in range(2000):
        loss = 0.5 * ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        rec.step(loss=loss)  # 2: after each step

tracked = ntkit.track(ntkit.Trajectory.open(folder / "run"), x, y, model=model, path=folder / "track")  # 3: afterwards
for step, loss, row, energy in zip(
    tracked.steps, *(tracked.series[name] for name in ("loss", "eigenvalues", "energy_target")), strict=True
):
    print(f"step {step:4d}: loss {loss:.4f}, lambda_1 {row[0]:7.1f}, target in the top 10: {energy[9]:.2f}")
print(f"pictures: {ntkit.report.render(folder / 'track')}")
assert tracked.series["distance"][-1] > 0.05, "the kernel moves"
assert tracked.series["first_order"][0]["cosine"] > 0.99, "a small step is first order"
