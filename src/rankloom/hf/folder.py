"""A model's folder: one that appears whole or not at all, and one from a stranger, whose files stay in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankloom.errors import FileError, RankloomError, one_line
from rankloom.files import disk
from rankloom.files.folders import bring_up, drop, fixed, hidden_beside, hidden_in, make_parents, put, real, writing
from rankloom.files.reading import Folder, opened
from rankloom.files.strict import parse
from rankloom.formats.header import LENGTH, header_size
from rankloom.formats.limits import Limits

LAST = "config.json"
"""What makes a folder a model."""
INDEX = "model.safetensors.index.json"
INDICES = (INDEX, "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "tekken.json", "*.tiktoken", "*.spm")
LARGEST_INDEX = 64 << 20
"""Bytes of an index of weight files that is read."""


def check_folder(folder: Path) -> None:
    """Refuse a model's folder with a file that lies elsewhere, or is none: a pipe, a device, a link that leaves it.

    Raises `FileError`, without waiting for any of them.
    """
    with opened(folder) as found:
        for name in found.names():
            if not (folder / name).is_dir():
                with found.opened(name):
                    """It is a plain file of this folder."""
        for name in INDICES:
            if found.has(name):
                _listed(found, name)


def weight_files(folder: Path) -> list[str]:
    """The weight files that the index of a folder names, each once; none where there is no index."""
    with opened(folder) as found:
        return list(dict.fromkeys(_listed(found, INDEX).values())) if found.has(INDEX) else []


def broken_weights(folder: Path) -> str | None:
    """What is wrong with the first weight file of a folder that is not whole."""
    try:
        shapes_in(folder)
    except FileError as error:
        return f"{error}; the file is damaged or not all there: download it again"
    return None


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the weight files of a folder. Raises `FileError` for a file that is not whole."""
    found: dict[str, tuple[int, ...]] = {}
    with opened(folder) as there:
        for name in there.names():
            if name.endswith(".safetensors"):
                found |= _shapes(there, name)
    return found


def _shapes(folder: Folder, name: str) -> dict[str, tuple[int, ...]]:
    with folder.opened(name) as file:
        where = str(file.path)
        length = header_size(file.take(min(LENGTH, file.size)), file.size, where, Limits(header=LARGEST_INDEX))
        said = parse(file.take(length), where)
        said.pop("__metadata__", None)
        try:
            end = max((tensor["data_offsets"][1] for tensor in said.values()), default=0)
            shapes = {key: tuple(map(int, tensor["shape"])) for key, tensor in said.items()}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileError(f"{where}: its header is none of tensors ({error!r})") from error
        if end != file.size - LENGTH - length:
            raise FileError(f"{where}: {file.size:,} bytes, of {LENGTH + length + end:,} that its header names")
    return shapes


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer is made of."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZERS)


def _listed(folder: Folder, index: str) -> dict[str, str]:
    where = str(folder.path / index)
    said = parse(folder.read(index, LARGEST_INDEX), where).get("weight_map")
    if not isinstance(said, dict):
        raise FileError(f"{where}: 'weight_map' is no object of tensors and files: download it again")
    for name in set(map(str, said.values())):
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise FileError(f"{where}: names {name!r}, which is no file of this folder")
        if not folder.has(name):
            raise FileError(f"{folder.path / name}: no such file, but {index} names it: download it again")
    return said


@contextmanager
def model_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to fill; at the end of the block it is forced to disk and becomes `out`.

    Where `out` cannot be exchanged for another folder (`fixed`), the hidden one lies in it, and its files come up.
    """
    out = real(out)
    inside = out.is_dir() and fixed(out)
    hidden = hidden_in(out) if inside else hidden_beside(out)
    with writing(out), _native_errors(out):
        try:
            make_parents(hidden)
            disk.make(hidden)
            yield hidden
            _sync(hidden)
            if inside:
                bring_up(hidden, sorted(os.listdir(hidden), key=lambda name: name == LAST))
            else:
                put(hidden, out)
        finally:
            drop(hidden)


@contextmanager
def _native_errors(out: Path) -> Iterator[None]:
    """What the disk says to libraries written in Rust, as one message: they have exceptions of their own for it."""
    try:
        yield
    except (RankloomError, OSError):
        raise
    except Exception as error:
        if "(os error" not in str(error):
            raise
        raise FileError(
            f"{out}: cannot be written: {one_line(str(error))}; free space, or give another out="
        ) from error


def folder_size(folder: Path) -> int:
    """Bytes of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        disk.sync(path)
    disk.sync(folder)
