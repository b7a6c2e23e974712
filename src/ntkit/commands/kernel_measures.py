"""The measurements of `ntkit analyze` on kernel matrices: spectrum, alignment, machines, and their comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.base.checks import defined
from ntkit.commands.network_measures import confusion, finite, number, rate, spread
from ntkit.data import Data
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import HardMarginSVM, KernelRidge
from ntkit.measures.spectra import alignment, effective_rank

RIDGE = 1e-4  # of kernel ridge regression, relative to the kernel's mean diagonal
PICTURED = 100  # examples in the picture of a kernel matrix, at most


def quality(K: Tensor, targets: Tensor, y: Tensor) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers of one train x train kernel; all its eigenvalues, and a picture of it.

    The picture holds the cosines of at most `PICTURED` examples, in the order of their labels or of the first target.
    """
    gram = Gram(K)
    trace = float(gram.diagonal().sum())
    result: dict[str, Any] = {
        "alignment": defined(alignment, gram, targets),
        "alignment_centered": defined(alignment, gram, targets, centered=True),
        "effective_rank": defined(effective_rank, gram),
        "trace": trace,
        "scale": trace / len(K),
    }
    order = y.reshape(len(y), -1)[:, 0].argsort(stable=True)
    rows = order[spread(len(order), PICTURED)]
    eigenvalues = torch.linalg.eigvalsh(K.double()).flip(0)
    picture = cosine_matrix(K[rows][:, rows])
    if not y.is_floating_point():
        result["pictured"] = torch.bincount(y[rows], minlength=int(y.max()) + 1).tolist()
    return result, {"eigenvalues": eigenvalues.numpy(), "picture": picture.float().numpy(), "pictured": rows.numpy()}


def cosine_matrix(K: Tensor) -> Tensor:
    """K_ij / sqrt(K_ii K_jj), float64; NaN where a diagonal entry is 0."""
    root = K.diagonal().double().sqrt()
    return K.double() / torch.where(root > 0, root, torch.nan).outer(torch.where(root > 0, root, torch.nan))


def machine(K: Tensor, K_test: Tensor, data: Data) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hard-margin SVM, and ridge regression beside it, on one kernel: numbers with their certificates, and arrays."""
    gram = Gram(K)
    svm = HardMarginSVM().fit(gram, data.y_train)
    gap = finite(float(svm.gap_))
    certificate = f"SVM {svm.status_}, relative gap {gap:.1e}" if gap is not None else f"SVM {svm.status_}"
    errors, arrays, confused = {}, {}, None
    for part, values, y in (("train", K, data.y_train), ("test", K_test, data.y_test)):
        wrong = torch.as_tensor(svm.predict(values)).to(y) != y
        entry = rate(wrong, f"{part} examples")
        if svm.status_ == "not separable":  # then there is no separator whose error could be reported
            entry |= {"value": None, "error": None}
        elif part == "test":
            arrays["wrong"] = wrong.numpy()
            confused = confusion(torch.as_tensor(svm.predict(values)), y, len(data.classes))
        entry["certificate"] = f"{certificate}; {entry['certificate']}"
        errors[f"{part}_error"] = entry
    ridge, ridge_wrong, confused_by_ridge = _ridge_errors(gram, K, K_test, data)
    arrays |= {"ridge_wrong": ridge_wrong} if ridge["ridge_status"] == "solved" else {}  # else its answers mean nothing
    alpha = np.asarray(svm.alpha_, dtype=np.float64)
    # In units of the features' root mean square norm: a kernel times four has twice the margin and is no better.
    margin = np.asarray(svm.margin_, dtype=np.float64) / float(gram.diagonal().mean()) ** 0.5
    result = {
        "status": svm.status_,
        "advice": svm.advice_,
        **errors,
        **ridge,
        "confusion": confused or confused_by_ridge,
        "gap": gap,
        "kkt": finite(float(svm.kkt_)),
        "margin": [finite(m) for m in margin.tolist()] if margin.ndim else finite(float(margin)),
        "support": int((alpha.reshape(len(alpha), -1) > 0).any(1).sum()),
        "n": len(K),
    }
    decision = np.asarray(svm.decision_function(K_test), dtype=np.float64)
    return result, {**arrays, "alpha": alpha, "decision": decision}


def _ridge_errors(
    gram: Gram, K: Tensor, K_test: Tensor, data: Data
) -> tuple[dict[str, Any], np.ndarray, list[list[int]]]:
    """Errors of kernel ridge regression on one-hot targets minus their mean; wrong answers, confusion on test examples.

    The largest output is the class.
    """
    ridge = RIDGE * float(gram.diagonal().mean())
    targets = F.one_hot(data.y_train, len(data.classes)).double()
    machine = KernelRidge(ridge).fit(gram, targets - targets.mean(0))
    residual = finite(float(machine.residual_))
    result: dict[str, Any] = {"ridge_status": machine.status_, "ridge_residual": residual}
    wrong, predicted = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    for part, values, y in (("train", K, data.y_train), ("test", K_test, data.y_test)):
        predicted = (torch.as_tensor(machine.predict(values)) + targets.mean(0)).argmax(1)
        wrong = predicted.to(y) != y
        entry = rate(wrong, f"{part} examples")
        entry["certificate"] = f"{machine.status_}, residual {float(machine.residual_):.0e}"
        result[f"ridge_{part}_error"] = entry | ({} if machine.status_ == "solved" else {"value": None, "error": None})
    return result, wrong.numpy(), confusion(predicted, data.y_test, len(data.classes))


def comparisons(wrong: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Test errors of the after kernel's machine beside those of others, on the same test examples.

    Parameters
    ----------
    wrong : by "network" and kernel: wrong answers [m] of the network (``wrong``), of the hard-margin SVM (``wrong``,
        absent where there is none) and of ridge regression (``ridge_wrong``).

    Returns
    -------
    dict
        Per comparison the machines (ridge regression on both kernels unless both separate the classes), how many
        examples one alone gets wrong, the difference of the errors with its standard error, and the p value of
        McNemar's exact test: that of the two counts, if each example were as likely to be in either.
    """
    compared = []
    for other in ("init", "conjugate", "network"):
        if other not in wrong or "after" not in wrong:
            continue
        machine = "svm" if all("wrong" in wrong[key] for key in ("after", other)) else "ridge"
        key = "wrong" if machine == "svm" else "ridge_wrong"
        keys = {"after": key, other: "wrong" if other == "network" else key}
        if any(of not in wrong[who] for who, of in keys.items()):
            continue
        ours, theirs = (wrong[who][of].astype(bool) for who, of in keys.items())
        compared.append({"with": other, "machine": machine, **paired(ours, theirs)})
    return {"compared": compared}


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Difference of two error rates on the same examples, with McNemar's exact test.

    >>> paired(np.array([True, False, False, False]), np.array([False, True, True, False]))["p"]
    1.0
    """
    from scipy.stats import binomtest

    n, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    differ = only_first + only_second
    difference = (only_first - only_second) / n
    return {
        "examples": n,
        "only_after": only_first,
        "only_other": only_second,
        **number(difference, ((differ / n - difference**2) / n) ** 0.5, f"pairs of {n:,} test examples"),
        "p": float(binomtest(only_first, differ).pvalue) if differ else 1.0,
    }


def similarity(grams: dict[str, Tensor | None]) -> dict[str, float | None]:
    """Alignment between the train x train kernels, None where one of them is absent."""
    result: dict[str, float | None] = {}
    for a, b in (("init", "after"), ("after", "conjugate"), ("init", "conjugate")):
        first, second = (None if (K := grams[key]) is None else Gram(K) for key in (a, b))
        both = first is not None and second is not None
        result[f"{a}_{b}"] = defined(alignment, first, second) if both else None
        result[f"{a}_{b}_centered"] = defined(alignment, first, second, centered=True) if both else None
    return result
