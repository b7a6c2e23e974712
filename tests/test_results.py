"""Committed results of studies: whole, and those that their parts give."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from ntkit.base.files import read_json
from ntkit.base.integrity import fingerprint
from ntkit.commands.verify import verify
from ntkit.studies.claim import as_markdown
from ntkit.studies.kopitkov2019.kopitkov_setting import picture
from ntkit.studies.study import Work, mlp

FOLDERS = sorted((Path(__file__).parents[1] / "studies" / "results").glob("*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_committed_file_is_whole(folder):
    assert [record for record in verify(folder) if record.status != "ok"] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_claims_are_those_of_the_parts(folder):
    told, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    study = import_module(f"ntkit.studies.{told['name']}").STUDY
    header = study.header(told["scale"], told["sets"])
    assert told | header == told  # the study as it is now, not as it once was
    work = Work(study.scales[told["scale"]], study.seeds, told["sets"], folder, {}, id=fingerprint(header))
    finished = study.results(work, finished=True)
    claims = [claim.record() for claims in study.claims for claim in claims(finished)]
    assert claims == results["claims"]
    table = as_markdown("", claims).partition("\n")[2]
    assert table in (folder / "claims.md").read_text(encoding="utf-8")


def test_some_results_are_committed():
    assert {"long2021", "kopitkov2019", "tsai2023"} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("seed", [0, 4])
def test_energies_before_training_of_kopitkov2019_by_single_gradients(seed):
    """Another way to the numbers that the report begins with: one backward pass per point, all eigenvectors."""
    folder = Path(__file__).parents[1] / "studies" / "results" / "kopitkov2019"
    sizes = read_json(folder / "run.json")["sizes"]
    told = read_json(folder / "parts" / f"wide-ripples-depth-6-seed-{seed}.json")["numbers"]
    model, side = mlp(2, 1, 6, sizes["width"], seed).double(), sizes["side"]
    places = torch.linspace(-1 + 1 / side, 1 - 1 / side, side, dtype=torch.float64)
    y, x = torch.meshgrid(places, places, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    gradients = [torch.autograd.grad(model(p).squeeze(), list(model.parameters())) for p in points]
    J = torch.stack([torch.cat([g.flatten() for g in of_one]) for of_one in gradients])
    vectors = torch.linalg.eigh(J @ J.T).eigenvectors[:, -sizes["top"] :]
    for name in ("ripples", "wide ripples", "narrow ripples", "photograph"):
        values = picture(name, side)
        energy = float(((vectors.T @ values) ** 2).sum() / (values**2).sum())
        assert told["energies"][name][0] == pytest.approx(energy, abs=1e-3)
