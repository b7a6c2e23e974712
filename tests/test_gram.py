"""Kernel matrices as one object: what it gives equals the dense matrix, and all who use one accept and refuse alike."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.gram import gram_matrix
from ntkit.gram.gram_matrix import SYMMETRY, Gram, as_gram
from ntkit.machines import GaussianProcess, GradientFlow, HardMarginSVM, KernelRidge
from ntkit.measures.spectra import alignment, effective_rank, spectrum

N = 23


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(n: int = N, seed: int = 0) -> Tensor:
    phi = draw(n, n + 7, seed=seed)
    K = phi @ phi.T
    return (K + K.T) / 2


def with_outputs(n: int = 7, C: int = 3) -> tuple[Tensor, Tensor]:
    """[n, n, C, C], and the same as a matrix with row i C + c."""
    flat = positive(n * C)
    return flat.reshape(n, C, n, C).permute(0, 2, 1, 3), flat


def tilted(K: Tensor, relative: float) -> Tensor:
    """K with an asymmetry of this size, relative to its largest entry."""
    K = K.clone()
    K[1, 3] += relative * K.abs().max()
    return K


KINDS = {
    "float64": lambda K: K,
    "float32": lambda K: K.float(),
    "float16": lambda K: K.half(),
    "bfloat16": lambda K: K.bfloat16(),
    "integers": lambda K: K.round().long(),
    "numpy": lambda K: K.numpy(),
    "numpy float32": lambda K: K.float().numpy(),
    "Fortran order": lambda K: np.asfortranarray(K.numpy()),
    "every second": lambda K: K.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "numpy, every second": lambda K: K.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()[::2, ::2],
    "reversed": lambda K: K.numpy()[::-1, ::-1],
    "read-only": lambda K: np.frombuffer(K.numpy().tobytes()).reshape(K.shape),
    "other byte order": lambda K: K.numpy().astype(">f8"),
    "rounding asymmetry": lambda K: tilted(K.float(), 3e-5),
    "outputs": lambda K: with_outputs()[0],
    "outputs, rounding asymmetry": lambda K: with_outputs()[0] + 1e-12 * draw(7, 7, 3, 3),
}


def dense_of(K) -> Tensor:
    """The symmetric part in float64, by numpy."""
    values = np.array(K.double().numpy() if isinstance(K, Tensor) else K, dtype=np.float64)
    if values.ndim == 4:
        n, _, C, _ = values.shape
        values = values.transpose(0, 2, 1, 3).reshape(n * C, n * C)
    return torch.from_numpy((values + values.T) / 2)


@pytest.mark.parametrize("block", [None, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_tiles_diagonal_and_products_are_those_of_the_matrix(monkeypatch, kind, block):
    if block:
        monkeypatch.setattr(gram_matrix, "BLOCK", block)
        monkeypatch.setattr(gram_matrix, "_TILE", 5)
    K = KINDS[kind](positive())
    dense, G = dense_of(K), Gram(K)
    n = len(dense)
    assert G.shape == (n, n)
    assert len(G) == n
    assert G.outputs == (3 if "outputs" in kind else 1)
    for index in (slice(None), slice(2, 9, 3), [4, 1, 1], torch.tensor([0, n - 1]), np.array([3]), []):
        where = torch.as_tensor(index, dtype=torch.long) if isinstance(index, list) else index
        assert torch.equal(G.rows(index), dense[where])
        assert torch.equal(G.tile(index, slice(1, 5)), dense[where, 1:5])
        assert torch.equal(G.tile(slice(1, 5), index), dense[1:5][:, where])
        assert torch.equal(G.tile(index, [2, 0]), dense[where][:, [2, 0]])
    assert G.rows([1]).dtype == torch.float64
    assert torch.equal(G.diagonal(), dense.diagonal())
    assert torch.equal(G.dense(), dense)
    assert np.array_equal(G.numpy(), dense.numpy())
    assert torch.equal(torch.cat([rows for _, rows in G.blocks()]), dense)
    assert G.largest == pytest.approx(float(dense.abs().max()), rel=SYMMETRY[G.dtype])
    sparse = torch.zeros(n, dtype=torch.float64)
    sparse[[2, 5]] = torch.tensor([1.0, -3.0], dtype=torch.float64)
    for v in (
        draw(n),
        draw(n, 4),
        sparse,
        sparse[:, None] * draw(1, 3),
        torch.zeros(n),
        torch.ones(n, 0),
        draw(n).float(),
    ):
        torch.testing.assert_close(G @ v, dense @ v.double(), rtol=1e-13, atol=1e-11)
    product = G @ draw(n).numpy()
    assert isinstance(product, np.ndarray)
    assert product.dtype == np.float64


def test_dense_is_a_copy_and_a_gram_is_not():
    K = positive()
    G = Gram(K)
    G.dense().zero_()
    assert torch.equal(G.rows([0])[0], K[0])
    assert G.rows(slice(None)).data_ptr() == K.data_ptr()
    assert as_gram(G) is G
    assert repr(Gram(K.float())) == "Gram(23 x 23, torch.float32, cpu)"
    assert repr(Gram(with_outputs()[0])) == "Gram(21 x 21, 3 outputs, torch.float64, cpu)"
    locked = KINDS["read-only"](K)
    assert torch.equal(Gram(locked).dense(), K)


def _set(K: Tensor, value: float, *index: int) -> Tensor:
    K = K.clone()
    K[index] = value
    return K


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (
            torch.ones(3),
            r"K: got shape \[3\]; expected a square matrix \[n, n\], or \[n, n, C, C\].*Pass the kernel of",
        ),
        (torch.ones(3, 4), r"K: got shape \[3, 4\]; expected a square matrix"),
        (torch.ones(3, 3, 2, 1), r"K: got shape \[3, 3, 2, 1\]; expected a square matrix"),
        (torch.ones(0, 0), r"K: got shape \[0, 0\], empty; expected a square matrix"),
        (_set(positive(), float("nan"), 22, 4), r"K: got nan at index \[22, 4\]; expected finite values"),
        (_set(positive(), float("nan"), 4, 22), r"K: got nan at index \[4, 22\]"),
        (_set(positive(), float("inf"), 3, 3), r"K: got inf at index \[3, 3\]"),
        (torch.full((5, 5), float("-inf")), r"K: got -inf at index \[0, 0\]"),
        (_set(with_outputs()[0], float("nan"), 6, 2, 0, 1), r"K: got nan at index \[6, 2, 0, 1\]"),
        (
            _set(torch.eye(5), 0.5, 4, 1),
            r"K: got K\[1, 4\] = 0 but K\[4, 1\] = 0.5; .* symmetric .* torch.float32, rel",
        ),
        (_set(with_outputs()[0], 900.0, 1, 1, 0, 2), r"K\[1, 1, 0, 2\] = 900 but K\[1, 1, 2, 0\] = .*\(K \+ K.T\) / 2"),
        (torch.eye(3) * 1j, "K: got complex values; expected real numbers"),
        (np.eye(3) * 1j, "K: got complex values; expected real numbers"),
        (np.full((3, 3), "a"), "K: got <U1 values; expected real numbers"),
        ([[1.0], [1.0, 2.0]], "K: got rows of unequal length; expected real numbers"),
        (None, "K: got NoneType; expected real numbers"),
        (Gram(torch.eye(2)), "K: got a Gram; expected a tensor or an array. Use it as it is."),
    ],
)
@pytest.mark.parametrize("tile", [512, 4])
def test_refusals(monkeypatch, K, message, tile):
    monkeypatch.setattr(gram_matrix, "_TILE", tile)
    with pytest.raises(Refused, match=message):
        Gram(K)


def test_refusals_of_products_and_of_half_an_identity():
    G = Gram(positive())
    with pytest.raises(Refused, match=r"vector: got shape \[5\]; expected \[23\], or \[23, k\]"):
        G @ torch.ones(5)
    with pytest.raises(Refused, match="Gram: got one of kernel and x; expected both"):
        Gram(positive(), x=torch.ones(3))


# ---------------------------------------------------------------------- one rule for all

Y = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0).double()
CONSUMERS = {
    "spectrum": spectrum,
    "top of the spectrum": lambda K: spectrum(K, k=2),
    "alignment": lambda K: alignment(K, Y),
    "alignment with a kernel": lambda K: alignment(torch.eye(N), K),
    "effective rank": effective_rank,
    "svm": lambda K: HardMarginSVM().fit(K, Y),
    "ridge": lambda K: KernelRidge(1.0).fit(K, Y),
    "flow": lambda K: GradientFlow().fit(K, Y),
    "gaussian process": lambda K: GaussianProcess(1.0).fit(K, Y),
    "posterior": lambda K: GaussianProcess(1.0).fit(positive(), Y).predict(positive(), K),
    "ensemble": lambda K: (
        GradientFlow()
        .fit(positive(), Y)
        .ensemble(positive(), nngp_train=K, nngp_test_train=positive(), nngp_test_test=torch.ones(N), t=1.0)
    ),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_all_accept_and_refuse_the_same_matrices(consumer):
    use = CONSUMERS[consumer]
    K = positive()
    for dtype, limit in SYMMETRY.items():
        if torch.finfo(dtype).eps < limit / 8:  # else the perturbation itself is rounded away
            use(tilted(K.to(dtype), 0.7 * limit))
            with pytest.raises(Refused, match="expected a symmetric matrix"):
                use(tilted(K.to(dtype), 1.4 * limit))
    use(K.float().numpy())
    use(Gram(K.float()))
    if consumer != "alignment with a kernel":  # a rectangle is targets there
        with pytest.raises(Refused, match=r"got shape \[23, 5\]"):
            use(K[:, :5])
    for wrong, message in [
        (_set(K, float("nan"), 3, 1), r"nan at index \[3, 1\]; expected finite"),
        (tilted(K, 0.3).numpy(), "expected a symmetric matrix"),
    ]:
        with pytest.raises(Refused, match=message):
            use(wrong)


def test_a_gram_gives_what_its_tensor_gives():
    K, K_test = positive().float(), draw(5, N).float()
    G = Gram(K)
    assert torch.equal(spectrum(G).eigenvalues, spectrum(K).eigenvalues)
    assert torch.equal(spectrum(G, k=3).eigenvectors, spectrum(K, k=3).eigenvectors)
    assert alignment(G, Gram(positive(seed=1))) == alignment(K, positive(seed=1))
    assert effective_rank(G) == effective_rank(K)
    for machine in (HardMarginSVM(), KernelRidge(1.0), GaussianProcess(1.0), GradientFlow()):
        of_tensor = machine.fit(K, Y).predict(K_test)
        of_gram = machine.fit(G, Y).predict(K_test)
        if isinstance(machine, GaussianProcess):
            of_tensor, of_gram = of_tensor.mean, of_gram.mean
        assert torch.equal(of_tensor, of_gram)
    assert isinstance(KernelRidge(1.0).fit(Gram(K.numpy()), Y).alpha_, np.ndarray)
    torch.testing.assert_close(KernelRidge(1.0).fit(G, Y).predict(G), K.double() @ KernelRidge(1.0).fit(K, Y).alpha_)


def test_alignment_refuses_a_gram_of_other_points():
    with pytest.raises(Refused, match=r"K2_or_y: got shape \[5, 5\]; expected \[23, 23\]"):
        alignment(positive(), Gram(positive(5)))


def test_rounding_asymmetry_counts_as_its_symmetric_part():
    K = tilted(positive().float(), 5e-5)
    even = (K.double() + K.double().T) / 2
    assert not torch.equal(K.double(), even)
    assert torch.equal(KernelRidge(0.1).fit(K, Y).alpha_, KernelRidge(0.1).fit(even, Y).alpha_)
    assert torch.equal(spectrum(K).eigenvalues, spectrum(even).eigenvalues)
    torch.testing.assert_close(
        HardMarginSVM().fit(K, Y).alpha_, HardMarginSVM().fit(even, Y).alpha_, rtol=1e-9, atol=1e-12
    )


def test_machines_print_their_settings_and_status():
    assert repr(KernelRidge(0.5)) == "KernelRidge(ridge=0.5): not fitted"
    assert repr(KernelRidge(0.5).fit(positive(), Y)) == "KernelRidge(ridge=0.5): solved"
    assert repr(HardMarginSVM().fit(positive(), Y)) == "HardMarginSVM(tol=1e-06): optimal"
    assert repr(GaussianProcess(0.0).fit(torch.ones(N, N), Y)) == "GaussianProcess(noise=0.0): singular"
    assert repr(GradientFlow(lr=0.1)) == "GradientFlow(lr=0.1, momentum=0.0, loss=None, k=None): not fitted"
    loss = torch.nn.functional.mse_loss
    assert repr(GradientFlow(loss=loss)) == "GradientFlow(lr=None, momentum=0.0, loss=mse_loss, k=None): not fitted"


# ---------------------------------------------------------------------- identity


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def test_the_identity_of_values():
    K = positive()
    assert Gram(K).identity == Gram(K.clone()).identity == Gram(K.numpy()).identity
    assert (
        len({Gram(K).identity, Gram(2 * K).identity, Gram(K.float()).identity, Gram(_set(K, 9.0, 0, 0)).identity}) == 4
    )


def test_the_identity_of_a_kernel_and_its_data(monkeypatch):
    x = draw(5, 3)

    def identity(kernel, x=x, dtype=torch.float64):
        return Gram(torch.eye(5, dtype=dtype), kernel, x).identity

    def changed():
        model = network()
        with torch.no_grad():
            model[2].bias[1] += 1e-9
        return model

    frozen = network()
    frozen[0].weight.requires_grad_(False)
    smooth = network()
    smooth[1] = nn.Tanh()
    pick = lambda c: lambda y: y[:, c]
    different = [
        identity(ntkit.TangentKernel(network(), "trace")),
        identity(ntkit.TangentKernel(network(), "sum")),
        identity(ntkit.TangentKernel(network(), pick(0))),
        identity(ntkit.TangentKernel(network(), pick(1))),
        identity(ntkit.TangentKernel(network(), "trace", params=["0.weight"])),
        identity(ntkit.TangentKernel(changed(), "trace")),
        identity(ntkit.TangentKernel(frozen, "trace")),
        identity(ntkit.TangentKernel(smooth, "trace")),
        identity(ntkit.TangentKernel(network(), "trace"), x=x + 1e-9),
        identity(ntkit.TangentKernel(network(), "trace"), dtype=torch.float32),
        identity(ntkit.ConjugateKernel(network())),
        identity(ntkit.ConjugateKernel(network(), layer="0")),
        identity(ntkit.InfiniteKernel(network())),
        identity(ntkit.InfiniteKernel(network(), kind="nngp")),
        identity(ntkit.InfiniteKernel(network(), w_std=1.0, b_std=0.0)),
        identity(ntkit.SketchedKernel(network(), 16, outputs="trace")),
        identity(ntkit.SketchedKernel(network(), 16, seed=1, outputs="trace")),
    ]
    assert len(set(different)) == len(different)
    assert identity(ntkit.TangentKernel(network(), "trace", memory="1 GB")) == different[0]  # how, not what
    monkeypatch.setattr(ntkit, "__version__", "99")
    assert identity(ntkit.TangentKernel(network(), "trace")) not in different


@pytest.mark.parametrize(
    "make",
    [
        lambda m: ntkit.TangentKernel(m, "trace"),
        ntkit.ConjugateKernel,
        ntkit.InfiniteKernel,
        lambda m: ntkit.SketchedKernel(m, 16, outputs="trace"),
    ],
    ids=["tangent", "conjugate", "infinite", "sketched"],
)
def test_the_identity_does_not_change_with_use_but_with_training(make):
    x, model = draw(5, 3), network()
    kernel = make(model)
    before = Gram(torch.eye(5), kernel, x)
    first = before.identity
    kernel(x)
    assert Gram(torch.eye(5), kernel, x).identity == first
    with torch.no_grad():
        model[0].weight += 0.1
    assert Gram(torch.eye(5), kernel, x).identity != first
    assert before.identity == first


# ---------------------------------------------------------------------- memory

_PEAK = """
import torch
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import HardMarginSVM
from ntkit.measures.spectra import alignment, effective_rank
torch.set_num_threads(1)
peak = lambda: next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def uses(n):
    phi = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    K = torch.empty(n, n)
    for i in range(0, n, 100):
        K[i : i + 100] = phi[i : i + 100] @ phi.T
    y = torch.sign(phi[:, 0])
    before = peak()
    G = Gram(K)
    G @ torch.ones(n)
    alignment(G, y, centered=True), effective_rank(G), alignment(G, G)
    svm = HardMarginSVM().fit(K, y)
    svm.decision_function(K)
    return peak() - before
uses(300)  # libraries load and set up their work space
print(uses(6000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of one process is read from /proc")
def test_no_copy_of_a_large_matrix_is_made():
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    matrix = 4 * 6000**2
    # Blocks in use and work space take 10 to 40 MB whatever the size; a float32 copy of the matrix alone takes 144 MB.
    assert int(done.stdout) < matrix
