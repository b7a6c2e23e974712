"""Damaged files: refused by name, or computed again with the same numbers; never other numbers, no traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from damage_case import (
    DAMAGE,
    PAGES,
    QUICK,
    SLOW,
    STUDY,
    X,
    Y,
    another,
    build_sample,
    cut,
    decompose_again,
    digit,
    files_of,
    flip,
    gone,
    looped,
    mse,
    net,
    outcome,
    read_report,
    read_tracked,
    read_trajectory,
    resume_analysis,
    same,
    trained,
)
from run_folders import as_an_earlier_version_wrote
from safetensors.torch import save_file

import ntkit
from ntkit.base.checks import Damaged, Refused
from ntkit.base.files import read_json, write_arrays, write_json, write_page
from ntkit.base.integrity import WithoutChecksum, sealed_json, stored_checksum
from ntkit.cli import main
from ntkit.commands.verify import summary, verify
from ntkit.report import render
from ntkit.tracking import Tracked
from ntkit.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("short_pages")
DRAWS = int(os.environ.get("NTKIT_FUZZ", "80").partition(":")[0])


@pytest.fixture(scope="module")
def sample(tmp_path_factory, short_pages) -> Path:
    return build_sample(tmp_path_factory.mktemp("sample") / "made")


@pytest.fixture
def copy(sample, tmp_path) -> Path:
    shutil.copytree(sample, tmp_path / "copy")
    return tmp_path / "copy"


# --- the files themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{}, {"a": 1.5, "b": [None, "x"]}, [1, 2], {"value": 3}, None, "text"])
def test_json_comes_back_without_its_checksum(value, tmp_path):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text())["checksum"].startswith("sha256:")


def test_every_byte_of_every_kind_of_file_is_covered(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1, "b": "text"})
    write_page(tmp_path / "a.html", "<html>é</html>")
    write_arrays(tmp_path / "a.safetensors", {"a": np.arange(3.0)}, {"step": 3})
    for file in sorted(tmp_path.iterdir()):
        blob = file.read_bytes()
        assert stored_checksum(file, blob)
        for place in range(len(blob)):
            for bit in range(8):
                changed = bytearray(blob)
                changed[place] ^= 1 << bit
                with pytest.raises(Damaged):
                    stored_checksum(file, bytes(changed))


def test_numbers_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON"):
        write_json(tmp_path / "a.json", [float("nan")])
    for text in ("NaN", "[-Infinity]", "1e400", "1" * 5000, "[" * 100000, "{", "\ud800"):
        (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(Damaged, match=r"a\.json: got a damaged file"):
            read_json(tmp_path / "a.json")


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(Refused, match="got a pipe"):
        Trajectory.open(tmp_path)


def test_the_users_own_weights_need_no_checksum_but_ours_is_checked(copy):
    model = net()
    save_file(model.state_dict(), copy / "own.safetensors")
    ntkit.load_weights(model, copy / "own.safetensors")
    snapshot = copy / "trained" / "snapshots" / "step-00000008.safetensors"
    ntkit.load_weights(model, snapshot)
    flip(snapshot, [], random.Random(0))
    with pytest.raises(Refused, match="step-00000008"):
        ntkit.load_weights(model, snapshot)


# --- every kind of file, every damage, every quick reader ------------------------------------------------------


@pytest.mark.parametrize("kind", QUICK)
def test_no_damaged_file_gives_other_numbers(sample, copy, kind):
    whole = {read: outcome(read, sample / kind) for read in QUICK[kind]}
    assert not any(isinstance(found, Refused) for found in whole.values())
    draw, folder, everything = random.Random(kind), copy / kind, files_of(sample)
    refused: Counter[str] = Counter()
    for file in files_of(folder):
        blob = file.read_bytes()
        for damage in DAMAGE:
            damage(file, everything, draw)
            name = file.relative_to(folder).as_posix()
            listed = {r.file: r for r in verify(folder)} if file.suffix != ".npy" else {}
            if damage is another:  # which file is the wrong one nobody can say; of a page no file speaks
                bad = any(record.status in ("damaged", "missing") for record in listed.values())
                assert bad or file.suffix in PAGES, (name, damage.__name__)
            elif file.name in ("track.html", "claims.md") and damage is gone:
                pass  # written on request; by no earlier version
            elif file.name not in ("run.json", "track.json") or damage is not gone:  # without it the folder is another
                assert listed[name].status in ("damaged", "missing"), (name, damage.__name__)
            for read in QUICK[kind] if read_report not in QUICK[kind] or file.suffix not in PAGES else ():
                if read is read_report and damage not in (flip, another, gone):
                    continue
                found = outcome(read, folder)
                if isinstance(found, Refused):
                    assert "\n" not in str(found)
                    assert file.name in str(found) or (damage in (gone, another) and copy.name in str(found)), found
                    refused[name] += 1
                else:
                    assert same(found, whole[read]), (name, damage.__name__, read.__name__)
            file.write_bytes(blob)
    if read_trajectory in QUICK[kind]:
        assert len(refused) == len(files_of(folder)), "a file that no reader checks"


def test_results_that_are_a_stage_of_the_same_run_are_noticed(sample, copy):
    for stage in sorted((sample / "run" / "stages").glob("*.json")):
        (copy / "run" / "results.json").write_bytes(stage.read_bytes())
        assert {r.file: r.status for r in verify(copy / "run")}["results.json"] == "damaged"


# --- computed again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("stages/gram-after.json", "This stage is computed again"),
        ("arrays/machine-after.safetensors", "This stage is computed again"),
        ("work/after-test.npy", "It is computed again"),
        ("trajectory/snapshots/step-00000002.safetensors", "starts from the beginning"),
        ("trajectory/losses.safetensors", "starts from the beginning"),
        ("trajectory/run.json", "The network is trained again"),
    ],
)
@pytest.mark.parametrize("damage", [flip, gone])
def test_an_analysis_makes_what_is_damaged_again(sample, copy, place, said, damage, recwarn):
    file, lines = copy / "unfinished" / place, []
    before = file.read_bytes()
    damage(file, [], random.Random(1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ntkit.analyze(from_run=copy / "unfinished", say=lines.append)
    lines += [str(w.message) for w in recwarn]
    if damage is flip or ("stages" not in place and "run.json" not in place):  # an absent one was never there
        assert any(file.name in line and said in line for line in lines), lines
    assert not file.exists() if "work" in place else file.read_bytes() == before
    assert (copy / "unfinished" / "results.json").read_bytes() == (sample / "run" / "results.json").read_bytes()
    assert {record.status for record in verify(copy / "unfinished")} == {"ok"}


def test_a_snapshot_damaged_while_the_analysis_runs_is_not_a_measure_that_is_absent(copy, monkeypatch):
    from ntkit.commands import network_measures

    measure = network_measures.along

    def damaging(*args):
        flip(copy / "new" / "trajectory" / "snapshots" / "step-00000001.safetensors", [], random.Random(1))
        return measure(*args)

    monkeypatch.setattr(network_measures, "along", damaging)
    from damage_case import SETTINGS

    with pytest.raises(Refused, match=r"step-00000001\.safetensors: got a damaged file"):
        ntkit.analyze(SETTINGS, out=copy / "new")
    assert not (copy / "new" / "results.json").exists()
    assert not (copy / "new" / "stages" / "along.json").exists()


def test_results_of_a_complete_run_are_put_together_again_from_its_stages(sample, copy):
    file = copy / "run" / "results.json"
    digit(file, [], random.Random(2))
    lines = []
    ntkit.analyze(from_run=copy / "run", say=lines.append)
    assert "results.json: got a damaged file" in lines[0]
    assert file.read_bytes() == (sample / "run" / "results.json").read_bytes()
    assert not [line for line in lines if line.startswith("[") and "training" not in line]  # no stage was repeated


def test_a_snapshot_that_was_tracked_is_measured_again(copy):
    from ntkit.commands.settings import TrackSettings
    from ntkit.commands.track import track_run

    place = copy / "run" / "track"
    whole, again = read_tracked(place), TrackSettings(points=6, k=2)
    for kind in ("json", "safetensors"):
        flip(place / f"step-00000002.{kind}", [], random.Random(3))
        with pytest.raises(Refused, match=rf"step-00000002\.{kind}"):
            Tracked.open(place)
        lines = []
        with pytest.warns(UserWarning, match=rf"step-00000002\.{kind}.*measured again"):
            track_run(copy / "run", again, say=lines.append)
        assert len(lines) == 3  # titles, one row, the report
        assert same(read_tracked(place), whole)
    flip(copy / "run" / "trajectory" / "snapshots" / "step-00000004.safetensors", [], random.Random(3))
    with pytest.raises(Refused, match=r"snapshots/step-00000004\.safetensors"):
        track_run(copy / "run", again, say=lines.append)


def test_a_training_starts_again_only_from_its_own_beginning(copy):
    killed = copy / "killed"
    shutil.copytree(killed, copy / "second")
    flip(killed / "checkpoint.safetensors", [], random.Random(4))
    flip(copy / "second" / "snapshots" / "step-00000002.safetensors", [], random.Random(4))
    other = net(5)
    with torch.no_grad():
        other[0].weight.add_(1)
    for folder in (killed, copy / "second"):
        args = ((X, Y), mse, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
        with pytest.raises(Refused, match="Or pass the network that the run was started with"):
            ntkit.train(other, *args, steps=8, batch_size=4, path=folder, resume=True)
        with pytest.warns(UserWarning, match="got a damaged file.*This run starts from the beginning"):
            trained(folder, resume=True)
        for file in files_of(copy / "trained"):
            assert (folder / file.relative_to(copy / "trained")).read_bytes() == file.read_bytes()


def test_a_loop_and_a_study_and_a_decomposition_go_on(copy):
    flip(copy / "broken" / "log" / "00000000.safetensors", [], random.Random(5))
    with pytest.warns(UserWarning, match=r"00000000\.safetensors.*starts from the beginning"):
        looped(copy / "broken", resume=True)
    assert same(read_trajectory(copy / "broken"), read_trajectory(copy / "loop"))
    cut(copy / "studying" / "parts" / "loss-0.json", [], random.Random(5))
    said = []
    STUDY.run("quick", copy / "studying", said.append)
    assert "loss-0.json: got a damaged file" in said[0]
    assert (copy / "studying" / "results.json").read_bytes() == (copy / "study" / "results.json").read_bytes()
    whole = decompose_again(copy / "decomposition")
    flip(copy / "decomposition" / "decomposition.safetensors", [], random.Random(5))
    with pytest.warns(UserWarning, match=r"decomposition\.safetensors.*computed again"):
        assert decompose_again(copy / "decomposition") == whole


def test_a_file_of_another_run_or_step_is_found(copy):
    """Complete files, with a right checksum, in the wrong place."""
    ntkit.train(
        net(), (X, -Y), mse, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), 8, batch_size=4, path=copy / "other"
    )
    shots, name = copy / "trained" / "snapshots", "step-00000004.safetensors"
    shutil.copy(copy / "other" / "snapshots" / name, shots / name)
    with pytest.raises(Refused, match=f"{name}: got a damaged file: a file of another run"):
        Trajectory.open(copy / "trained").state(4)
    shutil.copy(shots / "step-00000003.safetensors", shots / name)
    with pytest.raises(Refused, match=f"{name}: got a damaged file: a file of another step"):
        Trajectory.open(copy / "trained").state(4)
    shutil.copy(copy / "other" / "losses.safetensors", copy / "trained" / "losses.safetensors")
    with pytest.raises(Refused, match=r"losses\.safetensors: got a damaged file: a file of another run"):
        _ = Trajectory.open(copy / "trained").losses


# --- folders of an earlier version -----------------------------------------------------------------------------


def test_a_folder_without_checksums_is_read_with_one_warning(sample, copy, recwarn):
    as_an_earlier_version_wrote(copy / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trajectory = Trajectory.open(copy / "run" / "trajectory")
        states = [trajectory.state(step) for step in trajectory.steps]
        tracked = Tracked.open(copy / "run" / "track")
        page = render(copy / "run")
    assert [w.category for w in caught] == [WithoutChecksum]
    assert f"{copy / 'run'} has files without checksums" in str(caught[0].message)
    whole = Trajectory.open(sample / "run" / "trajectory")
    for step, state in zip(trajectory.steps, states, strict=True):
        assert all(torch.equal(tensor, whole.state(step)[name]) for name, tensor in state.items())
    assert same(tracked.series, Tracked.open(sample / "run" / "track").series)
    assert page.read_bytes() == (sample / "run" / "report.html").read_bytes()
    statuses = Counter(record.status for record in verify(copy / "run"))
    assert statuses == {"without checksum": statuses.total() - 1, "ok": 1}  # the page was written again


def test_an_earlier_run_that_was_killed_goes_on(copy):
    as_an_earlier_version_wrote(copy / "killed")
    with pytest.warns(WithoutChecksum):
        run = trained(copy / "killed", resume=True)
    assert same(read_trajectory(copy / "trained"), outcome(read_trajectory, run.path))


def test_the_command_line_warns_in_one_line(copy, capsys, monkeypatch):
    as_an_earlier_version_wrote(copy / "run")
    monkeypatch.setattr("sys.argv", ["ntkit", "report", str(copy / "run")])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, None)
    printed = [line for line in capsys.readouterr().err.splitlines() if "Cyclopts" not in line]  # it sees pytest
    assert len(printed) == 1
    assert printed[0].startswith(f"ntkit: warning: {copy / 'run'} has files without checksums")


# --- ntkit verify ----------------------------------------------------------------------------------------------


def run_cli(*words, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["ntkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.filterwarnings("ignore:Cyclopts")  # it sees pytest
def test_verify_lists_all_and_fails_for_damage(copy, capsys, monkeypatch):
    for kind in ("run", "unfinished", "trained", "loop", "study", "decomposition", "killed"):
        assert {record.status for record in verify(copy / kind)} == {"ok"}, kind
    (copy / "run" / "notes.txt").write_text("mine")
    assert run_cli("verify", copy / "run", monkeypatch=monkeypatch) == 0
    assert "not ntkit's       notes.txt" in capsys.readouterr().out
    digit(copy / "run" / "stages" / "network.json", [], random.Random(6))
    gone(copy / "run" / "trajectory" / "snapshots" / "step-00000002.safetensors", [], random.Random(6))
    gone(copy / "run" / "report.html", [], random.Random(6))
    assert run_cli("verify", copy / "run", monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "damaged           stages/network.json: changed since it was written" in printed
    assert "missing           trajectory/snapshots/step-00000002.safetensors: no such file" in printed
    assert "missing           report.html" in printed
    assert printed.splitlines()[-1].endswith("1 damaged, 2 missing, 1 not ntkit's")
    assert run_cli("verify", copy / "nowhere", monkeypatch=monkeypatch) == 2
    (copy / "empty").mkdir()
    with pytest.raises(Refused, match="got no file of ntkit"):
        verify(copy / "empty")
    assert summary([]) == "0 files: "


# --- content that nobody wrote, with a right checksum ------------------------------------------------------------


def changed(value, path, new):
    """A copy of a JSON value with another entry at a path of keys; `...` deletes it."""
    value = json.loads(json.dumps(value))
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


def paths_in(value, depth=0):
    """Paths to entries of a JSON value: all keys, and the first of each list."""
    if depth > 5:
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else [])
    for key, entry in entries:
        yield (key,)
        yield from ((key, *rest) for rest in paths_in(entry, depth + 1))


HOSTILE = (..., None, [], {}, "text", -1, 1.5, 10**19, True, [[]], {"a": []})


@pytest.mark.parametrize(
    ("place", "read"),
    [
        ("run/results.json", read_report),
        ("study/results.json", read_report),
        ("run/track/step-00000002.json", read_report),
        ("run/track/track.json", read_report),
        ("run/track/step-00000002.json", read_tracked),
        ("run/track/track.json", read_tracked),
        ("trained/run.json", read_trajectory),
        ("loop/run.json", read_trajectory),
    ],
)
def test_hostile_json_is_refused_in_one_line(copy, place, read):
    """No traceback, whatever stands at any key. (That numbers are refused or used is no matter: nobody wrote them.)"""
    file = copy / place
    value, draw, refused = read_json(file), random.Random(7), 0
    paths = list(paths_in(value))
    many = DRAWS > 300
    for path in paths if many or len(paths) < 24 else draw.sample(paths, 24):
        for new in HOSTILE if many else draw.sample(HOSTILE, 3):
            write_json(file, changed(value, path, new))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = outcome(read, file.parent)
            if isinstance(found, Refused):
                refused += 1
                assert "\n" not in str(found)
    for whole in ([], 3, "text", None, {}, [value]):
        write_json(file, whole)
        assert isinstance(outcome(read, file.parent), Refused)
    assert refused > 10


@pytest.mark.parametrize(
    ("place", "path", "new", "message"),
    [
        ("run/run.json", ("settings", "epochs"), "ten", r'run.json: settings.epochs: got "ten"; expected int'),
        ("run/run.json", ("settings", "classes"), [3], r"run.json: settings.classes\[0\]: got 3; expected str"),
        ("run/run.json", ("settings",), [], r"run.json: settings: got \[\]; expected object"),
        ("run/run.json", ("identity",), ..., r"run.json: identity: got no such key"),
        ("run/run.json", ("status",), 7, r"run.json: status: got 7"),
        ("run/results.json", ("machines",), {}, r"results.json: machines: got {}; expected array"),
        ("run/results.json", ("data", "train"), "20", r'results.json: data.train: got "20"; expected int'),
        ("run/trajectory/run.json", ("settings", "seed"), None, r"run.json: settings.seed: got null; expected int"),
        ("run/trajectory/run.json", ("stop", "step"), "9", r'run.json: stop.step: got "9"; expected int'),
        ("run/track/step-00000002.json", ("trace",), "much", r'step-00000002.json: trace: got "much"; expected float'),
        ("run/track/track.json", ("points",), 1.5, r"track.json: points: got 1.5; expected int"),
    ],
)
def test_wrong_content_is_refused_by_key(copy, place, path, new, message):
    file = copy / place
    write_json(file, changed(read_json(file), path, new))
    read = {"run/run.json": resume_analysis, "run/results.json": render}.get(place)
    read = read or (read_tracked if "track" in path or "/track/" in place else read_trajectory)
    found = outcome(read, file.parent)
    if read is render:
        assert isinstance(found, Refused)
    if place == "run/run.json" and isinstance(found, Exception) is False:
        pytest.fail("the run was resumed")
    assert isinstance(found, Refused)
    with pytest.raises(Refused, match=message):
        raise found


# --- many at random --------------------------------------------------------------------------------------------


@pytest.mark.fuzz
def test_random_damage_in_front_of_every_reader(sample, tmp_path, capsys):
    """`NTKIT_FUZZ=3000 pytest -m fuzz tests/test_integrity.py` draws that many."""
    draw = random.Random(int(os.environ.get("NTKIT_SEED", "0")))
    everything = files_of(sample)
    cases = [(kind, read) for readers in (QUICK, SLOW) for kind, some in readers.items() for read in some]
    whole = {case: outcome(case[1], _fresh(sample, tmp_path) / case[0]) for case in cases}
    assert not any(isinstance(found, Refused) for found in whole.values())
    counts: Counter[str] = Counter()
    for number in range(DRAWS):
        kind, read = cases[number % len(cases)]
        copy = _fresh(sample, tmp_path)
        file, damage = draw.choice(files_of(copy / kind)), draw.choice(DAMAGE)
        before = file.read_bytes()
        if damage is gone and read is read_trajectory and kind in ("killed", "broken"):
            continue  # a run that has not ended has the files that are there
        damage(file, [f for f in everything if f != sample / file.relative_to(copy)], draw)
        if file.exists() and file.read_bytes() == before:
            continue
        found, what = outcome(read, copy / kind), f"{read.__name__} {kind} {file.name} {damage.__name__}"
        if isinstance(found, Refused):
            assert "\n" not in str(found), what
            # of a file that is gone, or of another run, a file names it that does not fit to it
            names = [file.name, *([copy.name] if damage in (gone, another) else [])]
            assert any(name in str(found) for name in names), f"{what}: {found}"
            counts["refused"] += 1
        else:
            assert same(found, whole[kind, read]), what
            counts["same numbers"] += 1
    with capsys.disabled():
        print(f"\n{DRAWS} random damages: {dict(counts)}, 0 other numbers, 0 tracebacks")


def _fresh(sample: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    return Path(shutil.copytree(sample, tmp_path / "fresh"))


def test_the_checksum_of_json_is_that_of_the_bytes_before_it():
    import hashlib

    blob = sealed_json({"a": 1})
    body, _, rest = blob.partition(b' "checksum": "sha256:')
    assert rest == hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
