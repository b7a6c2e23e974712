"""What ``results.json`` holds, for the reports: descriptions that `ntkit.base.run_files.described` compares it with."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from ntkit.base.run_files import Number, Numbers

DRAWN = ("neighbors", "invariances", "explained", "gram-init", "gram-after", "gram-conjugate")
"""Stages of an analysis whose arrays its report draws."""


class ClaimResults(TypedDict):
    """A claim of a study."""

    claim: str
    number: str
    holds: bool | None
    how: str
    further: NotRequired[bool]


class StudyResults(TypedDict):
    """``results.json`` of a study: the keys that every study has."""

    title: str
    claims: NotRequired[list[ClaimResults]]
    sections: NotRequired[list[dict[str, Any]]]
    curves: NotRequired[list[dict[str, Any]]]
    runs: NotRequired[list[StudyRun]]
    settings: NotRequired[dict[str, Any]]
    terms: NotRequired[list[str]]
    figures: NotRequired[str]
    earlier_versions: NotRequired[list[dict[str, str]]]  # of software that may have computed some of the parts


class StudyRun(TypedDict):
    """A run that a study shows."""

    name: str
    track: str


class EstimateResults(TypedDict):
    """A number with its standard error, and what it comes from."""

    value: Number
    error: Number
    certificate: str


class MachineResults(TypedDict):
    """A machine of an analysis."""

    kernel: str
    label: str
    status: str
    advice: str
    train_error: EstimateResults
    test_error: EstimateResults
    ridge_test_error: EstimateResults
    ridge_train_error: NotRequired[EstimateResults]  # this and the next two: absent in runs of earlier versions
    ridge_status: NotRequired[str]
    ridge_residual: NotRequired[Number]
    confusion: NotRequired[list[list[int]]]
    gap: Number
    kkt: Number
    margin: Number | Numbers  # one per class
    support: int | list[int] | None
    n: int


class QualityResults(TypedDict):
    """Numbers of a kernel matrix of an analysis."""

    kernel: str
    label: str
    alignment: Number
    alignment_centered: Number
    effective_rank: Number
    trace: Number
    scale: Number
    pictured: NotRequired[list[int]]  # examples of each class in the picture of the matrix


class DataResults(TypedDict):
    """The data of an analysis."""

    name: str
    kind: str
    classes: list[str]
    train: int
    test: int
    input_shape: list[int]
    normalization: str
    source: str
    hash: str
    targets: NotRequired[TargetsResults]  # of a regression


class TargetsResults(TypedDict):
    """The targets of a regression; their means and deviations are those of the training set."""

    names: list[str]
    mean: list[float]
    deviation: list[float]


class ModelResults(TypedDict):
    """The network of an analysis."""

    name: str
    parameters: int
    outputs: int
    loss: str
    weights: str | None
    fallback: dict[str, Any]
    text: str


class TrainingResults(TypedDict):
    """The training of an analysis."""

    optimizer: str
    batch_size: int
    steps: int
    stop: str
    losses: Numbers
    seed: int


class AlongResults(TypedDict):
    """The kernel of an analysis along training: one entry per snapshot."""

    points: int
    steps: list[int]
    loss: Numbers
    eigenvalues: list[Numbers]
    residual: Number
    test_loss: NotRequired[Numbers]  # this and the next: absent in runs of earlier versions
    test_error: NotRequired[list[EstimateResults]]


class ProbeRows(TypedDict):
    """Rows of a table of an analysis."""

    rows: list[dict[str, Any]]


class InvarianceResults(ProbeRows):
    """Cosines of an analysis; those of different images, and examples, are absent in runs of earlier versions."""

    samples: NotRequired[int]
    different: NotRequired[dict[str, Any]]
    examples: NotRequired[list[dict[str, Any]]]


class SnapshotResults(TypedDict):
    """The kernel of an analysis at one snapshot."""

    step: int
    loss: Number
    network_error: EstimateResults
    status: str
    kernel_error: EstimateResults
    ridge_error: NotRequired[EstimateResults]  # absent in runs of earlier versions
    cosines: list[dict[str, Any]]
    different: dict[str, EstimateResults] | None  # None, like no cosines: the examples are no images


class LossResults(TypedDict):
    """The kernel of an analysis against the training loss."""

    points: int
    tests: int
    samples: int
    machine: NotRequired[str]  # whose error is drawn: "svm" or "ridge"; absent in runs of earlier versions
    snapshots: list[SnapshotResults]


class FirstOrderResults(TypedDict):
    """The first-order network beside the network, by snapshot; or, under ``absent``, why there is none."""

    absent: NotRequired[str]
    steps: NotRequired[list[int]]
    tests: NotRequired[int]
    distance: NotRequired[Numbers]
    test_loss: NotRequired[dict[str, Numbers]]
    test_error: NotRequired[dict[str, list[EstimateResults]]]  # not of a regression
    paired: NotRequired[dict[str, Any]]


class KernelOfLimit(TypedDict):
    """The network's kernel beside that of infinite width; or, under ``absent``, why there is none."""

    absent: NotRequired[str]
    samples: NotRequired[int]
    networks: NotRequired[int | None]  # None: in closed form
    error: NotRequired[Number]
    biased: NotRequired[bool]
    why: NotRequired[str]
    distance: NotRequired[Number]
    cosines: NotRequired[dict[str, Number]]
    notes: NotRequired[list[str]]


class LimitResults(TypedDict):
    """How far an analysis is from the limit of infinite width."""

    first_order: FirstOrderResults | None  # None: the weights were loaded
    kernel: KernelOfLimit


class ExplainedResults(TypedDict):
    """Some predictions of an analysis, explained; or, under ``unexplained``, why there are none."""

    unexplained: NotRequired[str]
    steps_shown: NotRequired[list[int]]
    accounting: NotRequired[dict[str, Any]]
    influence: NotRequired[dict[str, Any]]
    random_sets: NotRequired[int]
    points: NotRequired[list[dict[str, Any]]]
    quantity: NotRequired[str]  # what is explained, if not the margin


class CertificateResults(TypedDict):
    """A check of an analysis."""

    what: str
    value: Number
    tolerance: Number
    ok: bool


class ReproduceResults(TypedDict):
    """How to repeat an analysis."""

    command: str
    versions: dict[str, str]
    seed: int | None
    device: str
    dtype: str
    memory: int | None


class NetworkResults(TypedDict):
    """The network's own numbers in an analysis of data with classes."""

    train_error: EstimateResults
    test_error: EstimateResults
    train_loss: EstimateResults
    test_loss: EstimateResults
    fit: NotRequired[EstimateResults]  # this and the next two: absent in runs of earlier versions
    right: NotRequired[EstimateResults]
    confusion: NotRequired[list[list[int]]]


class PairedResults(TypedDict):
    """Errors of the after kernel's machine beside those of others, on the same test examples."""

    compared: list[dict[str, Any]]


class RegressionErrors(TypedDict):
    """Errors of a prediction of numbers, over all targets and of each."""

    r2: dict[str, Any]
    rmse: dict[str, Any]
    mae: dict[str, Any]
    targets: list[dict[str, Any]]


class RidgeResults(TypedDict):
    """Ridge regression on a kernel."""

    kernel: str
    label: str
    status: str
    advice: str
    ridge: Number
    edge: bool
    loo: Number
    residual: Number
    certificate: str
    n: int
    train: RegressionErrors
    test: RegressionErrors


class RegressionNetwork(TypedDict):
    """The network's own errors in a regression."""

    train_loss: EstimateResults
    test_loss: EstimateResults
    train: RegressionErrors
    test: RegressionErrors


class ComparisonResults(TypedDict):
    """Differences of squared errors on the same test examples, and predictions beside true values."""

    compared: list[dict[str, Any]]
    scatter: dict[str, Any]
    draws: int
    ridges: list[float]


class AnyAnalysis(TypedDict):
    """What ``results.json`` of `ntkit analyze` always holds."""

    format: int
    title: str
    data: DataResults
    model: ModelResults
    training: TrainingResults | None
    quality: list[QualityResults]
    similarity: dict[str, Number] | None
    along: AlongResults | None
    invariances: InvarianceResults | None
    against_loss: NotRequired[LossResults | None]  # absent in runs of earlier versions
    explained: NotRequired[ExplainedResults | None]  # absent in runs of earlier versions, like the next two
    limit: NotRequired[LimitResults | None]
    left_out: NotRequired[list[str]]
    neighbors: ProbeRows | None
    certificates: list[CertificateResults]
    reproduce: ReproduceResults
    files: NotRequired[dict[str, str]]
    run: NotRequired[str]


class AnalysisResults(AnyAnalysis):
    """``results.json`` of `ntkit analyze` on data with classes."""

    network: NetworkResults | None
    machines: list[MachineResults]
    comparisons: NotRequired[PairedResults | None]  # absent in runs of earlier versions


class RegressionResults(AnyAnalysis):
    """``results.json`` of `ntkit analyze` on data with targets."""

    network: RegressionNetwork
    machines: list[RidgeResults]
    comparisons: ComparisonResults | None


class ComparedRunResults(TypedDict):
    """A run in a comparison."""

    name: str
    folder: str
    group: int
    seed: int
    repeats: bool
    settings: dict[str, str]
    parameters: int
    steps: int | None
    stop: str | None
    errors: dict[str, Number]
    loss: dict[str, Number]
    alignment: dict[str, Number]
    effective_rank: dict[str, Number]
    spectrum: dict[str, dict[str, list] | None]
    along: dict[str, list] | None


class ComparedGroup(TypedDict):
    """Runs that differ in the seed alone."""

    label: str
    runs: list[int]
    seeds: int
    errors: dict[str, dict[str, Any] | None]
    alignment: dict[str, dict[str, Any] | None]


class DifferenceResults(TypedDict):
    """A test of a comparison: of two groups, or of two runs."""

    first: int
    second: int
    of: str
    difference: Number
    p: Number
    p_holm: Number


class ComparisonOfRuns(TypedDict):
    """``results.json`` of `ntkit compare`."""

    of: list[str]
    title: str
    data: dict[str, Any]
    test: dict[str, Any]
    machine: str
    settings: list[str]
    runs: list[ComparedRunResults]
    groups: list[ComparedGroup]
    over_seeds: list[DifferenceResults]
    between_runs: list[DifferenceResults]
    kernels: dict[str, Any]
    certificates: list[CertificateResults]
    versions: dict[str, Any]
    command: str
