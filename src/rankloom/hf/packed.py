"""Models with packed weights as folders: configuration and tokenizer as transformers writes them, weights by parts.

The weights lie in `packed*.safetensors`, so that other libraries refuse the folder instead of reading half of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.targets import base_modules
from rankloom.errors import FileError, suggest
from rankloom.store.base import Packed
from rankloom.store.files import from_files, packed_shapes, to_files

METHOD = "rankloom"
PATTERN = "packed{suffix}.safetensors"
GLOB = "packed*.safetensors"


def is_packed(config: Any) -> bool:
    """Whether a model's configuration says that its weights are packed by us."""
    said = getattr(config, "quantization_config", None)
    return isinstance(said, Mapping) and said.get("quant_method") == METHOD


def save_packed(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the base of `model`, packed weights packed, into an empty folder; adapters do not count."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors, about = to_files(base_state(model))
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern=PATTERN)
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt", **about})
    config = {
        **model.config.to_dict(),
        "architectures": [_plain_class(model)],
        "quantization_config": {"quant_method": METHOD},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and kept buffer of the base, by its name; what is tied, once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        kept = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **kept}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{key}" if path else key] = tensor
    return found


def load_packed(cls: Any, config: Any, source: str, arguments: Mapping[str, Any]) -> Any:
    """The model of a folder that `save_packed` wrote, on the CPU, frozen where it is packed. Raises `FileError`."""
    tensors, about = _read(Path(source))
    with weights_on_meta():
        model = cls.from_config(_plain(config), **arguments)
    _take(model, from_files(tensors, about), source)
    return model


def skeleton_packed(cls: Any, config: Any, source: str, arguments: Mapping[str, Any]) -> Any:
    """The same model on the meta device, packed weights included."""
    _, about = _read(Path(source), values=False)
    with torch.device("meta"):
        model = cls.from_config(_plain(config), **arguments)
    for name, (store, shape, dtype) in packed_shapes(about).items():
        path, _, key = name.rpartition(".")
        packed = Packed(store.encode(torch.empty(shape, dtype=dtype, device="meta")), store, shape, dtype)
        model.get_submodule(path)._parameters[key] = nn.Parameter(packed, requires_grad=False)
    return model


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Modules that are made inside the block have their parameters on the meta device, and their buffers in memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _take(model: Any, state: dict[str, Tensor], source: str) -> None:
    """Give the model the tensors of a state dict; all of them, and nothing may be left without."""
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            owner = nn.Module()
        there = owner._parameters.get(key)
        there = owner._buffers.get(key) if there is None else there
        if there is None or there.shape != tensor.shape:
            shape = None if there is None else tuple(there.shape)
            raise FileError(
                f"{source}: tensor {name!r} of shape {tuple(tensor.shape)} has no place in a {type(model).__name__} "
                f"({shape}){suggest(name, dict(model.named_parameters()))}"
            )
        if key in owner._buffers:
            owner._buffers[key] = tensor
        else:
            owner._parameters[key] = nn.Parameter(tensor, requires_grad=not isinstance(tensor, Packed))
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise FileError(
            f"{source}: {len(missing)} tensors are missing, {missing[0]!r} the first; write the folder anew"
        )


def _read(folder: Path, values: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the weight files together."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob(GLOB))
    if not files:
        raise FileError(f"{folder}: its configuration says that the weights are packed, but there is no {GLOB}")
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                about |= file.metadata() or {}
                if values:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise FileError(f"{path}: {error}") from error
    return tensors, about


def _plain(config: Any) -> Any:
    del config.quantization_config
    return config


def _plain_class(model: Any) -> str:
    cls = type(model)
    return str(getattr(cls, "rankloom_original", cls).__name__)
