"""Models and tokenizers of transformers, from a folder, a hub id or the embedded world; real, or bare skeletons."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankloom.core.plan import Plan
from rankloom.errors import FileError, MissingExtra, RankloomError, SettingsError, one_line, suggest
from rankloom.hf.classes import Head, head_of
from rankloom.hf.folder import LAST, broken_weights, check_folder, holds_tokenizer, shapes_in
from rankloom.hf.packed import is_packed, load_packed, skeleton_packed
from rankloom.train.config import ModelSettings, Task

EMBEDDED = "microworld"
WHOLE: dict[str, Any] = {"missing_keys": (), "unexpected_keys": ()}
"""What loading says of a model that lacks nothing."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COUNTED, MOST = re.compile(r"(layers?|experts?|blocks?|depth)$"), 4096
"""Names of numbers by which modules are made, and the largest of them."""
CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    `tokenizer`: None where it was not asked for; `source`: the folder or hub id; `task`: as resolved; `heads`: modules
    that this task puts on the base and those that the files do not have: they start at random, so they train whole and
    are saved; `notes`: what a user ought to know about the loading.
    """

    model: Any
    tokenizer: Any
    source: str
    task: Task
    heads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_model(settings: ModelSettings, form: str | None = None, labels: Sequence[str] = ()) -> Loaded:
    """The model with its weights, and its tokenizer.

    Args:
        settings: which, and how.
        form: format of the data (`classification`, `messages`, `text` …), which decides an `auto` task.
        labels: class names of a classification.

    Raises:
        FileError: the folder or hub id does not hold such a model, or cannot be reached (HF_HUB_OFFLINE is named).
        SettingsError: task, labels and model do not fit together.
    """
    loaded = load_weights(settings, form, labels)
    return replace(loaded, tokenizer=load_tokenizer(settings))


def load_weights(settings: ModelSettings, form: str | None = None, labels: Sequence[str] = ()) -> Loaded:
    """The same without a tokenizer."""
    source, config, task = _config(settings, form, labels)
    _check_bare(source, settings)
    device = device_of(settings.device)
    dtype = _dtype(settings.dtype, config, device)
    cls = _class(task)
    fresh = {"ignore_mismatched_sizes": True} if settings.head == "new" else {}
    with _explained(source, "a model"), quiet():
        if is_packed(config):
            model, info = load_packed(cls, config, source, _dtype_argument(dtype)), WHOLE
        else:
            try:
                model, info = cls.from_pretrained(
                    source,
                    config=config,
                    output_loading_info=True,
                    **fresh,
                    **_dtype_argument(dtype),
                    **_remote(settings),
                )
            except RuntimeError as error:
                _check_shapes(source, skeleton(settings, form, labels).model)
                raise error
    heads = (*_heads(model, task), *_unwritten(model, info["missing_keys"], task))
    notes = list(_loading_notes(source, info, heads))
    if task == "classification" and settings.head == "new":
        _begin_anew(model, _heads(model, task))
        notes.append(f"model.head=new: {', '.join(_heads(model, task))} starts at random")
    model.name_or_path = settings.path
    return Loaded(
        model=model.to(device).eval(),
        tokenizer=None,
        source=source,
        task=task,
        heads=heads,
        notes=tuple(notes),
    )


def skeleton(settings: ModelSettings, form: str | None = None, labels: Sequence[str] = ()) -> Loaded:
    """The model on the meta device: every name, shape and dtype, no values and no memory. Raises as `load_model`."""
    source, config, task = _config(settings, form, labels)
    dtype = _dtype(settings.dtype, config, device_of(settings.device))
    arguments = {**_dtype_argument(dtype), "trust_remote_code": settings.trust_remote_code}
    with _explained(source, "a model"), torch.device("meta"):
        if is_packed(config):
            model = skeleton_packed(_class(task), config, source, arguments)
        else:
            model = _class(task).from_config(config, **arguments)
    return Loaded(model, None, source, task, _heads(model, task))


def load_tokenizer(settings: ModelSettings) -> Any:
    """The fast tokenizer of the model. Raises `FileError` where there is none."""
    found = find_tokenizer(settings)
    if found is None:
        raise FileError(
            f"{settings.path}: no tokenizer in this folder: put the files of the model's there, as "
            "tokenizer.save_pretrained(folder) does"
        )
    return found


def find_tokenizer(settings: ModelSettings) -> Any:
    """The same, or None where the folder has none: one without a word is what transformers makes of nothing."""
    source = find_model(settings.path)
    with _explained(source, "a tokenizer"):
        try:
            found = _transformers().AutoTokenizer.from_pretrained(source, **_remote(settings))
        except (OSError, ValueError):
            if not Path(source).is_dir() or holds_tokenizer(Path(source)):
                raise
            return None
        return found if set(found.get_vocab()) - set(found.all_special_tokens) else None


def _check_shapes(source: str, bare: Any) -> None:
    """Refuse weight files of other shapes than the configuration makes."""
    wanted = {name: tuple(value.shape) for name, value in bare.state_dict().items()}
    inner = f"{bare.base_model_prefix}."
    for name, shape in shapes_in(Path(source)).items():
        made = next((wanted[n] for n in (name, inner + name, name.removeprefix(inner)) if n in wanted), shape)
        if made != shape:
            raise FileError(
                f"{source}: its weights do not fit its config.json: {name!r} has shape {shape}, the configuration "
                f"makes it {made}; download the folder again, or mend config.json"
            )


def architectures(settings: ModelSettings) -> tuple[str, ...]:
    """The model classes that its configuration names."""
    return tuple(_read_config(settings, find_model(settings.path)).architectures or ())


def _check_bare(source: str, settings: ModelSettings) -> None:
    """Refuse a model with an adapter beside it: transformers would let PEFT put that into the base, unasked."""
    with _explained(source, "a model"):
        found = _transformers().utils.find_adapter_config_file(source, revision=settings.revision)
    if found is not None:
        raise FileError(
            f"{source}: holds a model and an adapter (adapter_config.json), which would become part of the base: keep "
            "the adapter's files in a folder of their own"
        )


def find_model(path: str) -> str:
    """The folder or hub id that `path` means. Raises `FileError` for a folder without a model, or a path to nowhere."""
    if path == EMBEDDED:
        from rankloom.microworld import base_path

        path = str(base_path())
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / LAST).is_file():
            check_folder(folder)
            return str(folder)
        if (folder / "adapter_config.json").is_file():
            raise FileError(f"{path}: an adapter folder, not a model: give its base as model= and this as adapter")
        there = ", ".join(sorted(x.name for x in folder.iterdir())[:8]) or "nothing"
        raise FileError(f"{path}: no model in this folder (no config.json); there is {there}")
    if folder.exists() or not HUB_ID.fullmatch(path) or path.startswith("."):
        near = [x.name for x in folder.parent.iterdir() if x.is_dir()] if folder.parent.is_dir() else []
        what = "a file, not a model's folder" if folder.exists() else "no such folder"
        raise FileError(f"{path}: {what}{suggest(folder.name, near) or '; check the path'}")
    return path


def model_files(settings: ModelSettings) -> Path:
    """The folder with the model's files; those of a hub id come into the local cache."""
    source = find_model(settings.path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with _explained(source, "weight files"):
        return Path(snapshot_download(source, revision=settings.revision, allow_patterns=["*.safetensors", "*.json"]))


def with_heads(plan: Plan, heads: Sequence[str]) -> Plan:
    """The plan with the task's heads trained whole, unless they are named already."""
    missing = tuple(h for h in heads if h not in plan.modules_to_save)
    return replace(plan, modules_to_save=(*plan.modules_to_save, *missing)) if missing else plan


def known_head(settings: ModelSettings) -> Head | None:
    """The classifier that the model's files have and that is to be kept, if there is one."""
    if settings.head == "new":
        return None
    source = find_model(settings.path)
    return _head(_read_config(settings, source), source, settings.path)


def task_of(settings: ModelSettings, form: str | None) -> Task:
    """What the model is loaded for, given data of a format."""
    return resolve_task(settings.task, form, _read_config(settings, find_model(settings.path)))


def resolve_task(task: Task, form: str | None, config: Any) -> Task:
    """`auto` by the format of the data and the model's configuration: `classification`, `masked-lm`, else
    `causal-lm`.
    """
    if task == "auto":
        if form == "classification":
            return "classification"
        return "masked-lm" if form == "text" and _masked(config) else "causal-lm"
    if form is None:
        return task
    if task == "encoder":
        raise SettingsError("model.task='encoder' has no loss of its own: use rankloom.fit with a loss, or task=auto")
    fits = {"classification": form == "classification", "masked-lm": form == "text"}
    if not fits.get(task, form != "classification"):
        raise SettingsError(f"model.task={task!r} does not fit data in the form {form!r}; use task=auto")
    return task


def _masked(config: Any) -> bool:
    """Whether a configuration is that of an encoder that predicts hidden tokens, not the next one."""
    names = config.architectures or ()
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    known = config.model_type in _transformers().models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known and not causal and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def _read_config(settings: ModelSettings, source: str) -> Any:
    """The model's configuration, with the `label2id` that its file says: transformers 5 reads `id2label` alone."""
    library = _transformers()
    with _explained(source, "a model"):
        said, _ = library.PretrainedConfig.get_config_dict(source, revision=settings.revision)
        config = library.AutoConfig.from_pretrained(source, **_remote(settings))
    if isinstance(said.get("label2id"), dict):
        config.label2id = said["label2id"]
    _check_counts(said, source)
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise FileError(f"{source}: its config.json says architectures={names!r}; expected a list of class names")
    return config


def _check_counts(said: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration that would make more layers than there are in any model."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            _check_counts(value, source)
        elif COUNTED.search(key) and type(value) is int and value > MOST:
            raise FileError(f"{source}: its config.json says {key}={value}; at most {MOST} are made")


def _head(config: Any, source: str, path: str) -> Head | None:
    with _explained(source, "the classes of a model"):
        return head_of(config, path)


def _config(settings: ModelSettings, form: str | None, labels: Sequence[str]) -> tuple[str, Any, Task]:
    source = find_model(settings.path)
    config = _read_config(settings, source)
    task = resolve_task(settings.task, form, config)
    if task == "causal-lm" and getattr(config, "is_encoder_decoder", False):
        raise SettingsError(
            f"{source} is an encoder-decoder ({config.model_type}); text data trains decoder-only models here: "
            "use rankloom.fit with batches of your own, or model.task=encoder to look at it"
        )
    if task == "causal-lm" and form is not None and form != "text" and _masked(config):
        raise SettingsError(
            f"{source} predicts hidden tokens ({config.model_type}), so it cannot answer in a conversation: give it "
            "running text (a column 'text') or texts with a label, or use a causal model"
        )
    head = _head(config, source, settings.path) if settings.head == "keep" else None
    if labels and head is not None:
        head.check(labels)
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return source, config, task


def _begin_anew(model: Any, heads: Sequence[str]) -> None:
    """Fresh values for every tensor of the heads."""
    for module in (m for head in heads for m in model.get_submodule(head).modules()):
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            continue
        for parameter in module.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.02)


def _heads(model: Any, task: str) -> tuple[str, ...]:
    if task != "classification":
        return ()
    children = dict(model.named_children())
    return tuple(
        name
        for name, child in children.items()
        if child is not model.base_model and any(True for _ in child.parameters())
    )


def _unwritten(model: Any, missing: Iterable[str], task: str) -> Iterator[str]:
    """Modules beside the heads with tensors that the files do not have."""
    heads = tuple(f"{head}." for head in _heads(model, task))
    if task != "encoder":
        yield from dict.fromkeys(key.rpartition(".")[0] for key in sorted(missing) if not key.startswith(heads))


def _loading_notes(source: str, info: dict[str, Any], heads: Sequence[str]) -> Iterator[str]:
    missing, unread = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        whole = f"; trained whole: {', '.join(heads)}" if heads else ""
        yield f"{len(missing)} tensors are not in {source} and start at random: {', '.join(missing[:4])}{whole}"
    if unread:
        yield f"{len(unread)} tensors of {source} are not used by this task: {', '.join(unread[:4])} …"


def _class(task: str) -> Any:
    return getattr(_transformers(), CLASSES[task])


def device_of(name: str) -> torch.device:
    """The device that `name` means here. Raises `SettingsError` for one that is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SettingsError(
                f"model.device={name!r}: each of the {os.environ['WORLD_SIZE']} processes has a device of its own: "
                f"use auto or {device.type}"
            )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SettingsError(f"model.device={name!r}: {reason}; use auto, cpu, cuda, cuda:1 or mps") from error
    return device


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    said = config.to_dict()
    word = said.get("dtype") or said.get("torch_dtype") or "float32"
    found = getattr(torch, str(word).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise FileError(
            f"{config.name_or_path}: its config.json says dtype={word!r}; mend it, or give model.dtype=float32"
        )
    return torch.promote_types(found, torch.float32) if device.type == "cpu" else found


def _dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """Named `dtype` from transformers 4.56 on."""
    version = tuple(int(x) for x in re.findall(r"\d+", _transformers().__version__)[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def _remote(settings: ModelSettings) -> dict[str, Any]:
    """Said even where it is false, for transformers would ask standard input otherwise."""
    found: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    return {**found, "revision": settings.revision} if settings.revision is not None else found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "loading a model") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No report of missing tensors (the notes tell it), and no progress bar unless a person is watching."""
    from rankloom.train.report import on_terminal

    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not on_terminal():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    """What transformers raises, as one message with the next step."""
    try:
        yield
    except RankloomError:
        raise
    except Exception as error:  # broken files make any code of the library fail, in any way
        raise FileError(_told(source, what, error)) from error


def _told(source: str, what: str, error: Exception) -> str:
    reason = one_line(str(error))[:300].strip() or type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"{source}: {what} that is Python code of its own, which is not run: add trust_remote_code=true to the "
            "command if you trust it"
        )
    if Path(source).is_dir():
        return broken_weights(Path(source)) or f"{source}: {what} cannot be loaded from this folder: {reason}"
    near = suggest(source, [EMBEDDED])
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return (
            f"{source!r} is no folder here and not in the local cache, and HF_HUB_OFFLINE=1 forbids the "
            f"download of {what}: unset it, or give a folder{near} ({reason})"
        )
    return (
        f"{source!r} is no folder here, and the hub does not give {what} under that id: {reason}; check the "
        f"spelling, the network, and access (huggingface-cli login){near}"
    )
