"""Parts of a model by what they are: the towers of multimodal models, and experts that are fused into parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from rankloom.core.kinds import kind_of
from rankloom.errors import TargetError

TOWERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "language": (("text_config", "llm_config", "language_config"), ("language_model", "text_model", "text_decoder")),
    "vision": (
        ("vision_config", "vit_config", "image_config"),
        ("vision_tower", "vision_model", "visual", "image_encoder", "vision_encoder"),
    ),
    "audio": (("audio_config", "speech_config"), ("audio_tower", "audio_model", "audio_encoder", "speech_encoder")),
}
"""Word → names of the part's config inside the model's, and of its module where no config tells."""
EXPERTS = "all-experts"
"""In `target_parameters`: every matrix of experts that a model keeps stacked, (experts, out, in)."""


def tower(model: nn.Module, modules: Mapping[str, nn.Module], word: str) -> str:
    """Path of the part of a multimodal model that `word` means. Raises `TargetError` naming those that it has."""
    path = _found(model, modules, word)
    if path is None:
        known = [other for other in TOWERS if _found(model, modules, other) is not None]
        has = (
            f"it has {', '.join(map(repr, known))}"
            if known
            else "it is not made of towers; 'all-linear' takes all of it"
        )
        raise TargetError(f"target_modules={word!r}: {type(model).__name__} has no such part; {has}")
    return path


def _found(model: nn.Module, modules: Mapping[str, nn.Module], word: str) -> str | None:
    configs, names = TOWERS[word]
    own = getattr(model, "config", None)
    kinds = {type(said) for key in configs if (said := getattr(own, key, None)) is not None}
    by_config = (path for path, module in modules.items() if path and type(getattr(module, "config", None)) in kinds)
    by_name = (path for path in modules if path.rpartition(".")[2] in names)
    found = [*(by_config if type(own) not in kinds else ()), *by_name]
    return min(found, key=lambda path: path.count("."), default=None)


def fused_experts(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the parameters (experts, out, in) that hold the matrices of experts."""
    for path, module in modules.items():
        if "expert" not in f"{path}.{type(module).__name__}".lower() or kind_of(module) is not None:
            continue
        for key, value in module._parameters.items():
            if value is not None and value.ndim == 3 and value.is_floating_point():
                yield f"{path}.{key}" if path else key


def said_of_experts(names: Iterable[str]) -> dict[str, str]:
    """The first of fused experts that nothing targets, with what would."""
    left = list(names)
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    why = f"experts fused into a parameter{more}: target_parameters={EXPERTS!r} adapts them"
    return {left[0]: why} if left else {}
