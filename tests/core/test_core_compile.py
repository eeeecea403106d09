"""torch.compile: one graph, the same answers, no recompilation for tensor weights."""

import threading

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tokens, tower, words
from torch._dynamo.testing import CompileCounter

import rankloom as rl

IDS = words()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


METHODS = [
    rl.LoRA(r=2),
    rl.DoRA(rl.LoRA(r=2)),
    rl.VeRA(r=3),
    rl.AdaLoRA(init_r=3, target_r=2),
    rl.hydralora(r=2, n_b=2),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_with_the_same_answer(method, backend):
    model, _ = adapted("a", method=method, target_modules=["q_proj", "v_proj"])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert difference(compiled(IDS), model(IDS)) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_same_gradients(backend):
    model, bank = adapted("a", target_modules=["q_proj", "v_proj", "embed"], modules_to_save=["head"], bias="all")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(IDS).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p, _ in bank.trainable()})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@torch.no_grad()
def test_tensor_weights_cause_no_recompilation():
    model, bank = adapted("a", "b")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i in range(5):
        a, b = torch.tensor(0.1 * i), torch.rand(3)
        bank.use(a=a, b=b)
        out = compiled(IDS)
        assert difference(out, model(IDS)) < 1e-12
    assert counter.frame_count == 1
    for i in range(3):
        with bank.using("a", "b", rows=torch.tensor([i % 2, -1, 1])):
            assert difference(compiled(IDS), model(IDS)) < 1e-12
    assert counter.frame_count <= 3


@torch.no_grad()
def test_switching_by_name_is_right_and_each_set_is_compiled_once():
    model, bank = adapted("a", "b")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        for names in (("a",), ("b",), ("a", "b"), ()):
            bank.use(*names)
            assert difference(compiled(IDS), model(IDS)) < 1e-12
    assert counter.frame_count <= 4


@torch.no_grad()
def test_using_under_compile_is_right():
    model, bank = adapted("a", "b")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = {}
    for name in ("a", "b"):
        with bank.using(name):
            expected[name] = model(IDS)
    with bank.using():
        plain = model(IDS)
        assert torch.equal(compiled(IDS), plain)
    for _ in range(2):
        for name in ("b", "a"):
            with bank.using(name):
                assert difference(compiled(IDS), expected[name]) < 1e-12
                with bank.using():
                    assert difference(compiled(IDS), plain) < 1e-12
        assert difference(compiled(IDS), expected["a"]) < 1e-12


def test_using_in_threads_under_compile():
    model, bank = adapted("a", "b")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = {}
        for name in ("a", "b"):
            with bank.using(name):
                expected[name] = model(IDS)
                assert difference(compiled(IDS), expected[name]) < 1e-12
    barrier, wrong = threading.Barrier(2), []

    def work(name):
        barrier.wait()
        for _ in range(40):
            with torch.no_grad(), bank.using(name):
                if difference(compiled(IDS), expected[name]) > 1e-12:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_the_first_selection_of_a_fresh_thread_is_noticed_by_a_graph_compiled_there():
    model, bank = adapted("a", "b")
    with torch.no_grad(), bank.using("b"):
        expected = model(IDS)
    found = []

    def work():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            compiled(IDS)
            with bank.using("b"):
                found.append(compiled(IDS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert difference(found[0], expected) < 1e-12


@torch.no_grad()
def test_merging_and_detaching_under_compile():
    model, bank = adapted("a")
    base = tower()(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(IDS)
    bank.merge()
    assert difference(compiled(IDS), out) < 1e-12
    bank.unmerge()
    assert difference(compiled(IDS), out) < 1e-12
    rl.detach(model)
    assert difference(compiled(IDS), base) < 1e-12


@torch.no_grad()
def test_experts_under_compile():
    from test_core_experts import EXPERTS, mixtral

    model = mixtral("batched_mm")
    nudge(rl.attach(model, rl.LoRA(r=2), **EXPERTS))
    ids = tokens()
    expected = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    assert difference(compiled(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_a_real_model_compiles_to_one_graph():
    model, _ = adapted("a", model=llama(), target_modules="all-linear")
    ids = tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-12


def test_equal_blocks_compiled_one_by_one_share_a_graph():
    model, _ = adapted("a", model=tower(depth=5), target_modules=["q_proj", "v_proj"])
    counter = CompileCounter()
    with torch.no_grad():
        expected = model(IDS)
        for block in model.layers:
            block.compile(fullgraph=True, backend=counter)
        assert difference(model(IDS), expected) < 1e-12
    assert counter.frame_count == 1
