"""The folder of a model from a stranger: its files are files, and they lie in it."""

from __future__ import annotations

import json
import os
import shutil
import socket

import pytest
from cli_tiny import llama
from safetensors.torch import load_file, save_file

from rankloom.errors import FileError
from rankloom.hf.folder import check_folder, weight_files
from rankloom.hf.models import architectures, load_model, load_tokenizer, skeleton
from rankloom.hf.shards import Shards, has_shards
from rankloom.train.config import ModelSettings

OPENERS = [load_model, skeleton, load_tokenizer, architectures]
FILES = ["tokenizer.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "vocab.txt"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("honest") / "tiny", eos_token="<e>", pad_token="<p>")


@pytest.fixture
def model(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "m")


def refused(model, message):
    for opened in OPENERS:
        with pytest.raises(FileError, match=message):
            opened(ModelSettings(str(model)))


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def linked(path):
    (path.parents[1] / "private").write_text("{}")
    path.symlink_to("../private")


def listening(path):
    here = os.getcwd()
    os.chdir(path.parent)
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def to_nothing(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("made", [pipe, endless, linked, listening, to_nothing], ids=lambda f: f.__name__)
def test_what_is_no_file_of_the_folder_is_refused_at_once(made, name, model):
    (model / name).unlink(missing_ok=True)
    made(model / name)
    refused(model, name)


def test_links_inside_the_folder_and_in_a_hub_cache_are_followed(model, tmp_path):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    check_folder(model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(model.iterdir())):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert load_model(ModelSettings(str(snapshot))).task == "causal-lm"


def indexed(model, names, index="model.safetensors.index.json"):
    """The model's tensors, each third in one of these files, written beside the folder where they say so."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    for name in names:
        place = model / name
        (model / "sub").mkdir(exist_ok=True)
        save_file({k: t for k, t in tensors.items() if where[k] == name}, place, metadata={"format": "pt"})
    (model / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def test_an_index_of_files_in_the_folder(model):
    indexed(model, ["a.safetensors", "b.safetensors"])
    assert sorted(weight_files(model)) == ["a.safetensors", "b.safetensors"]
    assert load_model(ModelSettings(str(model))).notes == ()
    assert has_shards(model)
    assert len(Shards(model).names) > 10


@pytest.mark.parametrize(
    "outside", ["../private.safetensors", "sub/x.safetensors", "sub/../x.safetensors", "{root}/x.safetensors"]
)
def test_an_index_names_no_file_elsewhere(outside, model, tmp_path):
    name = outside.format(root=tmp_path)
    indexed(model, ["a.safetensors", name])
    refused(model, "index.json: names .*, which is no file of this folder")
    for reading in (Shards, has_shards):
        with pytest.raises(FileError, match="no file of this folder"):
            reading(model)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weight_map": {"a": ".."}}, "no file of this folder"),
        ({"weight_map": {"a": ""}}, "no file of this folder"),
        ({"weight_map": {"a": 3}}, "/3: no such file"),
        ({"weight_map": {"a": None}}, "/None: no such file"),
        ({"weight_map": ["a"]}, "'weight_map' is no object"),
        ({}, "'weight_map' is no object"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: no such file, but .* names it: download"),
        ([], "expected a JSON object"),
    ],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_is_none(said, message, index, model):
    (model / index).write_text(json.dumps(said))
    refused(model, message)


def test_a_shard_that_is_a_link_out_is_refused(model, tmp_path):
    indexed(model, ["a.safetensors", "b.safetensors"])
    shutil.move(model / "b.safetensors", tmp_path / "b.safetensors")
    (model / "b.safetensors").symlink_to(tmp_path / "b.safetensors")
    refused(model, "b.safetensors is a link that leaves the folder")
