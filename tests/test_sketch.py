"""The sketched kernel: by its definition, unbiased, as noisy as it says, the same however it is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, make, softplus_sum, tiny_mlp, vectors
from torch import nn

import ntkit
from ntkit.base.batch import take
from ntkit.jacobian.oracle import jacobian, tangent_kernel
from ntkit.jacobian.structure import SelfCheckError
from ntkit.kernels import sketch
from ntkit.testing import assert_equal, check_kernel

SEEDS = 200


def explicit(jacobians, seed, dim):
    """S J^T with S written out entry by entry: [n, C, dim]."""
    total = 0
    for name, rows in jacobians.items():
        entries = rows.shape[2]
        signs, shifts = sketch._draw(seed, name, entries, dim)
        matrix = torch.zeros(entries, dim, dtype=torch.float64)
        for p in range(entries):
            matrix[p, (p + int(shifts[p // dim])) % dim] = float(signs[p])
        total = total + rows @ matrix
    return total


# ------------------------------------------------------------------ what it is


@pytest.mark.parametrize("name", CASES)
def test_is_the_explicit_sketch_of_the_oracles_jacobian(name):
    model, x1, x2 = make(name)
    for dim in (1, 7, 64):
        kernel = ntkit.SketchedKernel(model, dim, seed=3)
        phi1, phi2 = (explicit(jacobian(model, x), 3, dim) for x in (x1, x2))
        assert_equal(kernel.features(x1), phi1, 1e-10, f"features, dim {dim}")
        assert_equal(kernel(x1, x2), torch.einsum("icm,jdm->ijcd", phi1, phi2), 1e-10, f"kernel, dim {dim}")


@pytest.mark.parametrize(
    "outputs", ["full", "diagonal", "trace", "sum", softplus_sum], ids=lambda m: getattr(m, "__name__", m)
)
@pytest.mark.parametrize("name", ["mlp", "one output", "conv", "tied", "attention, sequence first", "dict input"])
def test_laws(name, outputs):
    model, x1, x2 = make(name)
    check_kernel(ntkit.SketchedKernel(model, 16, outputs=outputs), x1, x2)


@pytest.mark.parametrize(
    "outputs", ["full", "diagonal", "trace", "sum", softplus_sum], ids=lambda m: getattr(m, "__name__", m)
)
def test_outputs_combine_as_in_the_exact_kernel(outputs):
    model, x1, x2 = make("mlp")
    phi1, phi2 = (explicit(jacobian(model, x, outputs), 0, 16) for x in (x1, x2))
    expected = torch.einsum("icm,jdm->ijcd", phi1, phi2)
    if outputs != "full":
        expected = expected.diagonal(dim1=2, dim2=3)
        expected = expected if outputs == "diagonal" else expected.sum(-1)
    assert_equal(ntkit.SketchedKernel(model, 16, outputs=outputs)(x1, x2), expected, 1e-10, "combined")


def test_signs_and_shifts_are_what_the_proof_needs():
    """Fair signs, uniform shifts, no correlation between parameters or seeds."""
    names = [(seed, name) for seed in range(20) for name in ("0.weight", "0.bias", "2.weight")]
    drawn = [sketch._draw(seed, name, 50_000, 10) for seed, name in names]
    signs = torch.stack([s for s, _ in drawn]).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(1).abs().max() < 5 / 50_000**0.5
    correlation = signs @ signs.T / 50_000 - torch.eye(len(names)).double()
    assert correlation.abs().max() < 5 / 50_000**0.5
    shifts = torch.stack([h for _, h in drawn])
    assert shifts.shape == (60, 5_000)
    counts = torch.stack([(shifts == b).sum(1) for b in range(10)]).double()
    assert ((counts - 500) / 450**0.5).abs().max() < 5
    met = torch.stack([(a == b).double().mean() for i, a in enumerate(shifts) for b in shifts[:i]])
    assert (met - 0.1).abs().max() < 5 * (0.09 / 5_000) ** 0.5


# ------------------------------------------------------------------ how good it is


def under(kernel, seed):
    """The same kernel under another seed: what the network's graph is like, which is most of the work, is known."""
    other = copy.copy(kernel)
    other._seed = seed
    return other


@pytest.fixture(scope="module", params=["mlp", "conv"])
def trials(request):
    """Sketches of one net under many seeds, the exact kernel, and the exact variances of the notes."""
    model, x, _ = make(request.param)
    dim = 16
    kernel = ntkit.SketchedKernel(model, dim)
    sketched = torch.stack([under(kernel, s)(x) for s in range(SEEDS)])
    for s in (0, 1, SEEDS - 1):
        assert torch.equal(ntkit.SketchedKernel(model, dim, seed=s)(x), sketched[s])
    rows = jacobian(model, x)

    def squares(u):  # K_ii K_jj + K_ij^2 by output, and <K_ii, K_jj> + <K_ij, K_ij^T>
        k = torch.einsum("icp,jdp->ijcd", u, u)
        own = k[range(7), range(7)]
        norm = own.diagonal(dim1=1, dim2=2)
        by_output = norm[:, None, :, None] * norm[None, :, None] + k**2
        return by_output, own.flatten(1) @ own.flatten(1).T + (k * k.transpose(2, 3)).sum((2, 3))

    bound = [s / dim for s in squares(torch.cat(list(rows.values()), -1))]
    blocks = [squares(block) for values in rows.values() for block in values.split(dim, -1)]
    exact = [b - sum(part[i] for part in blocks) / dim for i, b in enumerate(bound)]
    return sketched, tangent_kernel(model, x), bound, exact


def trace(k):
    return k.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_is_unbiased(trials):
    sketched, true, _, _ = trials
    for values, mean in ((sketched, true), (trace(sketched), trace(true))):
        error = values.std(0) / SEEDS**0.5
        assert error.max() < 0.1 * mean.abs().max()
        assert ((values.mean(0) - mean).abs() <= 5 * error).all()


def test_variance_is_that_of_the_notes_and_below_its_bound(trials):
    sketched, _, bound, exact = trials
    for i, values in enumerate((sketched, trace(sketched))):
        found = values.var(0)
        assert (exact[i] < bound[i]).all()
        ratio = found / exact[i]
        assert 0.9 < ratio.mean() < 1.1, ratio.mean()
        assert ratio.min() > 0.6, ratio.min()
        assert ratio.max() < 1.6, ratio.max()
        assert (found < 1.5 * bound[i]).all()
        assert (found > 0.1 * bound[i]).all()


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace", "sum"])
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_standard_error_covers_the_error(name, outputs):
    model, x1, x2 = make(name)
    true = tangent_kernel(model, x1, x2, outputs)
    scores, sizes, first = [], [], ntkit.SketchedKernel(model, 64, outputs=outputs)
    for seed in range(25):
        kernel = under(first, seed)
        error = kernel.standard_error(x1, x2)
        assert error.shape == true.shape
        scores.append((kernel(x1, x2) - true) / error)
        sizes.append(error / true.abs().max())
    z = torch.stack(scores)
    assert (z.abs() <= 3).double().mean() > 0.98
    assert 0.3 < z.square().mean().sqrt() < 1.2, "the error is neither hidden nor exaggerated"
    assert torch.stack(sizes).mean() < 0.5


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("scale", [1e-2, 60.0])
def test_standard_error_in_half_precision(scale, outputs):
    """The squares of values of 1e-4 and of 1e3 are no numbers of float16."""
    x = scale * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    half = nn.Linear(9, 2, bias=False).half()
    errors = [
        ntkit.SketchedKernel(model, 4, outputs=outputs).standard_error(x.half().to(model.weight))
        for model in (half, copy.deepcopy(half).double())
    ]
    assert errors[0].dtype == torch.float16
    assert ((errors[0].double() - errors[1]).abs() <= 0.01 * errors[1]).all()
    assert (errors[1] > 0).all()


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace", "sum"])
def test_standard_error_is_the_closed_form_of_the_sketched_values(outputs):
    model, x1, x2 = make("mlp")
    for memory in (1, None):  # the trace goes strip by strip
        kernel = ntkit.SketchedKernel(model, 16, outputs=outputs, memory=memory)
        expected = torch.empty_like(kernel(x1, x2))
        phi1, phi2 = kernel.features(x1), kernel.features(x2)
        for i, u in enumerate(phi1):
            for j, v in enumerate(phi2):
                k, own1, own2 = u @ v.T, u @ u.T, v @ v.T
                square = own1.diagonal()[:, None] * own2.diagonal() + k**2
                if outputs != "full":
                    square = square.diagonal()
                if outputs in ("trace", "sum"):
                    square = (own1 * own2).sum() + (k * k.T).sum()
                expected[i, j] = (square / 16).sqrt()
        assert_equal(kernel.standard_error(x1, x2), expected, 1e-10, "x1, x2")
        own = kernel.standard_error(x1)
        assert_equal(own, kernel.standard_error(x1, x1), 1e-10, "x1")
        assert torch.equal(own, own.permute(1, 0, 3, 2) if own.dim() == 4 else own.transpose(0, 1))


def test_errors_shrink_with_dim():
    model, x1, x2 = make("mlp")
    true = tangent_kernel(model, x1, x2)

    def rms(dim):
        kernel = ntkit.SketchedKernel(model, dim)
        errors = [under(kernel, s)(x1, x2) - true for s in range(40)]
        return torch.stack(errors).square().mean().sqrt()

    assert 1.4 < rms(8) / rms(32) < 2.9


def test_one_block_is_exact_and_a_large_dim_works():
    model, x1, x2 = make("mlp")
    one = ntkit.SketchedKernel(model, 64, params=["2.weight"])  # 8 x 8 entries
    assert_equal(one(x1, x2), tangent_kernel(model, x1, x2, params=["2.weight"]), 1e-10, "one block")
    less = ntkit.SketchedKernel(model, 63, params=["2.weight"])(x1, x2)
    assert (less - one(x1, x2)).abs().max() > 0
    true = tangent_kernel(model, x1, x2)
    large = ntkit.SketchedKernel(model, 100_000)  # more than all parameters
    assert large.features(x1).shape == (7, 3, 100_000)
    assert ((large(x1, x2) - true).abs() <= 3 * large.standard_error(x1, x2) + 1e-12).all()


# ------------------------------------------------------------------ however it is computed


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "attention, batch first", "experts"])
def test_budget_chunks_and_order_change_nothing(name, monkeypatch):
    model, x1, _ = make(name)
    phi = ntkit.SketchedKernel(model, 7, seed=1).features(x1)
    for memory in (1, 3000, 20_000, "1 MB"):
        for chunk in (1, 200):
            monkeypatch.setattr(sketch, "_CHUNK", {"cpu": chunk})
            kernel = ntkit.SketchedKernel(model, 7, seed=1, memory=memory)
            assert_equal(kernel.features(x1), phi, 1e-12, f"memory {memory}, chunk {chunk}")
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    kernel = ntkit.SketchedKernel(model, 7, seed=1)
    assert_equal(kernel.features(take(x1, order)), phi[order], 1e-12, "order")
    assert_equal(kernel.features(take(x1, slice(2, 3))), phi[2:3], 1e-12, "alone")


def samples(factors):
    return next(iter(factors.values())).rows().shape[0]


def test_a_small_budget_makes_small_batches(monkeypatch):
    model, x1, _ = make("mlp")
    seen = []
    whole = sketch.SketchedKernel._sketch
    monkeypatch.setattr(
        sketch.SketchedKernel,
        "_sketch",
        lambda self, factors, **more: seen.append(samples(factors)) or whole(self, factors, **more),
    )
    kernel = ntkit.SketchedKernel(model, 7, memory=1)
    kernel(x1)
    assert seen[-7:] == [1] * 7
    kernel = ntkit.SketchedKernel(model, 7, memory="1 GB")
    kernel(x1)
    assert seen[-1] == 7


@pytest.mark.parametrize("name", ["mlp", "tied", "norms"])
def test_is_the_sum_of_its_parameters_sketches(name):
    model, x1, _ = make(name)
    names = list(dict(model.named_parameters()))
    parts = [ntkit.SketchedKernel(model, 7, seed=5, params=[p]).features(x1) for p in names]
    assert_equal(ntkit.SketchedKernel(model, 7, seed=5).features(x1), sum(parts), 1e-12, "sum of parameters")


def test_a_seed_says_all():
    model, x1, _ = make("mlp")
    state = torch.get_rng_state()
    K = ntkit.SketchedKernel(model, 16, seed=7)(x1)
    torch.manual_seed(123)
    assert torch.equal(ntkit.SketchedKernel(model, 16, seed=7)(x1), K)
    torch.set_rng_state(state)
    for other in (-7, 8, 7 + 2**32):
        assert (ntkit.SketchedKernel(model, 16, seed=other)(x1) - K).abs().max() > 0.01 * K.abs().max()


def test_follows_the_models_parameters():
    model, x1, _ = make("mlp")
    kernel = ntkit.SketchedKernel(model, 16)
    kernel(x1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[4].bias = nn.Parameter(torch.ones(3).double())
    model[2] = nn.Linear(8, 8).double()
    assert_equal(kernel.features(x1), explicit(jacobian(model, x1), 0, 16), 1e-10, "new parameters")


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "lstm"])
def test_float32(name):
    model, x1, x2 = make(name)
    phi1, phi2 = (explicit(jacobian(model, x), 0, 16) for x in (x1, x2))
    x1, x2 = (x.float() if x.is_floating_point() else x for x in (x1, x2))
    kernel = ntkit.SketchedKernel(model.float(), 16)
    assert kernel(x1, x2).dtype == torch.float32
    assert_equal(kernel(x1, x2), torch.einsum("icm,jdm->ijcd", phi1, phi2), 1e-4, "float32")
    check_kernel(kernel, x1, x2, tolerance=1e-4)


def test_writes_where_it_is_told():
    model, x1, x2 = make("mlp")
    kernel = ntkit.SketchedKernel(model, 16)
    out = torch.empty(7, 4, 3, 3, dtype=torch.float64)
    assert kernel(x1, x2, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, kernel(x1, x2))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_around_the_call_does_not_matter(context):
    model, x1, x2 = make("mlp")
    kernel = ntkit.SketchedKernel(model, 16, memory=1)
    K = kernel(x1, x2)
    with context():
        for again in (kernel, ntkit.SketchedKernel(model, 16, memory=1)):
            found = again(x1, x2)
            assert torch.equal(found, K)
            assert not found.requires_grad


class Rare(nn.Module):
    """Uses its weight once more where a sample is extreme."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        y = self.layer(x)
        extreme = (x[:, :1] > 10).to(x)
        return y + extreme * (x.sin() @ self.layer.weight.T).square() if extreme.any() else y


@pytest.mark.parametrize("memory", [1, "1 MB"])
def test_a_graph_that_changes_in_a_later_batch(memory):
    model, x = Rare().double(), torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 0] = 20
    kernel = ntkit.SketchedKernel(model, 7, memory=memory)
    assert_equal(kernel.features(x), explicit(jacobian(model, x), 0, 7), 1e-10, "features")
    assert "layer.weight" in kernel._engine.structure(x).fallback


def test_out_of_memory_makes_smaller_batches(monkeypatch):
    model, x1, _ = make("mlp")
    whole = sketch.SketchedKernel._sketch

    def small(self, factors, **more):
        if samples(factors) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, factors, **more)

    monkeypatch.setattr(sketch.SketchedKernel, "_sketch", small)
    kernel = ntkit.SketchedKernel(model, 16, memory="1 MB")
    assert_equal(kernel.features(x1), explicit(jacobian(model, x1), 0, 16), 1e-10, "features")

    def never(self, *rest, **more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sketch.SketchedKernel, "_sketch", never)
    with pytest.raises(torch.OutOfMemoryError):
        ntkit.SketchedKernel(model, 16, memory="1 MB").features(x1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "lstm"])
def test_gpu_gives_the_same(name):
    model, x1, x2 = make(name)
    K, error = (f(ntkit.SketchedKernel(model, 16)) for f in (lambda k: k(x1, x2), lambda k: k.standard_error(x1, x2)))
    moved = ntkit.SketchedKernel(model.cuda(), 16)
    assert_equal(moved(x1.cuda(), x2.cuda()).cpu(), K, 1e-10, "GPU")
    assert_equal(moved.standard_error(x1.cuda(), x2.cuda()).cpu(), error, 1e-10, "GPU")


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize("dim", [1, 16, 4096])
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_self_check_catches_a_projection_to_zero(dim, outputs, monkeypatch):
    model, x1, _ = make("conv")
    draw = sketch._draw

    def zeros(*what):
        signs, shifts = draw(*what)
        return torch.zeros_like(signs), shifts

    monkeypatch.setattr(sketch, "_draw", zeros)
    with pytest.raises(SelfCheckError, match="does not hold every gradient entry once"):
        ntkit.SketchedKernel(model, dim, outputs=outputs)(x1)


def test_self_check_catches_a_fold_that_drops_a_piece(monkeypatch):
    model, x1, _ = make("conv")
    fold = sketch._fold
    monkeypatch.setattr(sketch, "_fold", lambda values, signs, *rest: fold(values[:, :-1], signs[:-1], *rest))
    with pytest.raises(SelfCheckError, match="does not hold every gradient entry once"):
        ntkit.SketchedKernel(model, 16)(x1)


def test_self_check_catches_signs_that_are_all_alike(monkeypatch):
    """All entries of the gradient are positive: without signs they add up instead of cancelling."""
    model = nn.Linear(4000, 1, bias=False).double()
    x = 1 + torch.rand(3, 4000, dtype=torch.float64)
    K = ntkit.SketchedKernel(model, 64)(x)
    assert ((K - tangent_kernel(model, x)).abs() <= 5 * ntkit.SketchedKernel(model, 64).standard_error(x)).all()
    draw = sketch._draw

    def ones(*what):
        signs, shifts = draw(*what)
        return torch.ones_like(signs), shifts

    monkeypatch.setattr(sketch, "_draw", ones)
    with pytest.raises(SelfCheckError, match="norms that a correct sketch has with probability below 1e-9"):
        ntkit.SketchedKernel(model, 64)(x)


def test_self_check_catches_features_of_zeros_where_dim_gives_it_power(monkeypatch):
    model = nn.Linear(4000, 1, bias=False).double()
    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fold = sketch._fold

    def silent(values, signs, *rest):
        return fold(values if (signs == 1).all() else 0 * values, signs, *rest)

    monkeypatch.setattr(sketch, "_fold", silent)
    with pytest.raises(SelfCheckError, match=r"probability below 1e-9: squared \[0\.0, 0\.0, 0\.0\]"):
        ntkit.SketchedKernel(model, 1024)(x)


@pytest.mark.parametrize("dim", [0, -3, 2.0, "64", True, None])
def test_dim_is_checked(dim):
    with pytest.raises(ntkit.Refused, match=r"dim: got .*; expected a positive integer"):
        ntkit.SketchedKernel(tiny_mlp(), dim)


def test_refusals():
    model = tiny_mlp()
    with pytest.raises(ntkit.Refused, match=r"seed: got 0\.5; expected an integer"):
        ntkit.SketchedKernel(model, 16, seed=0.5)
    with pytest.raises(ntkit.Refused, match="outputs: got 'traces'"):
        ntkit.SketchedKernel(model, 16, outputs="traces")
    with pytest.raises(ntkit.Refused, match="params: got 'nothing'"):
        ntkit.SketchedKernel(model, 16, params=["nothing"])
    with pytest.raises(ntkit.Refused, match="memory: got 0"):
        ntkit.SketchedKernel(model, 16, memory=0)
    kernel = ntkit.SketchedKernel(model, 16)
    for use in (kernel, kernel.features, kernel.diagonal, kernel.standard_error, kernel.operator):
        with pytest.raises(ntkit.Refused, match="an empty set"):
            use(vectors(0))
    with pytest.raises(ntkit.Refused, match='operator of outputs="diagonal"'):
        ntkit.SketchedKernel(model, 16, outputs="diagonal").operator(vectors(3))
    with pytest.raises(ntkit.Refused, match="x2: got 3 samples; expected 4, as x1"):
        kernel.paired(vectors(4), vectors(3))
    many, _, _ = make("tokens through linear")
    with pytest.raises(ntkit.Refused, match=r"x2: got 4 outputs; expected 6, as for x1"):
        ntkit.SketchedKernel(many, 16)(torch.randn(3, 3, 5).double(), torch.randn(3, 2, 5).double())
    with pytest.raises(ntkit.Refused, match=r"got train mode; expected eval mode"):
        ntkit.SketchedKernel(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().train(), 16)(vectors(3))
