"""Packed weights through safetensors: bit for bit, and nothing is taken on trust."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rankloom.errors import FileError, SettingsError
from rankloom.settings import from_data, to_data
from rankloom.store.base import Packed, Store
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.files import KEY, from_files, to_files
from rankloom.store.model import keep
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

EACH = [
    NormalFloat(),
    NormalFloat(3, 16, double=False),
    NestedFloat(2, 3, "bfloat16", 16, 64),
    Uniform(3, 16),
    BlockFloat(8),
]


def _model():
    model = nn.Sequential(*[nn.Linear(64, 48) for _ in EACH])
    keep(model, {f"{i}.weight": store for i, store in enumerate(EACH)})
    return model


def _read(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    """Every store survives the file with its settings, dtype, bytes and outputs."""
    model = _model().to(dtype)
    tensors, metadata = to_files(model.state_dict())
    assert not any(isinstance(t, Packed) for t in tensors.values())
    assert {"0.weight.codes", "0.weight.absmax8", "3.weight.zero", "0.bias"} <= tensors.keys()
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    state = from_files(*_read(tmp_path / "m.safetensors"))
    fresh = nn.Sequential(*[nn.Linear(64, 48) for _ in EACH])
    fresh.load_state_dict(state, assign=True)
    for mine, theirs, store in zip(fresh, model, EACH):
        assert mine.weight.store == store
        assert mine.weight.dtype == dtype
        assert all(torch.equal(mine.weight.parts[n], p) for n, p in theirs.weight.parts.items())
        x = torch.randn(2, 64).to(dtype)
        assert torch.equal(mine(x), theirs(x))
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size < 8000 + sum(m.weight.stored_bytes for m in model) + 48 * 4 * len(EACH)


def test_plain_state_dict_is_left_alone():
    """Without packed weights there is no metadata, and files without ours read as they are."""
    state = nn.Linear(3, 2).state_dict()
    tensors, metadata = to_files(state)
    assert metadata == {}
    assert all(torch.equal(tensors[k], v) for k, v in state.items())
    assert from_files(tensors, None).keys() == state.keys()


def test_float64_parts():
    """Zero points in float64, and a weight whose logical dtype was narrowed, come back."""
    for dtype in (torch.float64, torch.bfloat16):
        weight = Uniform(3, 16).pack(torch.randn(4, 32).double()).to(dtype)
        back = from_files(*to_files({"w": weight}))["w"]
        assert back.dtype == dtype
        assert torch.equal(back.parts["zero"], weight.parts["zero"])
        assert back.parts["zero"].dtype == torch.float64


def _broken(change):
    tensors, metadata = to_files({"w": NormalFloat().pack(torch.randn(8, 64))})
    about = json.loads(metadata[KEY])
    change(tensors, about)
    return tensors, {KEY: json.dumps(about)}


BREAKS = {
    "has no tensor 'w.absmax8'": lambda t, a: t.pop("w.absmax8"),
    r"'w.codes' is \(255,\)": lambda t, a: t.update({"w.codes": t["w.codes"][1:]}),
    "'w.codes' is .* torch.float32": lambda t, a: t.update({"w.codes": t["w.codes"].float()}),
    r"\(9, 64\) weight": lambda t, a: a["w"].update(shape=[9, 64]),
    "shape .* no list of positive sizes": lambda t, a: a["w"].update(shape=[-8, 64]),
    "dtype 'int8'": lambda t, a: a["w"].update(dtype="int8"),
    "no store 'normal_flaot'; did you mean 'normal_float'": lambda t, a: a["w"]["store"].update(name="normal_flaot"),
    "no setting 'blok'; did you mean": lambda t, a: a["w"]["store"].update(blok=3),
    "bits='4': expected one of 2, 3, 4, 8; write bits=4": lambda t, a: a["w"]["store"].update(bits="4"),
    "bits=5: expected one of 2, 3, 4, 8": lambda t, a: a["w"]["store"].update(bits=5),
    "expected store, shape and dtype": lambda t, a: a["w"].pop("store"),
    "both packed and as a plain tensor": lambda t, a: t.update(w=torch.zeros(1)),
}


@pytest.mark.parametrize("message", BREAKS)
def test_refuses_what_does_not_fit(message):
    with pytest.raises(FileError, match=message):
        from_files(*_broken(BREAKS[message]))


def test_refuses_bad_metadata_and_taken_keys():
    with pytest.raises(FileError, match="no JSON"):
        from_files({}, {KEY: "{"})
    with pytest.raises(FileError, match="expected an object"):
        from_files({}, {KEY: "[1]"})
    weight = NormalFloat().pack(torch.randn(8, 64))
    with pytest.raises(FileError, match=r"two tensors would be written as 'w\.codes'"):
        to_files({"w": weight, "w.codes": torch.zeros(1)})


@pytest.mark.parametrize("store", EACH, ids=lambda s: type(s).__name__)
def test_store_as_data(store):
    """Every store has a name and survives JSON; settings left out are the defaults; a name alone is enough."""
    assert from_data(Store, json.loads(json.dumps(to_data(store, full=True)))) == store
    name = to_data(store)["name"]
    assert from_data(Store, name) == type(store)()
    assert from_data(Store, {"name": name, "bits": 8}).bits == 8


def test_store_data_is_strict():
    class Mine(Store):
        def encode(self, weight):
            return {"w": weight}

        def decode(self, parts, shape, dtype):
            return parts["w"]

        def bits_per_weight(self):
            return 32.0

    with pytest.raises(SettingsError, match="Mine has no name"):
        to_data(Mine())
    with pytest.raises(SettingsError, match="store.scale_dtype='float64': expected one of"):
        from_data(Store, {"name": "nested_float", "scale_dtype": "float64"}, "store")
    for data in (3, {"bits": 4}, {"name": 4}, "mixed"):
        with pytest.raises(SettingsError, match="store"):
            from_data(Store, data, "store")
