"""From names to sites: which layers and parameters of a model a plan means. Whatever matches nothing is an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from rankloom.core.faithful import computed_weight, faithful, own_weight
from rankloom.core.graft import Grafted
from rankloom.core.kinds import Bare, kind_of
from rankloom.core.patterns import check_searched, fullmatches
from rankloom.core.plan import Plan
from rankloom.core.site import LAYER, Site
from rankloom.core.towers import EXPERTS, TOWERS, fused_experts, said_of_experts, tower
from rankloom.errors import SettingsError, TargetError, suggest
from rankloom.store.bridges import bridge_of


@dataclass(frozen=True)
class Resolution:
    """The sites of a plan: adapted, trained whole, and (by embedding name) with trained rows."""

    adapted: tuple[Site, ...]
    whole: tuple[Site, ...]
    tokens: tuple[tuple[Site, tuple[int, ...], str], ...]


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules() of the base alone, as often as a module is there: without the adapters."""
    waiting = [(prefix, model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        if not module._modules:
            continue
        grafted = isinstance(module, Grafted)
        stem = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and not (grafted and name == "adapters"):
                waiting.append((stem + name, child))


def has_at(model: nn.Module, path: str, layer: nn.Module) -> bool:
    """Whether `layer` is the module of that name."""
    found: nn.Module | None = model
    for part in path.split(".") if path else ():
        found = None if found is None else found._modules.get(part)
    return found is layer


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path of owner, owner, key, tensor) of every parameter of the base, tied ones once for each owner."""
    for path, module in base_modules(model):
        for key, value in module._parameters.items():
            if value is not None:
                yield path, module, key, value


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, but for the output head."""
    return {name: module for name, module in _linear_by_class(model).items() if not _left_out(module)}


def _linear_by_class(model: nn.Module) -> dict[str, nn.Module]:
    head = _output_head(model)
    found = {name: (module, kind_of(module)) for name, module in base_modules(model) if module is not head}
    return {name: module for name, (module, kind) in found.items() if kind is not None and kind.linear}


def _left_out(layer: nn.Module) -> str:
    """Why "all-linear" leaves out a layer of a linear class; "" where it does not."""
    kind = kind_of(layer)
    assert kind is not None
    if type(layer) is nn.Linear and type(layer._parameters.get("weight")) is nn.Parameter:
        return ""
    if isinstance(layer, torch.jit.ScriptModule):
        return "scripted"
    if not own_weight(layer):
        return "its weight is computed anew in every call"
    if isinstance(layer._parameters["weight"], UninitializedParameter):
        return ""
    return "" if faithful(layer, kind) else "its forward is more than a product: by name, its weight is adapted"


def resolve(model: nn.Module, plan: Plan) -> Resolution:
    """Every site that `plan` means in `model`. Raises `TargetError` with near matches for a name that hit nothing."""
    modules = dict(base_modules(model))
    saved = _saved_modules(modules, plan)
    if plan.sites:
        named, parameters = _exact_sites(modules, plan.sites, saved)
    else:
        named, parameters = _target_layers(model, modules, plan, saved), _target_parameters(modules, plan)
    kept = _in_blocks([*named, *parameters], plan)
    layers = [name for name in named if name in kept]
    sites = [site for path in layers for site in _sites_of(path, modules)]
    adapted = tuple(_unique(sites + [site for name, site in parameters.items() if name in kept]))
    if not adapted and not saved and not plan.trainable_token_indices:
        raise TargetError(
            "the plan adapts nothing: target_modules, target_parameters and modules_to_save are all empty"
        )
    _check_patterns(plan, adapted)
    whole = [site for path in saved for site in _all_tensors(path, modules[path])]
    if plan.bias != "none":
        owners = modules if plan.bias == "all" else layers
        whole += [site for path in owners for site in _biases(path, modules[path])]
    tokens = tuple(_tokens(model, modules, plan))
    for site, _, _ in tokens:
        if any(site.layer is w.layer for w in whole):
            raise TargetError(f"{site.path!r} is trained whole and by rows (trainable_token_indices): drop one")
    return Resolution(adapted, tuple(_unique(whole)), tokens)


def matches(target: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: a list matches whole names or dotted suffixes, a string is a regular expression for whole names."""
    if isinstance(target, str):
        return fullmatches(target, name)
    return any(name == t or name.endswith("." + t) for t in target)


def below(target: str | Sequence[str], name: str) -> bool:
    """Whether the target matches `name` or a module that it lies in."""
    ends = [i for i, letter in enumerate(name) if letter == "."]
    return any(matches(target, name[:end]) for end in (*ends, len(name)))


def pattern_key(patterns: Iterable[str], name: str) -> str | None:
    """The first key of a rank or alpha pattern that matches the end of `name`."""
    return next((key for key in patterns if fullmatches(rf"(?:.*\.)?(?:{key})", name)), None)


def block_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """Index of the block that `name` lies in: after `layers_pattern`, or the first number in the name."""
    found = _block(name, layers_pattern)
    return None if found is None else int(found[1])


def block_path(name: str, layers_pattern: str | Sequence[str] | None) -> str | None:
    """Name of the block that `name` lies in."""
    found = _block(name, layers_pattern)
    return None if found is None else name[: found.end(1)]


def _block(name: str, layers_pattern: str | Sequence[str] | None) -> re.Match[str] | None:
    if not layers_pattern:
        return re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns:
        check_searched(pattern)
    tried = (re.search(rf"(?:^|\.){pattern}\.(\d+)(?:\.|$)", name) for pattern in patterns)
    return next((found for found in tried if found is not None), None)


def hidden_width(model: nn.Module) -> int | None:
    """Width of the hidden states that pass from block to block, as the config or the output head tells; else None."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    said = getattr(nested() if callable(nested) else config, "hidden_size", None)
    if isinstance(said, int):
        return said
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    width = getattr(head, "in_features", None)
    return width if isinstance(width, int) else None


def _target_layers(model: nn.Module, modules: dict[str, nn.Module], plan: Plan, saved: list[str]) -> list[str]:
    under_saved = tuple(f"{s}." for s in saved)
    names = [n for n in modules if n not in saved and not n.startswith(under_saved)] if saved else list(modules)
    if plan.target_modules == "all-linear" or plan.target_modules in TOWERS:
        chosen = _all_linear(model, modules, names, plan)
    else:
        _each_matches("target_modules", plan.target_modules, list(modules))
        chosen = [n for n in names if matches(plan.target_modules, n)]
    if plan.exclude_modules:
        _each_matches("exclude_modules", plan.exclude_modules, list(modules))
        chosen = [n for n in chosen if not below(plan.exclude_modules, n)]
    if not chosen and plan.target_modules:
        raise TargetError(
            f"target_modules={plan.target_modules!r}: nothing is left after exclude_modules={plan.exclude_modules!r} "
            f"and modules_to_save={plan.modules_to_save!r}"
        )
    for name in chosen:
        _adaptable(name, modules)
    return chosen


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], names: list[str], plan: Plan) -> list[str]:
    """Every linear layer of the model, or of one of its towers; says what is left out."""
    word, linear = str(plan.target_modules), _linear_by_class(model)
    if word in TOWERS:
        top = tower(model, modules, word)
        names = [n for n in names if n == top or n.startswith(f"{top}.")]
    names = [n for n in names if not plan.exclude_modules or not below(plan.exclude_modules, n)]
    left_out = {n: why for n in names if n in linear and (why := _left_out(linear[n]))}
    chosen = [n for n in names if n in linear and n not in left_out]
    if not chosen and not plan.exclude_modules:
        found = (
            f", but for {next(iter(left_out))!r}, which is left out: {next(iter(left_out.values()))}"
            if left_out
            else ""
        )
        raise TargetError(f"target_modules={word!r} found no linear layer in {type(model).__name__}{found}")
    experts = () if plan.target_parameters else fused_experts({n: modules[n] for n in names})
    _tell(word, {**left_out, **said_of_experts(experts)})
    return chosen


def _tell(word: str, left_out: Mapping[str, str]) -> None:
    if left_out:
        each = "; ".join(f"{name!r} ({why})" for name, why in list(left_out.items())[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        warnings.warn(f"target_modules={word!r} leaves out {each}{more}", stacklevel=7)


def _exact_sites(
    modules: dict[str, nn.Module], sites: Sequence[str], saved: list[str]
) -> tuple[list[str], dict[str, Site]]:
    """The layers and bare parameters of these very names."""
    wanted = set(sites)
    owners = {name.rpartition(".")[0] for name in sites}
    tensors = {
        f"{path}.{key}" if path else key: (path, module, key)
        for path, module in modules.items()
        if path in owners
        for key in module._parameters
        if _has(module, key)
    }
    for name in sites:
        if name not in modules and name not in tensors:
            known = [*modules, *(f"{p}.{k}" if p else k for p, m in modules.items() for k in m._parameters)]
            raise TargetError(f"sites: the model has no layer or parameter {name!r}{suggest(name, known)}")
        if any(name == s or name.startswith(f"{s}.") for s in saved):
            raise TargetError(f"sites: {name!r} lies in modules_to_save, which trains it whole: drop one")
    layers = [name for name in modules if name in wanted]
    for name in layers:
        _adaptable(name, modules)
    return layers, {name: _bare(*found) for name, found in tensors.items() if name in wanted and name not in modules}


def _in_blocks(chosen: list[str], plan: Plan) -> set[str]:
    if plan.layers_to_transform is None:
        if plan.layers_pattern:
            raise SettingsError(f"layers_pattern={plan.layers_pattern!r} needs layers_to_transform")
        return set(chosen)
    index = {name: block_index(name, plan.layers_pattern) for name in chosen}
    there = sorted({i for i in index.values() if i is not None})
    missing = [i for i in plan.layers_to_transform if i not in there]
    if missing:
        raise TargetError(f"layers_to_transform: no target in block {missing[0]}; targets lie in blocks {there}")
    return {name for name in chosen if index[name] in plan.layers_to_transform}


def _adaptable(name: str, modules: dict[str, nn.Module]) -> None:
    module = modules[name]
    if type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter:
        return  # nearly all, by the short way
    if getattr(module, "max_norm", None) is not None:
        raise TargetError(f"target_modules: {name!r} rescales its own rows (max_norm), which no adapter can follow")
    if isinstance(module, torch.jit.ScriptModule):
        raise TargetError(
            f"target_modules: {name!r} is compiled by torch.jit, and its code cannot be changed any more: attach the "
            "adapter before the layer is scripted or traced, or leave it out"
        )
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        raise TargetError(
            f"target_modules: {name!r} ({type(module).__name__}) has no shape before its first batch: call the model "
            "once, then attach"
        )
    computed = computed_weight(module)
    if computed:
        raise TargetError(
            f"target_modules: {name!r} computes its weight anew in every call, so there is nothing to merge into: make "
            f"it a plain one by {computed}, train it whole by modules_to_save=[{name!r}], or leave it out by "
            f"exclude_modules=[{name!r}]"
        )
    kind = kind_of(module)
    if kind is not None:
        if not faithful(module, kind) and kind.name.startswith("conv") and not kind.linear:
            raise TargetError(
                f"target_modules: {name!r} ({type(module).__name__}) does more in its forward than convolve with its "
                f"weight: train it whole by modules_to_save=[{name!r}], or leave it out by exclude_modules=[{name!r}]"
            )
        return
    if isinstance(module, nn.MultiheadAttention):
        return
    inside = [n for n in modules if n.startswith(f"{name}.") and kind_of(modules[n]) is not None]
    parameters = [f"{name}.{k}" for k, v in module._parameters.items() if v is not None and v.ndim > 1]
    if inside:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in inside})
        remedy = f"; name its layers instead: {', '.join(leaves)}"
    else:
        remedy = f"; pass target_parameters={parameters!r}" if parameters else ""
    raise TargetError(
        f"target_modules: {name!r} is a {type(module).__name__}, which cannot be adapted as a layer{remedy}"
    )


def _sites_of(path: str, modules: dict[str, nn.Module]) -> list[Site]:
    """The site of a layer; attention that reads its weights without calling a layer becomes parameter sites."""
    module = modules[path]
    if isinstance(module, nn.MultiheadAttention):
        keys = [k for k in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if _has(module, k)]
        own = [Site.of(path, module, key, Bare(key)) for key in keys]
        return [*own, Site.of(f"{path}.out_proj" if path else "out_proj", module.out_proj, "weight", Bare("weight"))]
    parent = modules.get(path.rpartition(".")[0]) if path else None
    if isinstance(parent, nn.MultiheadAttention):
        return [Site.of(path, module, "weight", Bare("weight"))]
    kind = kind_of(module)
    assert kind is not None
    if not faithful(module, kind):  # whatever its forward makes of the weight, it makes of the changed one
        return [Site.of(path, module, "weight", Bare("weight"))]
    return [Site.of(path, module, LAYER, kind)]


def _has(module: nn.Module, key: str) -> bool:
    return key in module._parameters and module._parameters[key] is not None


def _biases(path: str, module: nn.Module) -> list[Site]:
    return [_bare(path, module, "bias")] if _has(module, "bias") else []


def _bare(path: str, module: nn.Module, key: str) -> Site:
    if isinstance(module, torch.jit.ScriptModule):
        raise TargetError(f"{path!r} is compiled by torch.jit, and its code cannot be changed any more: leave it out")
    bridge = bridge_of(module._parameters.get(key))  # type: ignore[arg-type]
    if bridge is not None:
        raise TargetError(
            f"{'.'.join(filter(None, (path, key)))!r} is kept in few bits by {bridge.library}, which reads it past any "
            f"change: adapt the layer itself, target_modules=[{path!r}], or load the model in 16 bits"
        )
    return Site.of(path, module, key, Bare(key))


def _target_parameters(modules: dict[str, nn.Module], plan: Plan) -> dict[str, Site]:
    if not plan.target_parameters:
        return {}
    sites = {
        ".".join(filter(None, (path, key))): (path, module, key)
        for path, module in modules.items()
        for key, value in module._parameters.items()
        if value is not None
    }
    if plan.target_parameters == EXPERTS:
        experts = list(fused_experts(modules))
        if not experts:
            raise TargetError(f"target_parameters={EXPERTS!r}: this model keeps no experts stacked in a parameter")
        return {name: _bare(*sites[name]) for name in experts if not below(plan.exclude_modules, name)}
    _each_matches("target_parameters", plan.target_parameters, list(sites))
    return {name: _bare(*found) for name, found in sites.items() if matches(plan.target_parameters, name)}


def _saved_modules(modules: dict[str, nn.Module], plan: Plan) -> list[str]:
    if not plan.modules_to_save:
        return []
    _each_matches("modules_to_save", plan.modules_to_save, list(modules))
    found = [n for n in modules if matches(plan.modules_to_save, n)]
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def _all_tensors(path: str, module: nn.Module) -> Iterator[Site]:
    for inner, owner in base_modules(module, path):
        keys = [k for k, v in owner._parameters.items() if v is not None]
        keys += [k for k, v in owner._buffers.items() if v is not None and k not in owner._non_persistent_buffers_set]
        yield from (_bare(inner, owner, key) for key in keys)


def _tokens(model: nn.Module, modules: dict[str, nn.Module], plan: Plan) -> Iterator[tuple[Site, tuple[int, ...], str]]:
    wanted = plan.trainable_token_indices
    if not wanted:
        return
    if not isinstance(wanted, dict):
        find = getattr(model, "get_input_embeddings", None)
        embedding = find() if find is not None else None
        name = next((n for n, m in modules.items() if m is embedding), None) if embedding is not None else None
        if name is None:
            raise TargetError("trainable_token_indices: name the embedding, as in {'embed_tokens': [1, 2]}")
        wanted = {name: tuple(wanted)}  # type: ignore[arg-type]
    for target, indices in wanted.items():
        _each_matches("trainable_token_indices", (target,), list(modules))
        for name in [n for n in modules if matches((target,), n)]:
            yield from _token_sites_of(name, modules, tuple(indices))


def _token_sites_of(
    name: str, modules: dict[str, nn.Module], indices: tuple[int, ...]
) -> Iterator[tuple[Site, tuple[int, ...], str]]:
    module = modules[name]
    kind = kind_of(module)
    if kind is None or kind.name != "embedding":
        raise TargetError(f"trainable_token_indices: {name!r} is a {type(module).__name__}, not an embedding")
    if not faithful(module, kind):
        raise TargetError(
            f"trainable_token_indices: {name!r} ({type(module).__name__}) does more than look rows up: train it whole "
            f"by modules_to_save=[{name!r}]"
        )
    rows = int(module.num_embeddings)  # type: ignore[arg-type]
    bad = [i for i in indices if not 0 <= i < rows]
    if bad or len(set(indices)) != len(indices):
        raise TargetError(
            f"trainable_token_indices: {bad or 'repeated indices'} in an embedding of {rows} rows ({name!r})"
        )
    yield Site.of(name, module, LAYER, kind), indices, name
    for other, tied in modules.items():
        if tied is not module and tied._parameters.get("weight") is module._parameters["weight"]:
            head = kind_of(tied)
            if head is None or head.name != "linear":
                raise TargetError(f"trainable_token_indices: {other!r} is tied to {name!r} and is no linear layer")
            yield Site.of(other, tied, LAYER, head), indices, name


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def _each_matches(setting: str, target: str | Sequence[str], names: list[str]) -> None:
    if isinstance(target, str):
        try:
            hit = any(fullmatches(target, n) for n in names)
        except re.error as error:
            raise SettingsError(f"{setting}: {target!r} is not a regular expression ({error})") from error
        if not hit:
            hint = suggest(target, leaves(names))
            raise TargetError(f"{setting}: the regular expression {target!r} matches no whole name{hint}")
        return
    for one in target:
        if not any(matches((one,), n) for n in names):
            raise TargetError(f"{setting}: {one!r} matches nothing in the model{suggest(one, leaves(names))}")


def leaves(names: list[str]) -> set[str]:
    """Last parts of dotted names, one and two deep, to suggest near ones from."""
    return {n.rsplit(".", 1)[-1] for n in names if n and not n.rsplit(".", 1)[-1].isdigit()} | {
        ".".join(n.rsplit(".", 2)[-2:]) for n in names if n.count(".") and not n.rsplit(".", 1)[-1].isdigit()
    }


def _check_patterns(plan: Plan, adapted: Sequence[Site]) -> None:
    for setting, patterns in (("rank_pattern", plan.rank_pattern), ("alpha_pattern", plan.alpha_pattern)):
        for key in patterns:
            try:
                hit = any(pattern_key((key,), site.name) for site in adapted)
            except re.error as error:
                raise SettingsError(f"{setting}: {key!r} is not a regular expression ({error})") from error
            if not hit:
                raise TargetError(
                    f"{setting}: {key!r} matches no target{suggest(key, leaves([p.name for p in adapted]))}"
                )


def _unique(sites: Iterable[Site]) -> Iterator[Site]:
    seen = set()
    for site in sites:
        key = (id(site.layer), site.slot)
        if key not in seen:
            seen.add(key)
            yield site
