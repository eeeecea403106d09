"""What a weights file claims is compared with the model before a number of it is read."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc

import pytest
from formats_tiny import bare, edit_config, net, saved

import rankloom as rl
from rankloom.errors import FileError
from rankloom.files.reading import File
from rankloom.formats import inspect

KEY = "base_model.model.layers.0.q.lora_A.weight"
GB = 1 << 30


def claim(folder, header, size):
    """A weights file with this header and `size` bytes behind it that take no place on the disk."""
    raw = json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + size)
    assert path.stat().st_blocks * 512 < 1 << 18


def tensor(shape, start, size, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def honest(folder):
    raw = (folder / "adapter_model.safetensors").read_bytes()
    found = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    found.pop("__metadata__", None)
    return found, max(t["data_offsets"][1] for t in found.values())


def cases(head, end):
    return {
        "one huge tensor": ({KEY: tensor([GB // 2], 0, 2 * GB)}, 2 * GB),
        "a huge rank": ({KEY: tensor([GB // 16, 8], 0, 2 * GB)}, 2 * GB),
        "float64": ({KEY: tensor([GB // 4], 0, 2 * GB, "F64")}, 2 * GB),
        "bytes": ({KEY: tensor([2 * GB], 0, 2 * GB, "U8")}, 2 * GB),
        "beside honest tensors": ({**head, "x": tensor([GB], end, GB, "U8")}, end + GB),
        "a copy of the base": ({**head, "layers.0.q.weight": tensor([GB // 4], end, GB)}, end + GB),
        "many": ({f"t{i}": tensor([1 << 22], i << 24, 1 << 24) for i in range(200)}, 200 << 24),
        "a thousand empty ones": ({**{f"t{i}": tensor([0], 0, 0) for i in range(1000)}, KEY: tensor([GB], 0, 4 * GB - 999)}, 4 * GB - 999),
    }  # fmt: skip


@pytest.mark.parametrize("case", range(8))
def test_a_small_file_that_claims_gigabytes_is_refused_unread(case, tmp_path, monkeypatch):
    folder = bare(tmp_path / "a")
    claim(folder, *list(cases(*honest(folder)).values())[case])
    model = net()
    monkeypatch.setattr(File, "take_into", lambda self, buffer: _small(self, buffer))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FileError, match=r"adapter_(model\.safetensors|config\.json)"):
        rl.load(model, folder)
    assert time.process_time() - start < 1.0
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert not hasattr(model, "rankloom")


TAKE = File.take_into


def _small(file, buffer):
    assert len(buffer) < 1 << 20, "the numbers are read"
    TAKE(file, buffer)


def test_what_info_says_of_it_takes_no_memory(tmp_path):
    folder = bare(tmp_path / "a")
    claim(folder, {KEY: tensor([GB // 2], 0, 2 * GB)}, 2 * GB)
    tracemalloc.start()
    assert inspect(folder).bytes > 2 * GB
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_info_still_compares_the_digest(tmp_path):
    folder = saved(tmp_path / "a")
    assert inspect(folder).verified
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="is not the file that was saved"):
        inspect(folder)


def test_a_rank_that_config_and_file_agree_on_is_within_the_limits(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, r=4097)
    with pytest.raises(FileError, match="a rank is from 1 to 4096"):
        rl.load(net(), folder)
