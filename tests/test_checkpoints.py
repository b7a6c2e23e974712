"""Weights from files that others wrote."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ntkit


def net(seed: int = 0, tied: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    if tied:
        model.append(nn.Linear(3, 4))
        model[3].weight = model[0].weight
    return model


SOURCE = net(1)
STATE = SOURCE.state_dict()
PREFIXED = {"model." + name: value for name, value in STATE.items()}

FORMS = {
    "bare": (STATE, ""),
    "state_dict": ({"state_dict": STATE, "epoch": 3, "lr_schedulers": []}, "state_dict"),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": {"state": {}}}, "model_state_dict"),
    "model": ({"model": STATE, "args": {"lr": 0.1}}, "model"),
    "nested": ({"model": {"state_dict": STATE}}, "model.state_dict"),
    "Lightning": (
        {"state_dict": {**PREFIXED, "loss.weight": torch.ones(3)}, "pytorch-lightning_version": "2.5"},
        'state_dict; without the prefix "model."; left out: loss.weight',
    ),
    "data parallel": ({f"module.{name}": value for name, value in STATE.items()}, 'without the prefix "module."'),
    "compiled in Lightning": (
        {"state_dict": {f"model._orig_mod.{name}": value for name, value in STATE.items()}},
        'without the prefix "model._orig_mod."',
    ),
    "a name of one's own": ({f"encoder.{name}": value for name, value in STATE.items()}, 'prefix "encoder."'),
    "beside numbers": ({**STATE, "epoch": 3}, ""),
    "settings as an object": (
        {"args": SimpleNamespace(lr=1.0), "state_dict": STATE},
        "state_dict; not read: types.SimpleNamespace",
    ),
    "half precision": ({name: v.half() if v.is_floating_point() else v for name, v in STATE.items()}, ""),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_pytorch(tmp_path, form, suffix):
    content, said = FORMS[form]
    torch.save(content, tmp_path / f"last{suffix}")
    model = net()
    text = ntkit.load_weights(model, tmp_path / f"last{suffix}")
    assert text.startswith(f"last{suffix}")
    assert said in text
    for name, value in model.state_dict().items():
        given = STATE[name].half().to(value.dtype) if form == "half precision" and value.is_floating_point() else None
        assert torch.equal(value, STATE[name] if given is None else given)


def test_safetensors_with_a_prefix(tmp_path):
    save_file(PREFIXED, tmp_path / "w.safetensors")
    model = net()
    assert 'without the prefix "model."' in ntkit.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[2].weight, STATE["2.weight"])


def test_a_model_whose_names_begin_with_model(tmp_path):
    """Only a prefix that the model does not have is left out."""
    torch.save(PREFIXED, tmp_path / "w.pt")
    outer = nn.Module()
    outer.model = net()
    assert ntkit.load_weights(outer, tmp_path / "w.pt") == "w.pt"
    assert torch.equal(outer.model[2].weight, STATE["2.weight"])


def test_tied_weights_under_one_name(tmp_path):
    source = net(1, tied=True)
    state = {f"module.{name}": value for name, value in source.state_dict().items() if name != "3.weight"}
    torch.save(state, tmp_path / "w.pt")
    model = net(tied=True)
    ntkit.load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model[3].weight, source[0].weight)


def test_folders_of_hugging_face(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    model = net()
    ntkit.load_weights(model, tmp_path)
    assert torch.equal(model[2].weight, STATE["2.weight"])
    (tmp_path / "pieces").mkdir()
    first, second = dict(list(STATE.items())[:3]), dict(list(STATE.items())[3:])
    save_file(first, tmp_path / "pieces/model-1.safetensors")
    save_file(second, tmp_path / "pieces/model-2.safetensors")
    index = {name: f"model-{1 + (name in second)}.safetensors" for name in STATE}
    (tmp_path / "pieces/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = net()
    ntkit.load_weights(model, tmp_path / "pieces")
    assert torch.equal(model[2].weight, STATE["2.weight"])
    index["2.bias"] = "../model.safetensors"
    (tmp_path / "pieces/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ntkit.Refused, match="names of files in this folder"):
        ntkit.load_weights(net(), tmp_path / "pieces")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_pieces_of_a_folder_that_overlap_are_refused(tmp_path, kind):
    """Neither of two values of one name may win, not even where they are equal: the folder is not as it was saved."""
    save = save_file if kind.endswith("safetensors") else torch.save
    first, second = f"0-{kind}", f"1-{kind}"
    place = {name: first if name.startswith("0") else second for name in STATE}
    pieces = {piece: {name: STATE[name] for name in STATE if place[name] == piece} for piece in (first, second)}
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": place}))
    for piece, tensors in pieces.items():
        save(tensors, tmp_path / piece)
    model = net()
    ntkit.load_weights(model, tmp_path)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    for value in (STATE["0.bias"], STATE["0.bias"] + 1):
        save(pieces[second] | {"0.bias": value.clone()}, tmp_path / second)
        model = net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(
            ntkit.Refused, match=rf"'0.bias' in {first} and in {second}; expected each tensor in one file"
        ):
            ntkit.load_weights(model, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind.endswith("bin"):
        torch.save([1.0], tmp_path / second)
        with pytest.raises(ntkit.Refused, match="got a list; expected tensors by name"):
            ntkit.load_weights(net(), tmp_path)


class Dangerous:
    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_run(tmp_path, legacy):
    torch.save(
        {"state_dict": STATE, "callbacks": Dangerous(tmp_path / "made")},
        tmp_path / "w.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ntkit.Refused, match=r"got a pickle with \w+\.mkdir, .* would run code"):
        ntkit.load_weights(net(), tmp_path / "w.ckpt")
    assert not (tmp_path / "made").exists()


REFUSED = {
    "another network": (OrderedDict(a=torch.ones(2)), r"missing: 0\.weight.*1 unexpected: a"),
    "a near name": (
        {name.replace("2.weight", "2.wieght"): value for name, value in STATE.items()},
        r"missing: 2\.weight; 1 unexpected: 2\.wieght.*The nearest names: 2\.weight ~ 2\.wieght",
    ),
    "another shape": ({**STATE, "2.bias": torch.ones(5)}, r"1 of another shape: 2\.bias \[5\] \(model: \[3\]\)"),
    "lost digits": ({**STATE, "2.bias": torch.ones(3).double()}, "a dtype that would lose digits: 2.bias"),
    "a whole list": ([1, 2], "got a checkpoint with list"),
    "no tensors": ({"epoch": 3}, "got a checkpoint with 'epoch'"),
    "nothing": ({}, "got nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, name):
    content, message = REFUSED[name]
    torch.save(content, tmp_path / "w.pt")
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ntkit.Refused, match=message):
        ntkit.load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing was loaded


def test_a_network_of_two_outputs_for_one_is_told_apart(tmp_path):
    one, two, other = (nn.Linear(4, outputs) for outputs in (1, 2, 3))
    for saved, told in ((two, True), (other, False)):
        torch.save(saved.state_dict(), tmp_path / "w.pt")
        with pytest.raises(ntkit.Refused, match="2 of another shape") as refused:
            ntkit.load_weights(one, tmp_path / "w.pt")
        assert ("the second row minus the first" in str(refused.value)) == told


def test_other_files_are_refused(tmp_path):
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("weights")
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2]))
    torch.save(STATE, tmp_path / "short.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:-300])
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.pt", r"empty\.pt: got"),
        ("text.ckpt", r"text\.ckpt: got"),
        ("list.pt", "list.pt: got"),
        ("short.pt", "that torch.load cannot read"),
        ("absent.pt", r"absent\.pt: got no such file"),
        ("folder", "got a folder without weights"),
    ):
        with pytest.raises(ntkit.Refused, match=message):
            ntkit.load_weights(net(), tmp_path / name)


def test_several_networks_in_one_file_are_told_apart(tmp_path):
    both = {f"{k}.{name}": value for k in ("student", "ema") for name, value in STATE.items()}
    torch.save(both, tmp_path / "two.pt")
    with pytest.raises(ntkit.Refused, match=r"several networks of these names, under ema\., student\."):
        ntkit.load_weights(net(), tmp_path / "two.pt")
    other = net(2).state_dict()
    torch.save({"model": STATE, "model_ema": other}, tmp_path / "ema.pt")
    model = net()
    assert "not model_ema" in ntkit.load_weights(model, tmp_path / "ema.pt")
    assert torch.equal(model[2].weight, STATE["2.weight"])
    torch.save(
        {f"model.{n}": v for n, v in STATE.items()} | {f"ema.{n}": v for n, v in other.items()}, tmp_path / "c.pt"
    )
    model = net()
    assert 'without the prefix "model."; left out: ema.' in ntkit.load_weights(model, tmp_path / "c.pt")
    assert torch.equal(model[2].weight, STATE["2.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to_sparse(), "'2.weight': got a sparse tensor"),
        (lambda v: v.to("meta"), "'2.weight': got a tensor on device"),
        (lambda v: v.to(torch.int8), "a dtype that would lose digits: 2.weight torch.int8"),
        (lambda v: v > 0, "a dtype that would lose digits: 2.weight torch.bool"),
        (lambda v: v.to(torch.float8_e4m3fn), "a dtype that would lose digits: 2.weight torch.float8"),
    ],
)
def test_values_that_are_no_weights_change_nothing(tmp_path, change, message):
    torch.save({**STATE, "2.weight": change(STATE["2.weight"])}, tmp_path / "w.pt")
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ntkit.Refused, match=message):
        ntkit.load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_real_and_whole_numbers_are_no_complex_weights(tmp_path):
    model = nn.Linear(2, 1, dtype=torch.complex64)
    before = model.weight.detach().clone()
    for dtype in (torch.int8, torch.bool, torch.float32):
        torch.save({**model.state_dict(), "weight": torch.ones(1, 2, dtype=dtype)}, tmp_path / "w.pt")
        with pytest.raises(ntkit.Refused, match="a dtype that would lose digits: weight torch"):
            ntkit.load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, before)
    torch.save({**model.state_dict(), "weight": torch.full((1, 2), 1j)}, tmp_path / "w.pt")
    ntkit.load_weights(model, tmp_path / "w.pt")
    assert model.weight.tolist() == [[1j, 1j]]
