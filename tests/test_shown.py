"""What results and kernels look like in a terminal and in a notebook, and their figures."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.shown import short

N = 26


@pytest.fixture(scope="module")
def objects():
    """One of each public object that a user gets to see."""
    torch.manual_seed(0)
    x = torch.randn(N, 3).double()
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    run = ntkit.train(net, (x, y), nn.functional.cross_entropy, sgd, steps=12, batch_size=10, record="all")
    kernel = ntkit.TangentKernel(net, "trace")
    K = kernel(x)
    path = ntkit.PathKernel(run)
    values = y.double()[:, None]
    gp = ntkit.GaussianProcess(0.1).fit(K, values)
    limit = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))
    return {
        "kernel": kernel, "sketch": ntkit.SketchedKernel(net, 8), "conjugate": ntkit.ConjugateKernel(net),
        "limit": ntkit.InfiniteKernel(limit), "path": path, "operator": kernel.operator(x), "plan": kernel.plan(x),
        "run": run, "gram": ntkit.Gram(K), "spectrum": ntkit.spectrum(K), "top": ntkit.spectrum(K, k=3),
        "tracked": ntkit.track(run, x, y, model=net, k=3), "decomposition": path.decompose(x[:4]),
        "svm": ntkit.HardMarginSVM().fit(K, y), "ridge": ntkit.KernelRidge(0.1).fit(K, values),
        "flow": ntkit.GradientFlow().fit(K, values), "gp": gp, "posterior": gp.predict(K[:5], K.diagonal()[:5]),
        "influence": ntkit.influence(run, x[:3], y[:3]), "importance": ntkit.tracking_importance(run),
        "explanation": ntkit.explain(kernel, ntkit.tracking_importance(run), x, x[:3]),
        "influence kernel": ntkit.InfluenceKernel(net, (x, y), nn.functional.cross_entropy, damping=0.1),
    }, x, y  # fmt: skip


def test_one_line_each(objects):
    for name, thing in objects[0].items():
        text = repr(thing)
        assert "\n" not in text, name
        assert len(text) <= 420, (name, text)
        assert " at 0x" not in text, (name, text)
        assert text.startswith(type(thing).__name__), text


def test_lines_hold_the_numbers(objects):
    shown, x, _ = objects
    net = shown["kernel"].operator(x)
    assert repr(shown["kernel"]) == "TangentKernel(Sequential, 98 parameters, outputs=trace)"
    assert repr(net) == f"KernelOperator({N} x {N}, torch.float64, cpu)"
    values = shown["spectrum"].eigenvalues
    assert f"eigenvalues=[{N}], {values.min():.4g} to {values.max():.4g}" in repr(shown["spectrum"])
    assert f"error={shown['decomposition'].error:.4g}" in repr(shown["decomposition"])
    assert "12" in repr(shown["path"])
    head = ntkit.TangentKernel(shown["kernel"]._engine.model, lambda out: out[:, 0], params=["0.bias"])
    assert "16 parameters, outputs=test_lines_hold_the_numbers.<locals>.<lambda>)" in repr(head)


def test_tables_for_notebooks(objects):
    for name in ("spectrum", "tracked", "decomposition", "influence", "explanation", "gram", "posterior"):
        table = objects[0][name]._repr_html_()
        assert table.startswith("<table>")
        assert 1 < table.count("<tr>") < 15, name
        assert len(table) < 5000


def test_values_in_few_words():
    assert short(torch.tensor(2.5)) == "2.5"
    assert short(torch.empty(0, 3)) == "[0, 3]"
    assert short(np.array([1.0, np.nan])) == "[2], with nan"
    assert short({"a": 1, "b": 2}) == "2 of a, b"
    assert short(list(range(9))) == "9 entries"
    assert len(short("long" * 100)) < 70
    assert "<b>" not in ntkit.base.shown.as_table("<b>", {"<b>": "<b>"})


def test_figures_hold_the_numbers(objects):
    shown, _, y = objects
    spectrum = shown["spectrum"]
    curve = spectrum.plot().data[0]
    np.testing.assert_array_equal(curve.y, spectrum.eigenvalues[spectrum.eigenvalues > spectrum.floor].numpy())
    assert curve.x[0] == 1
    tracked = shown["tracked"]
    loss = tracked.plot("loss").data[0]
    assert (list(loss.x), list(loss.y)) == (tracked.steps, tracked.series["loss"])
    assert {curve.name for curve in tracked.plot().data} == {"loss", "trace", "alignment_centered", "distance"}
    assert max(tracked.plot().data[1].y) == 1.0
    with pytest.raises(ntkit.Refused, match="names: got 'eigenvalues'; expected a series of single numbers"):
        tracked.plot("eigenvalues")
    decomposition = shown["decomposition"]
    bars = decomposition.plot(1, k=5).data[0]
    own = decomposition.of()[1]
    order = own.abs().argsort(descending=True)[:5]
    assert list(bars.x) == own[order].tolist()
    assert list(bars.y) == [f"example {int(i)}" for i in order]
    with pytest.raises(ntkit.Refused, match="point: got 4; expected 0 to 3"):
        decomposition.plot(4)
    with pytest.raises(ntkit.Refused, match="expected a whole number of examples, at least 1"):
        decomposition.plot(1, k=-1)
    K = shown["gram"]
    order = y.argsort(stable=True)
    figure = K.plot(y)
    np.testing.assert_array_equal(figure.data[0].z, K.tile(order, order).numpy())
    assert len(figure.layout.shapes) == 2  # one line each way, between two classes
    assert figure.layout.shapes[0].y0 == float((y == 0).sum()) - 0.5
    with pytest.raises(ntkit.Refused, match="y: got shape"):
        K.plot(y[:3])
    wide = torch.rand(4, 2, 7, generator=torch.Generator().manual_seed(0)).double()  # 4 samples of 2 outputs
    full = torch.einsum("icp,jdp->ijcd", wide, wide)
    drawn = ntkit.Gram(full).plot(torch.tensor([1, 0, 1, 0])).data[0].z
    order = [2, 3, 6, 7, 0, 1, 4, 5]
    flat = full.permute(0, 2, 1, 3).reshape(8, 8)
    assert np.allclose(drawn, flat[order][:, order].numpy())
    large = ntkit.Gram(torch.eye(700).double()).plot()
    assert np.asarray(large.data[0].z).shape == (500, 500)
    assert large.layout.title.text == "Kernel on 500 of 700 samples"


def test_a_notebook():
    """Cells as a user writes them; each shows a figure or a short table or line."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    cells = [
        "import torch, ntkit\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "x = torch.randn(24, 3); y = (x[:, 0] > 0).long()\n"
        "net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))\n"
        "sgd = lambda params: torch.optim.SGD(params, lr=0.1)\n"
        "run = ntkit.train(net, (x, y), nn.functional.cross_entropy, sgd, steps=6, record='all')\nrun",
        "kernel = ntkit.TangentKernel(net, 'trace')\nkernel",
        "K = ntkit.Gram(kernel(x))\nK",
        "ntkit.spectrum(K).plot()",
        "tracked = ntkit.track(run, x, y, model=net, k=3)\ntracked",
        "tracked.plot()",
        "path = ntkit.PathKernel(run).decompose(x[:2])\npath",
        "path.plot()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    kinds = []
    for cell in notebook.cells:
        outputs = [o for o in cell.outputs if o.output_type in ("execute_result", "display_data")]
        if len(outputs) == 2:  # plotly 5 writes a script in front of the first figure
            assert "PlotlyConfig" in outputs.pop(0).data["text/html"]
        (output,) = outputs
        kinds.append({kind for kind in output.data if kind != "text/plain"})
        assert len(output.data.get("text/plain", "")) < 500 or "application/vnd.plotly.v1+json" in output.data
        assert not re.search(r"at 0x[0-9a-f]+", output.data.get("text/plain", ""))
    figure = {"application/vnd.plotly.v1+json"}
    assert [bool(k & figure) for k in kinds] == [False, False, False, True, False, True, False, True]
    assert all("text/html" in kinds[i] for i in (2, 4, 6))
