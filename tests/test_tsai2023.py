"""The study of generalized representers: its methods against formulas, resumed, judged, drawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ntkit
from ntkit.studies import tsai2023 as tsai
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.studies.tsai2023 import methods, tsai_setting, wrong_labels
from ntkit.studies.tsai2023.tsai_sentences import exact, questions

TOY = Sizes(**vars(tsai.SCALES["quick"]) | dict(
    train=40, text_train=40, test=4, pixels=6, width=2, features=4, channels=3, epochs=4, seeds=2, left=6, sets=5,
    fresh=2,
))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("tsai") / "run", []

    def stop(line):
        said.append(line)
        if line.endswith("seed-1-predictions"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tsai, "STUDY", replace(tsai.STUDY, scales={"quick": TOY}))
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("tsai2023", out=place, say=stop)
        assert said.pop().startswith("Stopped.")
        early = json.loads((place / "results.json").read_text())  # written while the study runs
        assert 0 < len(early["claims"]) < 11
        first = list(said)
        ntkit.study("tsai2023", out=place, say=said.append)
        assert said[len(first)] == first[-1]
        assert len(set(said)) == len(said) - 1
        before = (place / "results.json").read_bytes()
        shutil.rmtree(place / "runs")  # what is committed: parts without their runs
        (place / "parts" / "digits-3-8-seed-0-deletion.json").unlink()
        again: list[str] = []
        ntkit.study("tsai2023", out=place, say=again.append)
        assert again == ["digits-3-8-seed-0-deletion"]
        assert (place / "results.json").read_bytes() == before
    return place


def test_results_have_claims_with_numbers_and_a_page(folder):
    results = json.loads((folder / "results.json").read_text())
    claims = results["claims"]
    assert len(claims) == 2 * 3 + 2 + 2 + 1
    assert all(any(ch.isdigit() for ch in c["number"]) and c["how"] for c in claims)
    holds = {c["claim"]: c["holds"] for c in claims}
    assert holds["Surrogates solve their problem, and the path kernel’s sums are the predictions"]
    assert holds["Exact influence is the derivative of training"]
    page = (folder / "report.html").read_text()
    for section in results["sections"]:
        assert section["title"].split(":")[0] in page
    for method in methods.METHODS:
        assert method in page


def test_methods_are_their_formulas(tmp_path):
    work = Work(TOY, (0,), ["digits"], tmp_path)
    at = tsai_setting.trained(work, "digits 3/8", 0)
    scores, params = methods.Scores(at), list(at.network.parameters())

    def gradients(x):
        rows = []
        for i in range(len(x)):
            grads = torch.autograd.grad(at.network(x[i : i + 1])[0, 0], params)
            rows.append(torch.cat([g.flatten() for g in grads]).double())
        return torch.stack(rows)

    train, test, sign = gradients(at.x), gradients(at.x_test), at.sign.double()[:, None]
    f = scores.outputs[:, 0].double()
    slope = f.sigmoid() - at.y.double()
    target = scores.of("target x tangent kernel at the end")
    close(target, sign * (test @ train.T) * -slope, 1e-5)
    p = torch.where(at.y > 0, f.sigmoid(), 1 - f.sigmoid())
    own = torch.where(at.y > 0, 1.0, -1.0).double()[:, None] * train
    K = own @ own.T
    ridge = methods.RIDGE * K.diagonal().mean() * torch.eye(len(K))
    close(scores.of("TRAK"), sign * (test @ own.T) @ torch.linalg.inv(K + ridge) * (1 - p), 1e-3)
    D = f.sigmoid() * (1 - f.sigmoid())
    C = (train.T * D) @ train / len(train) + methods.DAMPING * torch.eye(train.shape[1])
    close(scores.of("influence function"), sign * (test @ torch.linalg.solve(C, train.T)) * -slope, 1e-3)
    exact_scores = ntkit.influence(at.run, at.x_test, at.sign, measure=tsai_setting.signed).scores
    close(scores.of("exact influence"), exact_scores, 1e-6)


def close(a, b, relative):
    assert float((a - b).norm() / b.norm()) <= relative
    assert not float((a * (1 + 20 * relative) - b).norm() / b.norm()) <= relative


def test_flipped_labels_are_the_wrong_ones(tmp_path):
    work = Work(TOY, (0,), ["digits"], tmp_path)
    right, wrong = (tsai_setting.trained(work, "digits 3/8", 0, flipped=share) for share in (0.0, 0.05))
    assert int((right.y != wrong.y).sum()) == 2
    assert torch.equal(right.x, wrong.x)
    assert set(wrong_labels._wrong(work, "digits 3/8", 0).numbers) == {*methods.METHODS, *wrong_labels.BASELINES}


@pytest.mark.parametrize("better", [1.0, -1.0])
def test_a_claim_holds_where_a_method_is_better_and_only_there(tmp_path, better):
    generator = np.random.default_rng(0)
    arrays, correlations = {}, {}
    for method in methods.METHODS:
        gain = better if method in (methods.NEW, *methods.EXACT, "tracking x influence kernel") else 0.0
        arrays[f"{method}: lowest"] = generator.normal(gain, 0.1, (20, 3))
        arrays[f"{method}: highest"] = generator.normal(-gain, 0.1, (20, 3))
        for what in tsai.predictions.PREDICTIONS:
            correlations[f"{method}: {what}"] = generator.normal(gain / 2 if method in methods.EXACT else 0, 0.1, 20)
    certificates = {f"{method}: metasmoothness": 1.0 for method in methods.EXACT}
    results = Results(Work(TOY, (0,), ["digits"], tmp_path), {
        "deletion": {"digits 3/8": [Result({}, arrays)]},
        "predictions": {"digits 3/8": [Result({}, correlations)]},
        "scores": {"digits 3/8": [Result({"certificates": certificates}, {})]},
    })  # fmt: skip
    for claims in (questions, exact):
        for claim in claims(results):
            assert claim.record()["holds"] == (better > 0), claim.text


def test_sentences_have_the_words_of_their_sample(shared_data, tmp_path):
    work = Work(TOY, (0,), ["trec"], tmp_path, {"trec": shared_data})
    data = tsai_setting.images_or_tokens(work, tsai_setting.TASKS["TREC description/entity"], 0)
    full = ntkit.data.load("trec", data_dir=shared_data, classes=("description", "entity"), train=40, test=4, seed=0)
    for own, whole in zip(data.x_train, full.x_train, strict=True):
        assert data.sentence(own) == full.sentence(whole)
    assert data.tokens == len(full.x_train[full.x_train > 1].unique()) + 2
    assert int(data.x_test.max()) < data.tokens
    at = tsai_setting.trained(work, "TREC description/entity", 0)
    assert F.binary_cross_entropy_with_logits(at.network(at.x)[:, 0], at.y.float()).isfinite()
