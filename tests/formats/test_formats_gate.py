"""What must be refused, by name, before the model is touched."""

from __future__ import annotations

import copy
import json
import os
import struct

import pytest
import torch
from formats_tiny import X, adapted, bare, edit_config, edit_tensors, net, saved

import rankloom as rl
from rankloom.errors import FileError

KEY = "base_model.model.layers.0.q.lora_A.weight"


def refused(folder, message, model=None, **more):
    model = model or net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FileError, match=message):
        rl.load(model, folder, **more)
    assert not hasattr(model, "rankloom")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


CONFIGS = [
    ({"r": 8}, r"q\.lora_A\.weight'? has shape \(4, 8\).*need \(8, 8\)"),
    ({"r": -1}, "r=-1: a rank is from 1 to 4096"),
    ({"r": 10**9}, "a rank is from 1 to 4096"),
    ({"r": "4"}, "r='4': expected a whole number from 1 on"),
    ({"r": True}, "r=True: expected a whole number from 1 on"),
    ({"rank_pattern": {"q": 10**7}}, "a rank is from 1 to 4096"),
    ({"rank_pattern": {"(a": 4}}, "rank_pattern=.*names or short regular expressions"),
    ({"lora_alpha": "x"}, "lora_alpha='x': expected a number"),
    ({"lora_alpha": 1e9}, r"lora_alpha=1000000000.0: at most 1e\+06"),
    ({"alpha_pattern": {"q": -2e6}}, r"q=-2000000.0: at most 1e\+06"),
    ({"zz_new_field": 1}, "the field 'zz_new_field' is unknown.*ignore="),
    ({"lora_alhpa": 32}, "did you mean|the field 'lora_alhpa' is unknown"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path=.*expected text"),
    ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    ({"target_modules": ["q"]}, r"has tensors for 'layers\.0\.v', which target_modules=\['q'\]"),
    (
        {"layers_to_transform": [7]},
        r"has tensors for 'layers\.0\.q', which target_modules=.*, layers_to_transform=\[7\] of",
    ),
    ({"target_modules": ["q", "v", "score"]}, "no tensor for 'score', which target_modules"),
    ({"target_modules": 5}, "target_modules=5: expected text or a list of texts"),
    ({"layers_to_transform": 0, "layers_pattern": "layers"}, r"has tensors for 'layers\.1\.q'"),
    ({"bias": "some"}, "bias='some': expected one of"),
    ({"peft_type": "OFT"}, "peft_type 'OFT' is a method of PEFT that Rankloom does not read"),
    ({"peft_type": "LoRA"}, "did you mean 'LORA'"),
    ({"peft_type": 3}, "'peft_type' is 3"),
    ({"use_qalora": True}, "use_qalora=True changes what the adapter computes"),
    ({"kasa_config": {}}, "kasa_config={} changes what the adapter computes"),
    ({"loftq_config": 4}, "loftq_config=4"),
    ({"megatron_core": "evil.module"}, "megatron_core='evil.module'"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda' rewrites the base model"),
    ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    ({"modules_to_save": ["scores"]}, None),
    ({"use_dora": True}, "lora_magnitude_vector.*missing"),
    ({"bias": "all"}, r"bias'? of shape \(8,\) is missing"),
    ({"modules_to_save": ["score"]}, r"score\.weight' of shape \(3, 8\) is missing and 1 more"),
    ({"target_parameters": "x"}, "target_parameters='x'"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[json.dumps(c) for c, _ in CONFIGS])
def test_config_fields(change, message, tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, **change)
    if message is None:
        with pytest.warns(UserWarning, match="modules_to_save names 'scores'"):
            rl.load(net(), folder)
    else:
        refused(folder, message)


RAW = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "expected a JSON object, got a list"),
    (b'{"peft_type":"LORA","r":4,"r":8}', "the key 'r' is there twice"),
    (b'{"peft_type":"LORA","lora_alpha":NaN}', "NaN is no JSON number"),
    (b'{"peft_type":"LORA","lora_alpha":-Infinity}', "-Infinity is no JSON number"),
    (b'{"peft_type":"LORA","lora_alpha":1e999}', "1e999 is no JSON number"),
    (b'{"a":' * 30 + b"1" + b"}" * 30, "nested deeper than 12"),
    (b"[" * 200000, "nested deeper than 12"),
    (b"\xff\xfe", "not JSON"),
    (b'{"x":"' + b"a" * (1 << 20) + b'"}', "at most 1048576 are read"),
]


@pytest.mark.parametrize(("raw", "message"), RAW, ids=range(len(RAW)))
def test_config_bytes(raw, message, tmp_path):
    folder = bare(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(raw)
    refused(folder, message)


def header(folder):
    raw = (folder / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(folder, data, body):
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def test_header_of_the_weights(tmp_path):
    folder = bare(tmp_path / "a")
    good, body = header(folder)
    cases = [
        (good, body[:-4], "the header names .* bytes of data, the file has"),
        (good, body + b"0", "the header names"),
        (json.dumps(good).encode().replace(b"{", b" {", 1), body, "must start with"),
        (json.dumps(good).encode().replace(b'"F32"', b'"F99"', 1), body, "dtype 'F99'"),
        ({**good, KEY: {**good[KEY], "extra": 1}}, body, f"the header of tensor '{KEY}'"),
        ({**good, KEY: {**good[KEY], "shape": [4, -8]}}, body, "has shape"),
        ({**good, KEY: {**good[KEY], "shape": [4, 9]}}, body, "takes 128 bytes"),
        (json.dumps(good).encode()[:-1] + b"," + json.dumps(good).encode()[1:], body, "is there twice"),
        (
            b"{" + b" " * (9 << 20),
            b"",
            r"a header of 9437185 bytes; at most 8388608 are read \(limits=Limits\(header=9437185",
        ),
    ]
    for data, rest, message in cases:
        write(folder, data, rest)
        refused(folder, message)
    (folder / "adapter_model.safetensors").write_bytes(b"abc")
    refused(folder, "no safetensors file")
    overlapping = {k: {**v, "data_offsets": [0, 128]} for k, v in good.items() if k != "__metadata__"}
    write(folder, overlapping, body)
    refused(folder, "overlap or leave a gap|takes 128 bytes")


TENSORS = [
    ({"layers.0.q.lora_A.weight": ...}, r"'base_model.model.layers.0.q.lora_A.weight' of shape \(4, 8\) is missing"),
    ({"layers.0.q.lora_A.weight": lambda t: t[:2]}, r"has shape \(2, 8\).*need \(4, 8\)"),
    ({"layers.0.q.lora_A.weight": lambda t: t.T}, r"has shape \(8, 4\)"),
    ({"layers.0.q.lora_A.weight": lambda t: t * float("nan")}, "lora_A.weight' has NaN or infinite"),
    ({"layers.1.v.lora_B.weight": lambda t: t / 0}, "layers.1.v.lora_B.weight' has NaN or infinite"),
    ({"layers.0.q.lora_A.weight": lambda t: t.long()}, "has dtype torch.int64"),
    ({"base_model.model.layers.0.q.lora_C.weight": torch.zeros(2)}, "belongs to nothing that the config adapts"),
    (
        {"base_model.model.layers.7.q.lora_A.weight": torch.zeros(4, 8)},
        r"'layers.7.q', which this model has not; did you",
    ),
    (
        {"base_model.model.score.weight": torch.zeros(3, 8)},
        "score.weight' holds a base weight that is another.*full_tensors='take'",
    ),
    ({"score.weight": torch.zeros(3, 8)}, "score.weight' holds a base weight"),
    ({"layers.0.q.weight": torch.zeros(8, 8)}, "holds a base weight"),
    (
        {"base_model.model.layers.0.q.base_layer.weight": torch.zeros(8, 8)},
        "base_layer.weight' holds .*copy the tensor into it",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=range(len(TENSORS)))
def test_tensors(change, message, tmp_path):
    folder = bare(tmp_path / "a")
    edit_tensors(folder, **change)
    refused(folder, message)


def test_another_base_is_named(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, base_model_name_or_path="some/base")
    refused(folder, r"layers\.1\.q.*which this model has not.*made for 'some/base'", model=net(depth=1))
    refused(folder, "this model has not", model=torch.nn.Sequential(torch.nn.Linear(8, 8)))


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "nowhere", "there is no such folder.*hf download")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "has no adapter_config.json")
    saved(tmp_path / "run" / "best")
    refused(tmp_path / "run", "there is an adapter in '.*best'")
    folder = bare(tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is a pickle, which is never opened")


def test_what_is_no_regular_file(tmp_path):
    folder = bare(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    refused(folder, "is no regular file")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    refused(folder, "is no regular file")


def test_links_out_of_the_folder_are_refused_and_those_of_the_hub_cache_are_not(tmp_path):
    real = bare(tmp_path / "real")
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(real / name)
    refused(folder, "link that leaves the folder")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (blobs / str(i)).write_bytes((real / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    rl.load(net(), snapshot)


def test_a_changed_file_does_not_pass_its_manifest(tmp_path):
    folder = saved(tmp_path / "a")
    raw = bytearray((folder / "adapter_model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(raw)
    refused(folder, "is not the file that was saved.*Delete manifest.json to load")
    (folder / "manifest.json").unlink()
    rl.load(net(), folder)
    edit_config(folder, lora_alpha=60)
    other = saved(tmp_path / "b")
    edit_config(other, lora_alpha=60)
    refused(other, "adapter_config.json is not the file that was saved")


def test_a_manifest_of_someone_else_is_said_and_left_aside(tmp_path):
    folder = bare(tmp_path / "a")
    (folder / "manifest.json").write_text('{"name": "web app"}')
    with pytest.warns(UserWarning, match="not a manifest of ours"):
        rl.load(net(), folder)
    (folder / "manifest.json").write_text('{"kind": "rankloom-adapter", "schema": 99}')
    refused(folder, "the seal is not that of its content")


def test_a_name_that_is_taken_or_bad(tmp_path):
    folder = saved(tmp_path / "a")
    model = adapted()
    before = model(X)
    with pytest.raises(rl.RankloomError, match="there is an adapter 'default' already"):
        rl.load(model, folder)
    assert torch.equal(model(X), before)
    for name in ("a/b", "../x", "x\n", "", "a" * 65, "keys"):
        with pytest.raises(rl.RankloomError, match="cannot name an adapter"):
            rl.load(net(), folder, name=name)


def test_loading_beside_another_adapter_changes_nothing_of_it(tmp_path):
    folder = saved(tmp_path / "a", target_modules=["q"])
    model = adapted()
    before = model(X)
    rl.load(model, folder, name="second")
    assert torch.equal(model(X), before)
    assert set(model.rankloom.names) == {"default", "second"}
    edit_tensors(bare(tmp_path / "b"), **{"layers.1.v.lora_B.weight": ...})
    with pytest.raises(FileError, match="missing"):
        rl.load(model, tmp_path / "b", name="third")
    assert torch.equal(model(X), before)
    assert set(model.rankloom.names) == {"default", "second"}


def test_limits_can_be_set(tmp_path):
    from rankloom.formats.limits import Limits

    folder = saved(tmp_path / "a")
    refused(folder, "a rank is from 1 to 2", limits=Limits(rank=2))
    refused(folder, "8 tensors; at most 3", limits=Limits(tensors=3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors.index.json", "split over several files"),
        ("adapters.safetensors", "is what mlx-lm writes"),
        ("adapter_model.bin", "is a pickle"),
        ("pytorch_lora_weights.safetensors", "there is 'pytorch_lora_weights.safetensors': rename it"),
    ],
)
def test_what_is_there_instead_of_the_weights_is_named(name, message, tmp_path):
    folder = bare(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / name)
    refused(folder, message)
