"""Tiny models and the checks that every kind of layer must pass."""

from __future__ import annotations

import torch
from torch import nn

import rankloom as rl
import tiny


def snapshot(model):
    """Everything that an attach could leave behind: classes, attributes, tensors by identity and value, flags."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = {**module._parameters, **module._buffers}
        found[name] = (
            type(module),
            tuple(sorted(module.__dict__)),
            tuple(module._modules),
            tuple(id(child) for child in module._modules.values()),
            tuple((key, id(value)) for key, value in tensors.items()),
            tuple((key, value.requires_grad) for key, value in tensors.items() if value is not None),
            tuple(len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)),
            module.training,
        )
    values = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return found, values


def assert_untouched(model, before):
    found, values = before
    now, now_values = snapshot(model)
    assert now == found
    assert now_values.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(now_values[key], value), key


def nudge(bank, *names, seed=1, size=0.3):
    """Random values in every tensor of the adapters, so that they speak."""
    generator = torch.Generator().manual_seed(seed)
    for name in names or bank.names:
        for _, parameter, _ in bank.tensors(name):
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * size
                parameter.data.add_(noise.to(parameter.dtype))


def ids(model):
    return {(n, k): id(p) for n, m in model.named_modules() for k, p in m._parameters.items()}


def difference(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def frozen_output(model, run):
    """The base's output as a frozen model gives it: torch's kernels may differ in the last bit by requires_grad."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    out = run(model)
    for p, flag in flags:
        p.requires_grad_(flag)
    return out


def assert_lives(model, run, method, *, tolerance=1e-10, **plan):
    """Zero start, one adapter active, apply(delta) == forward, merged == unmerged, exact unmerge, no trace after detach."""
    with torch.no_grad():
        before, base, silent = snapshot(model), run(model), frozen_output(model, run)
        bank = rl.attach(model, method, **plan)
        assert difference(run(model), silent) < tolerance, "the start is not silent"
        nudge(bank)
        out = run(model)
        assert difference(out, silent) > 1e-3, "the adapter is not heard"
        with bank.using():
            assert torch.equal(run(model), silent)
        kept = ids(model)
        bank.merge()
        assert difference(run(model), out) < tolerance, "merged differs from unmerged"
        assert ids(model) != kept
        bank.unmerge()
        assert ids(model) == kept
        assert torch.equal(run(model), out)
        rl.detach(model)
        assert_untouched(model, before)
        assert torch.equal(run(model), base)


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.q_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(self.norm(x))))


class Tower(nn.Module):
    """Embedding, a list of blocks, a head: named like the models of the wild."""

    def __init__(self, depth=2, d=8, words=11, tied=False):
        super().__init__()
        self.embed = nn.Embedding(words, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(depth))
        self.head = nn.Linear(d, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(**settings):
    torch.manual_seed(0)
    return Tower(**settings).double().eval()


def words(batch=3, tokens=5, vocabulary=11, seed=0):
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def llama(depth=2, **settings):
    said = {"num_hidden_layers": depth, "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2}
    return tiny.llama(**{**said, **settings}).double().eval()


def tokens(batch=2, length=6, vocabulary=32, seed=0):
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapted(*names, method=None, model=None, size=0.3, **plan):
    """A tower (or the given model) with one adapter that is not zero for each name, and its bank."""
    model = tower() if model is None else model
    plan = {"target_modules": ["q_proj", "v_proj", "embed"]} | plan
    for seed, name in enumerate(names):
        bank = rl.attach(model, method or rl.LoRA(r=2, lora_alpha=3), name, **plan)
        nudge(bank, name, seed=seed, size=size)
    return model, bank
