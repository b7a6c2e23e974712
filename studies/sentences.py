"""Five papers, sentence by sentence: docs/papers.md and a table of the README, made from the committed results.

``python studies/sentences.py`` writes both.

A sentence of an abstract, in our words, names claims of a study by how their texts begin. It holds if all of these hold
that were tested, in part if some do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, README = ROOT / "studies" / "results", ROOT / "docs" / "papers.md", ROOT / "README.md"
BEGIN, END = "<!-- papers -->\n", "<!-- end of papers -->\n"
LINK = "https://github.com/ntkit/ntkit/blob/main/studies/results"


class Sentence(NamedTuple):
    """What a paper says, and the beginnings of the claims that test it."""

    text: str
    claims: tuple[str, ...]


CHECKS = (
    "Exact influence",
    "Surrogates solve",
    "Examples with a wrong label",
    "Eigenfunctions further down",
    "What else the decay",
    "Control:",
    "The after kernel’s machine is much",
)
"""Claims that are no sentence of an abstract: checks of a study, what the papers say elsewhere, the single cases of a
sentence that says "for some"."""

PAPERS: dict[str, tuple[str, str, list[Sentence]]] = {
    "jacot2018": (
        "Jacot, Gabriel & Hongler 2018, “Neural Tangent Kernel: Convergence and Generalization in Neural Networks”",
        "quick scale, MNIST; 10 to 1,000 trials each; the paper’s figure 1 at its width of 10,000, outputs at the "
        f"start up to 2,048 and training in function space up to 3,000 ([wider networks]({LINK}/jacot2018-paper/"
        "claims.md))",
        [
            Sentence(
                "At the start, wide networks are draws from a Gaussian process.",
                ("At the start outputs of wide", "Their covariance is", "They become normal"),
            ),
            Sentence(
                "In training the outputs follow the kernel gradient of the tangent kernel.",
                ("In training the network’s function follows", "In the limit of infinite width the kernel of that"),
            ),
            Sentence(
                "The kernel is central to how networks generalize.",
                ("So the limit’s kernel says how", "It is the tangent kernel that says so", "Test errors of wide"),
            ),
            Sentence(
                "Random at the start, changing in training, the kernel has an explicit limit and is constant there.",
                (
                    "The kernel of a random network tends",
                    "Wider networks’ kernels spread",
                    "The mean of the kernel at",
                    "The kernel inflates",
                    "At the start the kernel is random",
                    "Along training the kernel is constant",
                ),
            ),
            Sentence(
                "Whether training converges is a question of the limit’s positive definiteness.",
                (
                    "On the circle the limit is positive",
                    "A positive definite kernel makes",
                    "In wide networks the residual",
                    "Where the kernel is singular",
                ),
            ),
            Sentence(
                "In least squares, outputs follow a linear differential equation.",
                (
                    "In least squares wide networks follow",
                    "Narrow networks agree with it",
                    "Wide networks after training",
                ),
            ),
            Sentence(
                "Learning is fastest along the largest principal components, which is a reason for early stopping.",
                (
                    "Every leading component",
                    "Learning is fastest along",
                    "Along a principal component learning",
                    "What is learned late",
                ),
            ),
            Sentence(
                "Wide networks behave as the limit says: the paper’s own figures.",
                (
                    "The top eigenvalues are",
                    "The first component is almost",
                    "With β = 1 the gap",
                    "What is learned beside the component",
                    "Narrower networks converge",
                ),
            ),
        ],
    ),
    "kopitkov2019": (
        "Kopitkov & Indelman 2020, “Neural Spectrum Alignment: Empirical Study”",
        "quick scale, 5 seeds",
        [
            Sentence(
                "In practice the kernel changes dramatically along training.",
                ("The kernel changes dramatically",),
            ),
            Sentence(
                "It changes meaningfully: its top eigenfunctions align with the function that is learned.",
                (
                    "The top eigenfunctions turn to",
                    "They turn to it more",
                    "Deeper networks align",
                    "The residual leaves",
                ),
            ),
            Sentence(
                "The top eigenfunctions span the outputs during the whole optimization.",
                ("The top eigenfunctions span",),
            ),
            Sentence(
                "Learning along top eigenfunctions is fast, so that alignment improves the optimization.",
                (
                    "Learning along the top",
                    "Each eigenfunction is learned",
                    "The change of the kernel improves",
                    "Its new directions alone",
                ),
            ),
            Sentence(
                "A decay of the learning rate has its own trends in the spectrum.",
                ("At a constant learning rate", "After a decay"),
            ),
        ],
    ),
    "long2021": (
        "Long 2021, “Properties of the After Kernel”",
        "the paper’s scale, as far as it is computed: MNIST 3 and 8, CIFAR-10 cats and dogs, an MLP and a VGG-like net "
        "each; CIFAR-10 airplanes and automobiles, an MLP; 5 seeds each",
        [
            Sentence(
                "For some pairs of data and network the after kernel’s machine is much more accurate.",
                ("For some pairs of data and network",),
            ),
            Sentence("For VGG-like networks the after kernel is more global.", ("The after kernel is more global",)),
            Sentence("For fully connected networks it is less global.", ("The after kernel is less global",)),
            Sentence("It is more invariant to small shifts, rotations and zooms.", ("It is more invariant to small",)),
            Sentence("Augmenting the data does not add to these invariances.", ("Augmentation does not",)),
            Sentence(
                "The conjugate kernel is sometimes, but not always, a good approximation.",
                ("Conjugate kernel in place", "The conjugate kernel is sometimes"),
            ),
            Sentence("A larger learning rate makes a better kernel at equal loss.", ("A larger learning rate",)),
            Sentence("Its after kernels are more global and more invariant.", ("and a more",)),
        ],
    ),
    "bell2023": (
        "Bell, Geyer, Glickenstein, Fernandez & Moore 2023, “An Exact Kernel Equivalence for Finite Classification "
        "Models”",
        "quick scale, digits and MNIST, 5 seeds; the larger network also at the paper’s scale "
        f"([three seeds]({LINK}/bell2023-paper/claims.md))",
        [
            Sentence(
                "A model trained by gradient descent is exactly a kernel machine.",
                (
                    "A model trained by gradient descent",
                    "Kernel prediction against",
                    "The kernel of each step is",
                    "The paper’s own integral",
                ),
            ),
            Sentence(
                "The tangent kernel and other path kernels only approximate it.",
                (
                    "The tangent kernel errs by",
                    "Path kernels by one point",
                    "The path kernel by one point per",
                    "The path kernel of gradient flow",
                ),
            ),
            Sentence(
                "The kernel can be computed for realistic networks up to machine precision.",
                ("On images only many integration", "The kernel of a realistic", "In single precision"),
            ),
            Sentence(
                "It says something about predictions and how networks generalize.",
                (
                    "The kernel machine draws",
                    "The posterior of the representation’s",
                    "The posterior knows something of the network’s errors that the distance",
                    "Predictions rest on many",
                    "Within the class the nearer",
                ),
            ),
        ],
    ),
    "tsai2023": (
        "Tsai, Yeh & Ravikumar 2023, “Sample based Explanations via Generalized Representers”",
        "quick scale, three image and two text sets",
        [
            Sentence("With one kernel, tracking is the best importance.", ("With one kernel, tracking",)),
            Sentence(
                "With one importance, the tangent kernel and the influence kernel beat the last layer.",
                ("With one importance, the tangent",),
            ),
            Sentence("The new combination beats existing methods.", ("The new combination beats",)),
        ],
    ),
}


def claims_of(study: str) -> list[dict]:
    """Claims of the paper itself, as the committed results have them."""
    file = RESULTS / study / "results.json"
    claims = json.loads(file.read_text(encoding="utf-8"))["claims"] if file.exists() else []
    return [claim for claim in claims if not claim.get("further") and not claim["claim"].startswith("Not in the paper")]


def tested(sentence: Sentence, claims: list[dict]) -> list[dict]:
    """The claims that test a sentence and were judged."""
    return [c for c in claims if c["claim"].startswith(sentence.claims) and c["holds"] is not None]


def named(claim: str, sentence: Sentence) -> str:
    """A claim in short: where all claims of a sentence say the same of several cases, the case."""
    case = claim.rpartition(": ")[2] if len(sentence.claims) == 1 else claim
    return case.replace("|", "\\|")


def where(claim: dict) -> str:
    """The training losses at which a claim about all of them holds, where it does not hold at every one.

    >>> where({"holds": False, "number": "at loss 0.03, 0.01 only. By loss: 0.1: +0.00"})
    'at loss 0.03, 0.01 only'
    """
    found = re.match(r"at loss [\d., ]+ only", claim["number"])
    return found[0] if found and not claim["holds"] else ""


def verdict(judged: list[dict]) -> str:
    """Of the claims of one sentence.

    >>> [verdict([{"holds": h, "number": "1"} for h in holds]) for holds in ([True], [True, False], [False], [])]
    ['holds', 'holds in part', 'does not hold', 'not judged yet']
    """
    if not judged:
        return "not judged yet"
    if all(c["holds"] for c in judged):
        return "holds"
    return "holds in part" if any(c["holds"] or where(c) for c in judged) else "does not hold"


def table(study: str) -> list[str]:
    """Lines of one paper."""
    title, scale, sentences = PAPERS[study]
    claims = claims_of(study)
    lines = [f"## {title}", "", f"[All numbers]({LINK}/{study}/claims.md): {scale}.", ""]
    lines += ["| what it says | here | claims that hold | those that do not |", "|---|---|---|---|"]
    for sentence in sentences:
        judged = tested(sentence, claims)
        held = sum(c["holds"] for c in judged)
        failures = [c for c in judged if not c["holds"]]
        short = [named(c["claim"], sentence) for c in failures]
        if len(set(short)) < len(short):  # two claims about one case
            short = [c["claim"] for c in failures]
        failed = "; ".join(name + f" ({where(c)})" * bool(where(c)) for name, c in zip(short, failures, strict=True))
        lines.append(f"| {sentence.text} | {verdict(judged)} | {held} of {len(judged)} | {failed} |")
    return [*lines, ""]


def page() -> str:
    """The text of docs/papers.md."""
    verdicts = [verdict(tested(s, claims_of(study))) for study, (_, _, told) in PAPERS.items() for s in told]
    counts = {name: verdicts.count(name) for name in ("holds", "holds in part", "does not hold", "not judged yet")}
    several = {"holds": "hold", "holds in part": "hold in part", "does not hold": "do not hold"}
    words = {name: (name, several.get(name, name)) for name in counts} | {
        "not judged yet": ("is not judged yet", "are not judged yet")
    }
    said = ", ".join(f"{count} {words[name][count > 1]}" for name, count in counts.items() if count)
    lines = [
        "# Five papers, sentence by sentence",
        "",
        f"What the abstracts say, in our words, and what came out: of {len(verdicts)} sentences {said}. Each is tested "
        "by claims with intervals and conditions that can fail; `ntkit study NAME` computes them. A difference counts "
        "beyond two standard errors or more, of few seeds as many as Student’s test takes at the same level (2.9 of "
        "five, 14 of two). A sentence holds in part where some of its claims fail, or hold at some training losses "
        "only; these are named. This page is made from the committed results (`python studies/sentences.py`).",
        "",
    ]
    for study in PAPERS:
        lines += table(study)
    return "\n".join(lines).rstrip() + "\n"


def summary() -> str:
    """The table of the README: how many sentences of each abstract hold."""
    verdicts = ("holds", "holds in part", "does not hold", "not judged yet")
    lines = ["| sentences of | hold | hold in part | do not hold | not judged yet |", "|---|---|---|---|---|"]
    for study, (title, _, sentences) in PAPERS.items():
        told = [verdict(tested(sentence, claims_of(study))) for sentence in sentences]
        counts = " | ".join(str(told.count(name)) for name in verdicts)
        lines.append(f"| [{title.partition(', “')[0]}]({LINK}/{study}/claims.md) | {counts} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The text of the README, with the table as the results give it."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + summary() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
