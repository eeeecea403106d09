"""The deterministic gates on a small model: bytes kept for backward, operations, and what `plan` says of them."""

import pytest
import torch
from core_tiny import llama, tokens
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import rankloom as rl
from rankloom.ops.kept import kept_bytes, kept_storages

SHAPE = {
    "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 128, "max_position_embeddings": 128, "attn_implementation": "sdpa",
}  # fmt: skip
IDS = tokens(batch=2, length=64, vocabulary=128)
R = 2


def model(method=None, frozen=False):
    made = llama(depth=4, **SHAPE).float().train()
    if frozen:
        made.requires_grad_(False)
        made.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_(True))
    if method is not None:
        rl.attach(made, method, target_modules="all-linear")
        made(IDS[:, :2])
    return made


def loss_of(made):
    return made(input_ids=IDS, labels=IDS, use_cache=False).loss


def kept(made):
    return kept_bytes([loss_of(made)], made.parameters())


def test_the_graph_holds_what_autograd_packs():
    """On a model without adapters the walk finds exactly the storages that pass the hooks of saved tensors."""
    made = model()
    own = {p.untyped_storage()._cdata for p in made.parameters()}
    packed = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            packed[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(made)
    assert kept_bytes([loss], made.parameters()) == sum(s.nbytes() for s in packed.values())
    assert {s._cdata for s in kept_storages([loss])} >= set(packed)


def test_no_storage_of_a_fused_pass_outlives_it_but_those_that_the_graph_holds():
    """Counted by what is really alive: every storage that the pass made, less those that went away."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    class Births(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.born = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    storage = t.untyped_storage()
                    self.born.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
            return out

    made = model(rl.LoRA(r=R))
    own = {p.untyped_storage()._cdata for p in made.parameters()}
    with Births() as births:
        loss = loss_of(made)
    alive = sum(size for key, (ref, size) in births.born.items() if not ref.expired() and key not in own)
    found = kept_bytes([loss], made.parameters())
    assert found <= alive + 8 * IDS.numel()
    assert alive <= 1.03 * found


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (rl.LoRA(r=R), 0.65),
        (rl.LoRA(r=R, lora_dropout=0.05), 0.65),
        (rl.LoRA(r=R, frozen="A"), 0.65),
        (rl.DoRA(rl.LoRA(r=R)), 0.8),
    ],
    ids=["lora", "dropout", "frozen_A", "dora"],
)
def test_kept_bytes_beside_full_fine_tuning(method, bound):
    assert kept(model(method)) / kept(model()) <= bound


def test_dropout_keeps_a_bit_an_element():
    plain, dropping = (kept(model(rl.LoRA(r=R, lora_dropout=p))) for p in (0.0, 0.05))
    rows = IDS.numel()
    assert dropping - plain == 4 * rows * (6 * 96 + 256) // 8
    assert dropping / plain <= 1.06


def test_a_frozen_A_keeps_no_input():
    """Beside the limit: h, each group's A side by side and s·B are added, and the output of the SiLU is let go."""
    factors = 5 * R * 96 + R * (5 * 96 + 2 * 256)
    added = 4 * 4 * (IDS.numel() * R * 7 + factors)
    silu = 4 * IDS.numel() * 256 * 4
    made = model(rl.LoRA(r=R, frozen="A"))
    made.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_(True))
    assert kept(made) == kept(model(frozen=True)) + added - silu


def operations(made):
    made.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_(True))
    with FlopCounterMode(display=False) as counter:
        loss_of(made).backward()
    return counter.get_total_flops()


def test_operations_of_the_adapters():
    floor = operations(model(frozen=True))
    thin = 4 * 6 * IDS.numel() * R * (4 * (96 + 96) + 3 * (96 + 256))
    assert operations(model(rl.LoRA(r=R))) - floor == thin
