"""Committed results of studies: whole, and those that their parts give."""

from __future__ import annotations

from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from ntkit.base.files import read_arrays, read_json
from ntkit.base.integrity import fingerprint
from ntkit.commands.verify import verify
from ntkit.studies import bell2023, jacot2018
from ntkit.studies.bell2023 import other_kernels
from ntkit.studies.claim import as_markdown
from ntkit.studies.jacot2018 import definiteness, outputs_at_start
from ntkit.studies.kopitkov2019.kopitkov_setting import picture
from ntkit.studies.part import Sizes, Work
from ntkit.studies.study import Results, mlp

RESULTS = Path(__file__).parents[1] / "studies" / "results"
FOLDERS = sorted(RESULTS.glob("*"))


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


def test_unfinished_work_on_jacot2018_is_judged_where_an_experiment_is_complete():
    """Without one part, the claims and figures of its experiment are left out; all others are those of the whole."""
    folder, study = RESULTS / "jacot2018", jacot2018.STUDY
    told = read_json(folder / "run.json")
    id = fingerprint(study.header("quick", ["mnist"]))
    whole = study.results(Work(study.scales[told["scale"]], (), told["sets"], folder, {}, id=id))
    claims = {claim.text: claim.record() for listed in study.claims for claim in listed(whole)}
    titles = [section.title for listed in study.sections for section in listed(whole)]
    assert (whole.missing, len(study.certificate(whole)["cards"])) == (frozenset(), 4)
    always = set(claims)
    for experiment, cases in whole.by_experiment.items():
        case, runs = list(cases.items())[-1]
        fewer = whole.by_experiment | {experiment: cases | {case: runs[:-1]}}
        partial = Results(whole.work, fewer, frozenset({experiment}))
        found = {claim.text: claim.record() for listed in study.claims for claim in listed(partial)}
        assert found == {text: claims[text] for text in found}
        assert 0 < len(found) < len(claims)
        shown = [section.title for listed in study.sections for section in listed(partial)]
        assert len(shown) == len(titles) - (2 if experiment == "eigenvalues" else 1)  # figure 3 needs them throughout
        assert bool(study.certificate(partial)) == (experiment not in ("rate", "learning", "eigenvalues"))
        assert "Not all of this is computed yet" in study.about(partial)
        always &= set(found)
    assert always == set()  # every claim vanishes with an experiment of its own


def test_some_results_are_committed():
    assert {"jacot2018", "kopitkov2019", "long2021", "bell2023", "tsai2023"} <= {folder.name for folder in FOLDERS}


def test_cheap_numbers_of_jacot2018_come_out_again(tmp_path):
    work = Work(Sizes(output_seeds=20, sets=20), (), ["mnist"], tmp_path)
    stored = read_arrays(RESULTS / "jacot2018" / "parts" / "outputs-8.safetensors")
    for name, found in outputs_at_start._outputs(work, 8).arrays.items():
        np.testing.assert_allclose(found, stored[name][:20], rtol=1e-9)
    stored = read_json(RESULTS / "jacot2018" / "parts" / "definiteness.json")["numbers"]
    found = definiteness._eigenvalues(work).numbers
    for name in definiteness.DEFINITE:
        np.testing.assert_allclose(found[name], stored[name], rtol=1e-9)


def test_a_cheap_number_of_bell2023_is_the_committed_one(tmp_path):
    folder = next(folder for folder in FOLDERS if folder.name == "bell2023")
    work = Work(bell2023.SCALES["quick"], bell2023.STUDY.seeds, ["digits"], tmp_path)
    part = next(part for part in other_kernels.parts(work) if part.name == "formulations-tanh-seed-1")
    again, committed = work.result(part).numbers, read_json(folder / "parts" / f"{part.name}.json")["numbers"]
    for name in other_kernels.FORMULATIONS:
        assert again[name]["relative"] == pytest.approx(committed[name]["relative"], rel=1e-6)


def _sentences():
    spec = spec_from_file_location("sentences", RESULTS.parent / "sentences.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_sentences_is_made_from_the_results():
    module = _sentences()
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
    text = module.README.read_text(encoding="utf-8")
    assert text == module.readme()
    assert module.summary() in text


def test_every_sentence_names_claims_and_every_claim_of_a_paper_is_named():
    module = _sentences()
    for study, (_, _, sentences) in module.PAPERS.items():
        claims = [claim["claim"] for claim in module.claims_of(study)]
        for sentence in sentences if claims and study != "long2021" else ():  # its results are not complete
            assert all(any(c.startswith(begin) for c in claims) for begin in sentence.claims), sentence
        named = tuple(begin for sentence in sentences for begin in sentence.claims)
        assert [c for c in claims if not c.startswith((*named, *module.CHECKS))] == []


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
