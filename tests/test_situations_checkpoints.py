"""Files of weights as others write them, from public reports: loaded bit for bit, or a refusal that helps."""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from situations import Table
from torch import nn

import ntkit

SITUATIONS = Table()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


STATE = net(1).state_dict()
OTHER = net(2).state_dict()  # of the same names
CRITIC = nn.Linear(2, 1).state_dict()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def named(change, state=STATE):
    return {change(name): value for name, value in state.items()}


def load(folder: Path, content, said: str = "", model=None, name="w.pt", old_format=False):
    """Save and load; what was loaded has the bits of STATE, and the text says how."""
    torch.save(content, folder / name, _use_new_zipfile_serialization=not old_format)
    model = net() if model is None else model
    text = ntkit.load_weights(model, folder / name)
    assert text == f"{name}: {said}" if said else text == name
    for value, expected in zip(model.state_dict().values(), STATE.values(), strict=True):
        assert torch.equal(value, expected)


def write(folder: Path, blob: bytes, name: str):
    (folder / name).write_bytes(blob)
    ntkit.load_weights(net(), folder / name)


# --- names ---


@SITUATIONS.of("karpathy/nanoGPT#325")
def the_prefix_of_a_compiled_model(folder):
    load(folder, {"model": named(lambda name: f"_orig_mod.{name}")}, 'model; without the prefix "_orig_mod."')


@SITUATIONS.of("FareedKhan-dev/train-llm-from-scratch#36")
def the_prefixes_of_a_compiled_model_in_data_parallel(folder):
    load(folder, named(lambda name: f"_orig_mod.module.{name}"), 'without the prefix "_orig_mod.module."')
    load(folder, named(lambda name: f"module._orig_mod.{name}"), 'without the prefix "module._orig_mod."')


@SITUATIONS.of("pytorch/pytorch#101107")
def a_layer_that_was_compiled_alone(folder):
    state = named(lambda name: name.replace("0.", "0._orig_mod.") if name.startswith("0.") else name)
    load(folder, state, "without the names of wrappers (_orig_mod)")


@SITUATIONS.of("pytorch/pytorch#117446")
def wrappers_of_sharding_around_every_layer(folder):
    part = "_fsdp_wrapped_module"
    state = named(lambda name: f"{part}.{name.replace('.', f'.{part}.', 1)}")
    load(folder, state, f"without the names of wrappers ({part})")


@SITUATIONS.of("pytorch/pytorch#77224")
def wrappers_of_checkpointing(folder):
    state = named(lambda name: name.replace(".", "._checkpoint_wrapped_module.", 1))
    load(folder, state, "without the names of wrappers (_checkpoint_wrapped_module)")


@SITUATIONS.of("facebookresearch/fairchem#371")
def data_parallel_around_a_part(folder):
    load(folder, named(lambda name: name.replace("2.", "2.module.")), "without the names of wrappers (module)")


@SITUATIONS.of("facebookresearch/fairseq#5096")
def a_plain_file_into_a_compiled_model(folder):
    load(folder, STATE, model=torch.compile(net(), backend="eager"))
    load(folder, STATE, model=nn.DataParallel(net()))


@SITUATIONS.of("ray-project/ray#43594")
def the_prefix_of_a_strategy_of_lightning(folder):
    load(folder, named(lambda name: f"_forward_module.{name}"), 'without the prefix "_forward_module."')


@SITUATIONS.of("Lightning-AI/pytorch-lightning#9938")
def an_averaged_model(folder):
    state = torch.optim.swa_utils.AveragedModel(net(1)).state_dict()
    load(folder, state, 'without the prefix "module."; left out: n_averaged')


@SITUATIONS.of("pytorch/pytorch#8481")
def a_batch_norm_of_before_it_counted_batches(folder):
    old = {name: value for name, value in STATE.items() if "num_batches" not in name}
    load(folder, old, "names of an older release of PyTorch")
    lightning = {"state_dict": named(lambda name: f"model.{name}", old)}
    load(folder, lightning, 'state_dict; without the prefix "model."; names of an older release of PyTorch')


@SITUATIONS.of("pytorch/pytorch#102999")
def a_weight_norm_of_an_older_release(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.weight_norm(nn.Linear(3, 4))
    torch.save(old.state_dict(), folder / "w.pt")
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    ntkit.load_weights(model, folder / "w.pt")
    x = torch.randn(2, 3)
    assert torch.equal(model(x), old(x))
    assert model.parametrizations.weight.original0.requires_grad


class Positions(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("position_ids", torch.arange(4)[None], persistent=persistent)


@SITUATIONS.of("facebookresearch/DPR#165")
def a_buffer_in_the_file_that_the_model_does_not_save(folder):
    torch.save(Positions(True).state_dict(), folder / "w.pt")
    assert ntkit.load_weights(Positions(False), folder / "w.pt") == "w.pt"


@SITUATIONS.of("huggingface/transformers#6882", "got 1 missing: position_ids;")
def a_buffer_that_the_file_lacks(folder):
    torch.save(Positions(False).state_dict(), folder / "w.pt")
    ntkit.load_weights(Positions(True), folder / "w.pt")


# --- tied weights ---


class Language(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.middle, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight


def tied(change=None):
    return {name: value.clone() for name, value in Language(3).state_dict().items() if name != change}


@SITUATIONS.of("huggingface/transformers#30202")
def a_tied_head_that_safetensors_left_out(folder):
    for absent in ("lm_head.weight", "embed.weight"):
        state = {f"model.{name}": value for name, value in tied(absent).items()}
        save_file(state, folder / "w.safetensors", metadata={"format": "pt"})
        model = Language()
        ntkit.load_weights(model, folder / "w.safetensors")
        assert torch.equal(model.lm_head.weight, Language(3).embed.weight)
        assert model.lm_head.weight is model.embed.weight


@SITUATIONS.of("vllm-project/vllm#6758", "1 tied in the model, different here: lm_head.weight")
def a_head_that_was_tied_and_no_longer_is(folder):
    state = tied()
    torch.save(state, folder / "w.pt")
    ntkit.load_weights(Language(), folder / "w.pt")  # both names, one value: taken
    state["lm_head.weight"] += 1
    torch.save(state, folder / "w.pt")
    ntkit.load_weights(Language(), folder / "w.pt")


# --- places ---


@SITUATIONS.of("facebookresearch/DiT#83")
def averaged_weights_beside_or_in_place_of_the_model(folder):
    load(folder, {"model": STATE, "ema": OTHER, "opt": {"state": {0: {"step": torch.ones(1)}}}}, "model; not ema")
    load(folder, {"ema": STATE, "opt": {"state": {0: {"step": torch.ones(1)}}}}, "ema")


@SITUATIONS.of("rosinality/style-based-gan-pytorch#56")
def a_generator_beside_its_critic(folder):
    load(folder, {"generator": STATE, "discriminator": CRITIC}, "generator; not discriminator")


@SITUATIONS.of("rosinality/style-based-gan-pytorch#109", "several networks of these names, under generator, g_running;")
def a_generator_beside_its_average(folder):
    load(folder, {"generator": STATE, "g_running": OTHER, "discriminator": CRITIC})


@SITUATIONS.of("agrimgupta92/sgan#108")
def the_only_key_with_the_names_of_the_model(folder):
    load(folder, {"g_state": STATE, "d_state": CRITIC, "args": {"lr": 0.1}}, "g_state; not d_state")


@SITUATIONS.of("VITA-Group/GAN-Slimming#7")
def a_critic_of_the_same_names_and_other_shapes(folder):
    critic = named(lambda name: name, nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).state_dict())
    load(folder, {"D": critic, "G": STATE}, "G; not D")


@SITUATIONS.of("open-mmlab/mmpretrain#18", r"several networks of these names, under 0\., 2\.;")
def a_layer_in_the_file_of_a_network_of_such_layers(folder):
    load(folder, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).state_dict(), model=nn.Linear(3, 4))


@SITUATIONS.of(
    "microsoft/voxelpose-pytorch#59", "The names are those of the model's part 'encoder': load the file into"
)
def the_file_of_a_part(folder):
    model = nn.Module()
    model.encoder, model.head = net(), nn.Linear(3, 2)
    load(folder, STATE, model=model)


@SITUATIONS.of(
    "galilai-group/stable-pretraining#189", r"'weight': got no values yet \(a lazy layer\); .*Call the model"
)
def a_lazy_model(folder):
    load(folder, STATE, model=nn.LazyLinear(2))


@SITUATIONS.of("verl-project/verl#447", r"'weight': got no values \(device meta\); expected a tensor with values")
def a_model_without_memory(folder):
    load(folder, STATE, model=nn.Linear(3, 2, device="meta"))


@SITUATIONS.of("facebookresearch/moco#84", r"several networks of these names, under module\.encoder_k\., module\.enc")
def an_encoder_and_its_momentum_encoder(folder):
    both = named(lambda name: f"module.encoder_q.{name}") | named(lambda name: f"module.encoder_k.{name}", OTHER)
    load(folder, {"state_dict": both})


# --- pickles ---


@SITUATIONS.of("Lightning-AI/pytorch-lightning#21757")
def a_loss_among_the_hyperparameters(folder):
    content = {"state_dict": named(lambda n: f"model.{n}"), "hyper_parameters": {"loss": nn.MSELoss(), "lr": 0.1}}
    said = 'state_dict; without the prefix "model."; not read: torch.nn.modules.loss.MSELoss'
    load(folder, content, said)


@SITUATIONS.of("ROCm/Megatron-LM#56")
def arguments_of_a_command_line_beside_the_weights(folder):
    content = {"model": STATE, "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs"))}
    for old_format in (False, True):
        said = "model; not read: argparse.Namespace, pathlib.PurePosixPath"
        load(folder, content, said, old_format=old_format)


@SITUATIONS.of("pytorch/pytorch#112944", "a pickle with an object, more than tensors .* to read it would run code; ")
def a_module_in_a_file_of_the_old_format(folder):
    load(folder, {"model": STATE, "loss": nn.MSELoss()}, old_format=True)


@SITUATIONS.of("suno-ai/bark#653")
def a_number_of_numpy_beside_the_weights(folder):
    core = "_core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "core"
    said = f"model; not read: numpy.{core}.multiarray.scalar, numpy.dtype"
    load(folder, {"model": STATE, "best": np.float64(0.9)}, said)


@SITUATIONS.of("amyxlu/cheap-proteins#4", r"got a whole torch\.nn\.modules\.container\.Sequential, .*\.state_dict\(\)")
def a_whole_module(folder):
    torch.save(net(1), folder / "w.pt")
    ntkit.load_weights(net(), folder / "w.pt")


@SITUATIONS.of("Acly/comfyui-inpaint-nodes#116", r"got a TorchScript program; .*torch\.jit\.load\(file\)\.state")
def a_torchscript_program(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net(1)), folder / "w.pt")
    ntkit.load_weights(net(), folder / "w.pt")


# --- files and folders ---


@SITUATIONS.of("huggingface/transformers#27923", r"got a pointer of Git LFS, not the file itself; .*git lfs pull")
def a_pointer_in_place_of_safetensors(folder):
    write(folder, POINTER, "model.safetensors")


@SITUATIONS.of("huggingface/diffusers#13559", "got a pointer of Git LFS, not the file itself")
def a_pointer_in_place_of_a_pickle(folder):
    write(folder, POINTER, "pytorch_model.bin")


@SITUATIONS.of("safetensors/safetensors#414")
def files_whose_names_say_another_format(folder):
    load(folder, STATE, name="w.safetensors")
    load(folder, STATE, name="010000.model", old_format=True)
    save_file(STATE, folder / "w.bin")
    model = net()
    ntkit.load_weights(model, folder / "w.bin")
    assert torch.equal(model[2].weight, STATE["2.weight"])


@SITUATIONS.of("huggingface/peft#1579", "9 missing: .*2 unexpected: base_model.model.0.lora_A.weight")
def an_adapter_in_place_of_a_model(folder):
    adapter = {f"base_model.model.0.lora_{part}.weight": torch.ones(2, 3) for part in "AB"}
    save_file(adapter, folder / "adapter_model.safetensors")
    ntkit.load_weights(net(), folder)


@SITUATIONS.of("pytorch/torchtitan#3764", r"model-2\.safetensors: got no such file")
def an_index_that_names_a_file_which_is_not_there(folder):
    save_file(STATE, folder / "model-1.safetensors")
    index = {name: "model-1.safetensors" for name in STATE} | {"lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ntkit.load_weights(net(), folder)


@SITUATIONS.of("MadryLab/trak#77", "a folder without weights; there are some in checkpoint-500; ")
def the_folder_above_the_checkpoints_of_a_trainer(folder):
    (folder / "checkpoint-500").mkdir()
    save_file(STATE, folder / "checkpoint-500" / "model.safetensors")
    ntkit.load_weights(net(), folder)


@SITUATIONS.of("chemprop/chemprop#1227")
def a_folder_with_one_checkpoint(folder):
    (folder / "checkpoints").mkdir()
    load(folder / "checkpoints", {"state_dict": STATE}, "state_dict", name="best.ckpt")
    torch.save({}, folder / "checkpoints" / "optimizer.pt")
    model = net()
    assert ntkit.load_weights(model, folder / "checkpoints") == "checkpoints: state_dict"
    assert torch.equal(model[2].weight, STATE["2.weight"])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_into_single_and_not_the_other_way_round(half, tmp_path):
    """pytorch/pytorch#39428, pytorch/pytorch#187138: no digit is lost without a word."""
    state = {name: value.to(half) if value.is_floating_point() else value for name, value in STATE.items()}
    save_file(state, tmp_path / "w.safetensors")
    model = net()
    ntkit.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[2].weight, state["2.weight"].float())
    save_file(STATE, tmp_path / "w.safetensors")
    with pytest.raises(ntkit.Refused, match="8 of a dtype that would lose digits"):
        ntkit.load_weights(net().to(half), tmp_path / "w.safetensors")


@SITUATIONS.parametrized()
def test_situations(situation, tmp_path):
    situation.check(tmp_path)
