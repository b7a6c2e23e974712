"""nngeometry's GramMatrix: k(x1), all outputs; run by `benchmarks.engine`, with the peers' torch environment."""

from __future__ import annotations

from importlib.metadata import version

import torch
from nngeometry import GramMatrix
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.job import read_job, report


def main() -> None:
    job = read_job()
    data = torch.load(job["inputs"], weights_only=False)
    model, x = data["model"], data["x1"]
    # samples of a batch are contracted at once; it passes forward and backward for every pair of batches and outputs
    loader = DataLoader(TensorDataset(x), batch_size=min(len(x), job["batch"]))

    def work() -> Tensor:
        gram = GramMatrix(model, loader, function=lambda *d: model(d[0])).to_torch()  # [C, n, C, n]
        if data["outputs"] == "trace":
            return gram.diagonal(dim1=0, dim2=2).sum(2)
        return gram.permute(1, 3, 0, 2)

    versions = {"nngeometry": version("nngeometry"), "torch": torch.__version__}
    report(job, work, versions=versions, batch=loader.batch_size)


if __name__ == "__main__":
    main()
