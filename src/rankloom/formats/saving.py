"""Saving an adapter: a PEFT folder where PEFT can hold it, else our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom import __version__
from rankloom.core.attach import bank_of
from rankloom.core.bank import Bank
from rankloom.core.graft import Grafted
from rankloom.core.plan import plan_data, plan_from_data
from rankloom.errors import SettingsError, StateError
from rankloom.files.manifest import sealed
from rankloom.files.strict import as_json
from rankloom.formats import folds, hub
from rankloom.formats.base import base_name
from rankloom.formats.basecheck import saved_print
from rankloom.formats.card import render
from rankloom.formats.compat import Compat, compat
from rankloom.formats.entry import Entry
from rankloom.formats.folder import place
from rankloom.formats.heads import warn_of_heads
from rankloom.formats.limits import Limits
from rankloom.formats.manifest import CARD, CONFIG, KIND, WEIGHTS, check_readable
from rankloom.formats.native import Native, portable
from rankloom.formats.peft import translator_for
from rankloom.formats.view import View, view
from rankloom.registry import name_of

FOLDED = "changes were folded into the base, which PEFT's files do not hold; export(as_='lora') writes them in one LoRA"


@dataclass(frozen=True)
class SaveReport:
    """What was written: `format` "peft" or "rankloom"; `compat` as text says who else can load it; `pushed`: where."""

    folder: Path
    format: str
    peft_type: str
    tensors: int
    parameters: int
    bytes: int
    compat: Compat
    notes: tuple[str, ...] = ()
    pushed: str | None = None


@dataclass(frozen=True)
class Parcel:
    """An adapter's folder before it is written: its files, what its manifest says besides, and what its card tells."""

    files: Mapping[str, bytes]
    manifest: Mapping[str, Any]
    about: Mapping[str, Any]
    peft_type: str
    notes: tuple[str, ...]

    def write(self, folder: str | Path, card: Mapping[str, Any], push_to: str | None = None) -> SaveReport:
        """Write the folder, whole or not at all; then bring it to the hub, if told so."""
        text = render(card, self.about).encode()
        written = place(Path(folder), {**sealed(self.files, {"kind": KIND, **self.manifest}), CARD: text})
        return SaveReport(
            folder=written,
            format=self.about["library"],
            peft_type=self.peft_type,
            tensors=self.about["tensors"],
            parameters=self.about["parameters"],
            bytes=len(self.files[WEIGHTS]),
            compat=self.about["compat"],
            notes=self.notes,
            pushed=hub.push(written, push_to) if push_to is not None else None,
        )


def save(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    card: Mapping[str, Any] | None = None,
    push_to: str | None = None,
    limits: Limits | None = None,
) -> SaveReport:
    """Write the adapter `name` as a folder: config, safetensors, manifest (sizes, SHA-256, plan) and model card.

    PEFT's format where PEFT has the method, else ours (`peft_type` RANKLOOM). The folder appears whole or not at all.
    `card`: more for the card (title, description, data, metrics, settings, license, language, tags, intended_use).
    `push_to`: a hub repository, "user/name". `limits`: those that whoever loads it will give too. Raises `StateError`
    for NaN or unloaded tensors and for what `load` would refuse by its limits, `FileError` if the disk refuses.
    """
    if push_to is not None:
        hub.check(push_to)
    return parcel(model, name, limits).write(folder, card or {}, push_to)


def parcel(model: nn.Module, name: str, limits: Limits | None = None) -> Parcel:
    """What `save` writes. Where the base is split over several processes, each of them has to ask."""
    bank = bank_of(model)
    with bank.lock:
        return parcel_of(view(bank, name), bank if bank.journal.folds else None, limits)


def parcel_of(view: View, folded: Bank | None = None, limits: Limits | None = None) -> Parcel:
    """A sorted adapter, as PEFT's translator writes it where nothing keeps it from that format. `folded`: the bank
    whose journal goes along.
    """
    translator, problems = translator_for(view)
    problems = problems if folded is None else [*problems, FOLDED]
    native = problems or translator is None
    writer: Any = Native() if native else translator
    tensors = collect([*writer.entries(view), *(() if folded is None else folds.entries(folded.journal))])
    plan = _plan_data(view)
    manifest = {
        "versions": {"rankloom": __version__, "torch": torch.__version__},
        "plan": plan,
        "base": saved_print(view),
    }
    config = writer.config(view) | ({} if folded is None else folds.config(folded))
    verdict = compat(config, {site.kind.name for site, _ in view.adapted}, problems, _class_name(view.model))
    about = {
        **_described(view, bool(native)),
        "compat": verdict,
        "parameters": sum(t.numel() for t in tensors.values()),
        "settings": manifest["plan"],
        "tensors": len(tensors),
        "versions": manifest["versions"],
    }
    files = {CONFIG: as_json(config), WEIGHTS: _bytes(tensors)}
    check_readable(files, plan, tensors, limits or Limits())
    warn_of_heads(view)
    return Parcel(files, manifest, about, config["peft_type"], (*writer.notes(view), *_store_notes(view)))


def _class_name(model: nn.Module) -> str:
    return (type(model).rankloom_original if isinstance(model, Grafted) else type(model)).__name__


def collect(entries: list[Entry]) -> dict[str, Tensor]:
    """The file's tensors on the CPU. Raises `StateError` for one that is not loaded or not finite, by name."""
    found: dict[str, Tensor] = {}
    for entry in entries:
        tensor = entry.get()
        if tensor.device.type == "meta":
            raise StateError(f"{entry.key!r} is on the meta device: there are no numbers to save")
        tensor = tensor.to("cpu", copy=True).contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StateError(
                f"{entry.key!r} has NaN or infinite values: the training went wrong, and nothing is written"
            )
        if entry.key in found:
            raise StateError(f"two tensors of the adapter have the same name in the file: {entry.key!r}")
        found[entry.key] = tensor
    return found


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata={"format": "pt"})


def _plan_data(view: View) -> dict[str, Any]:
    """The plan as data that can be read back."""
    try:
        data = plan_data(portable(view))
        plan_from_data(data)
    except SettingsError as error:
        raise SettingsError(
            f"the plan cannot be written down ({error}); register your own methods and rules by name: "
            "rankloom.registry.register('mine', 'package.module:Mine', kind='rule')"
        ) from error
    return data


def _store_notes(view: View) -> Iterator[str]:
    if view.plan.store is not None:
        base = (
            "that very base"
            if view.plan.start is not None
            else "the base model, which is packed the same way on loading"
        )
        yield f"trained on a base kept as {view.plan.store}: it belongs on {base}"


def _described(view: View, native: bool) -> dict[str, Any]:
    method = type(view.plan.method)
    registered = name_of(method) or method.__name__
    base = base_name(view.model)
    ours = ["import rankloom", f'rankloom.load(model, "path/to/folder", name="{view.name}")']
    peft = ["from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "path/to/folder")', ""]
    return {
        "base": base,
        "library": "rankloom" if native else "peft",
        "method": registered,
        "name": view.name,
        "tags": ["rankloom", registered, *([] if native else ["peft"])],
        "usage": ours if native else [*peft, *["# or, with Rankloom", *ours]],
    }
