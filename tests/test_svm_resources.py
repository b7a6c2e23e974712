"""What the hard-margin SVM takes: matrices in files where they lie, memory, threads."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from streamed_gram import LargestTensor, StreamedGram

from ntkit.base.operation_threads import limited
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import HardMarginSVM, svm, working_set


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_in_a_file_is_read_where_it_lies(tmp_path, mode, dtype):
    x = torch.randn(700, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(700) % 2
    x[torch.arange(700), y] += 9.0  # far from the boundary
    K = (x @ x.T).numpy().astype(dtype)
    K.tofile(tmp_path / "K")
    mapped = np.memmap(tmp_path / "K", dtype, mode, shape=K.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram = Gram(mapped)
        svm = HardMarginSVM().fit(mapped, y)
    assert gram._values.data_ptr() == mapped.ctypes.data
    np.testing.assert_array_equal(svm.alpha_, HardMarginSVM().fit(K, y).alpha_)
    assert isinstance(svm.alpha_, np.ndarray)
    np.testing.assert_array_equal(svm.predict(mapped), y)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "K", dtype).reshape(K.shape), K)


_LIMITED = """
import resource, sys
import numpy as np, torch
from ntkit.machines import HardMarginSVM
torch.set_num_threads(1)
n = 5000
phi = np.random.default_rng(0).integers(-9, 9, (n, 8)).astype(np.float32)  # integers: K has no rounding
phi[:, 0] += 9 * np.sign(phi[:, 0]) + 1
K = np.memmap(sys.argv[1], np.float32, "w+", shape=(n, n))
for i in range(0, n, 100):
    K[i : i + 100] = phi[i : i + 100] @ phi.T
K.flush()
y = phi[:, 0] > 0
HardMarginSVM().fit((phi[:600] @ phi[:600].T), y[:600])  # libraries load and set up their work space
K = np.memmap(sys.argv[1], np.float32, "r", shape=(n, n))
used = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + n * n, -1))  # a quarter of K
svm = HardMarginSVM().fit(K, y)
print(svm.status_, svm.gap_ <= 1e-6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on anonymous memory is Linux's")
def test_a_matrix_in_a_file_takes_a_quarter_of_its_size_in_memory_at_most(tmp_path):
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(tmp_path / "K")], capture_output=True, text=True)
    assert done.stdout == "optimal True\n", done.stderr


def test_operations_run_in_one_thread_each(threads, monkeypatch):
    """On a busy machine threads within many small operations wait for each other: a fit took ten times as long."""
    threads(2)
    seen = []

    def solve(*args):
        seen.append(limited())
        return working_set.solve_duals(*args)

    monkeypatch.setattr(svm, "solve_duals", solve)
    K = torch.eye(4, dtype=torch.float64)
    HardMarginSVM().fit(K, [0, 1, 1, 0])
    assert seen == [True]
    assert torch.get_num_threads() == 2


def test_values_do_not_depend_on_the_number_of_workers(threads):
    g = torch.Generator().manual_seed(0)
    phi = torch.randn(700, 900, generator=g, dtype=torch.float64)
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append(HardMarginSVM().fit(phi @ phi.T, torch.arange(700) % 4).alpha_)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class RowsRead(StreamedGram):
    """Products are those of any Gram, from rows, which are counted; nothing else is there."""

    _product = Gram._product


def test_it_reads_rows_which_all_classes_share():
    n = 2003
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0].sign() + x[:, 1].sign()).long()  # three classes
    K = torch.exp(-torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / 6).float()

    def fitted(labels):
        gram = RowsRead(K)
        with LargestTensor(K) as largest:
            machine = HardMarginSVM().fit(gram, labels)
        assert machine.status_ == "optimal"
        assert largest.numbers <= 2**18 < n * n / 15  # one block of rows
        assert gram.most_rows <= 2**18 // n
        return gram.entries_read / n**2, machine

    alone = [fitted(y == c)[0] for c in y.unique()]
    together, machine = fitted(y)
    support = {int(i) for one in machine.support_ for i in one}
    assert len(support) / n <= together <= 0.9 * sum(alone)
    assert max(alone) <= together <= 2.5  # passes over the matrix, for the whole fit
    assert torch.equal(machine.predict(RowsRead(K)), y)  # its own points, in strips
