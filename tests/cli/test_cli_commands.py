"""Every command does its job on a tiny local model, prints pure JSON for machines, and leaves the files it promises."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import rankloom as rl
from rankloom.hf.models import load_model
from rankloom.jobs.plan import plan_job, saved_bytes
from rankloom.systems import list_systems
from rankloom.train.config import ModelSettings
from rankloom.train.configfile import read_config

IDS = {"input_ids": torch.arange(4, 20)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}


def test_help_is_light():
    code = (
        "import sys, rankloom.cli.commands\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'rankloom.core.plan'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_systems_lists_every_row(run):
    found = run("systems", "--json")
    assert found.code == 0
    assert found.json == [s.row() for s in list_systems()]
    assert set(found.json[0]) == {"id", "name", "section", "status", "proof"}
    assert all((row["status"] == "works") == bool(row["proof"]) for row in found.json)
    part = run("systems", "--section", "3.1", "--json").json
    assert {row["section"] for row in part} == {"3.1.1", "3.1.2", "3.1.3", "3.1.4"}
    assert "LoRA-FA" in run("systems").out


def test_methods_and_one_method(run):
    found = run("methods", "--json").json
    assert {"lora", "dora", "hydralora"} <= {m["name"] for m in found}
    one = run("methods", "lora", "--json").json
    words = "a whole number from 1 to 65,536"
    assert {"name": "r", "type": words, "default": 8, "doc": "the rank"} in one["settings"]
    assert "2106.09685" in run("methods").out


def test_settings_are_listed_from_the_dataclasses(run):
    found = {f["name"]: f for f in run("settings", "--json").json}
    assert found["train.lr"] == {"name": "train.lr", "type": "a number above 0", "default": 0.001, "doc": "peak rate"}
    assert [f["name"] for f in run("settings", "batch_size", "--json").json] == ["data.batch_size"]
    assert "store uniform.group" in run("settings", "uniform").out
    wrong = run("settings", "train.lrr")
    assert (wrong.code, "did you mean 'train.lr'" in wrong.err) == (2, True)


def test_plan_counts_what_attach_makes(run, model):
    found = run("plan", f"model={model}", "r=3", "target_modules=[q_proj,v_proj]", "--json").json
    real = AutoModelForCausalLM.from_pretrained(model)
    base = sum(p.numel() for p in real.parameters())
    bank = rl.attach(real, rl.LoRA(r=3), target_modules=["q_proj", "v_proj"])
    trainable = sum(p.numel() for _, p, _ in bank.trainable())
    assert found["trainable"] == trainable == 2 * 3 * ((16 + 16) + (16 + 8))
    assert found["total"] == base + trainable
    assert [s["name"] for s in found["sites"]] == [f.name for f in bank.sites("default")]
    assert "model.layers.0.self_attn.k_proj" in found["missed"]
    assert "lm_head" in found["missed"]
    assert found["memory"]["optimizer"] == 8 * trainable
    assert found["memory"]["weights"] == 4 * base
    assert found["file"] == 4 * trainable


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_planned_activations_are_those_of_the_real_model(model, method):
    config = read_config(None, [f"model={model}", f"method={method}", "data=unread", "batch_size=3"])
    planned = plan_job(config, length=16).memory
    real = AutoModelForCausalLM.from_pretrained(model)
    rl.attach(real, config.plan)
    ids = torch.ones(3, 16, dtype=torch.long)
    assert planned.activations == saved_bytes(real.train(), {"input_ids": ids, "labels": ids})


def test_plan_tells_what_is_fused_and_what_is_not(model):
    def notes(*changes):
        return plan_job(read_config(None, [f"model={model}", "data=unread", *changes]), length=8).notes

    layers = AutoModelForCausalLM.from_pretrained(model).config.num_hidden_layers
    fused = f"fused in training: {7 * layers} of {7 * layers} layers, together "
    groups = f"{layers} × (q_proj, k_proj, v_proj), {layers} × (gate_proj, up_proj)"
    assert fused + groups in notes("target_modules=all-linear")
    assert fused + "none, for gradient checkpointing" in notes(
        "target_modules=all-linear", "gradient_checkpointing=true"
    )
    found = notes("method=qa_lora", "group_size=4", "lora_dropout=0.1", "target_modules=[q_proj]")
    assert f"fused in training: 0 of {layers} layers" in found
    assert (
        f"not fused, so slower: {layers} × QALoRAAdapter: its dropout acts on pooled columns, not on the layer's input"
        in found
    )


def test_plan_tells_of_conflicts_and_of_what_cannot_merge(run, model):
    found = run("plan", f"model={model}", "method=adalora", "steps=5", "tinit=9", "--json")
    assert found.code == 2
    assert "tinit=9" in found.json["conflicts"][0]
    found = run("plan", f"model={model}", "method=hydralora", "--json")
    assert found.code == 0
    assert found.json["mergeable"] is False


def test_plan_shows_a_rendered_and_masked_example(run, model, chats):
    found = run("plan", f"model={model}", f"data={chats}")
    assert "{+" in found.out
    assert "<a>-]" in found.out
    assert "1 of 12 records held out" in found.out


def test_train_leaves_a_run_that_can_be_repeated(run, fine_tuned, tmp_path):
    assert {"config.yaml", "run.json", "metrics.jsonl", "adapter"} <= {p.name for p in fine_tuned.iterdir()}
    record = json.loads((fine_tuned / "run.json").read_text())
    assert set(record["before"]) == {"loss", "perplexity", "exact_match", "examples", "answers"}
    assert record["steps"] == 3
    assert record["versions"]["torch"]
    config = yaml.safe_load((fine_tuned / "config.yaml").read_text())
    assert config["plan"]["method"] == {"name": "lora", **dataclasses.asdict(rl.LoRA(r=2))}
    assert config["data"]["max_length"] == 64
    again = run("train", fine_tuned / "config.yaml", f"out={tmp_path / 'again'}", "--json").json
    assert again["after"] == record["after"]
    assert again["final_loss"] == record["final_loss"]


def test_training_learns_and_the_saved_adapter_is_the_trained_one(run, model, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completion": "yes"}) + "\n")
    out = tmp_path / "run"
    found = run(
        "train",
        f"model={model}",
        f"data={file}",
        f"data.eval_source={file}",
        f"out={out}",
        "steps=60",
        "lr=2e-2",
        "--json",
    ).json
    assert found["before"]["exact_match"] == 0.0
    assert found["after"]["exact_match"] == 1.0
    assert found["after"]["loss"] < found["before"]["loss"] / 2
    assert run("generate", out, "q", "--json").json == [{"prompt": "q", "answer": "yes"}]
    assert run("generate", f"model={model}", "q", "--json").json[0]["answer"] != "yes"
    judged = run("eval", out, "--json").json
    assert judged["base"] == pytest.approx(found["before"])
    assert judged["adapter"] == pytest.approx(found["after"])
    merged = run("merge", out, tmp_path / "merged", "--json").json
    assert merged["error"]["relative"] < 1e-5
    assert run("generate", f"model={tmp_path / 'merged'}", "-p", "q", "--json").json[0]["answer"] == "yes"
    talk = run("chat", out, "--json", input="q\n/base\n/adapter\n/reset\nq\n").json
    assert [t["role"] for t in talk] == ["user", "assistant"]
    assert talk[1]["content"] == "yes"


def test_resume_goes_on_and_a_second_start_is_refused(run, fine_tuned):
    refused = run("train", fine_tuned / "config.yaml")
    assert refused.code == 1
    assert "--resume auto" in refused.err
    done = run("train", fine_tuned / "config.yaml", "--resume", "auto", "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 3


def test_epochs_decide_the_steps(run, model, chats, tmp_path):
    found = run(
        "train", f"model={model}", f"data={chats}", f"out={tmp_path / 'r'}", "epochs=2", "batch_size=4", "--json"
    )
    assert found.json["steps"] == 2 * 3  # 11 records beside the one held out
    assert "steps" not in yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["train"]


def test_packing_trains(run, model, chats, tmp_path):
    found = run(
        "train", f"model={model}", f"data={chats}", f"out={tmp_path / 'r'}", "packing=true", "steps=2", "--json"
    )
    assert found.code == 0, found.err
    assert found.json["after"]["loss"] != found.json["before"]["loss"]


def test_classification_trains_its_head(run, encoder, tmp_path):
    file = tmp_path / "moods.csv"
    file.write_text("text,label\n" + "".join(f"so {w},{w}\n" for w in ["good", "bad"] * 8))
    found = run(
        "train",
        f"model={encoder}",
        f"data={file}",
        f"out={tmp_path / 'r'}",
        "steps=30",
        "lr=2e-2",
        "hold_out=4",
        "--json",
    )
    assert found.code == 0, found.err
    assert found.json["after"]["accuracy"] == 1.0
    adapter = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert sorted(adapter["modules_to_save"]) == [
        "bert.pooler.dense",
        "classifier",
    ]  # neither is in the encoder's files
    judged = run("eval", tmp_path / "r", "--json")
    assert judged.json["adapter"] == pytest.approx(found.json["after"]), judged.err
    assert judged.json["base"] == pytest.approx(found.json["before"])
    merged = run("merge", tmp_path / "r", tmp_path / "m", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["error"]["relative"] < 1e-5
    assert BertForSequenceClassification.from_pretrained(tmp_path / "m").config.id2label == {0: "bad", 1: "good"}
    plan = run("plan", f"model={encoder}", f"data={file}", "--json").json
    assert plan["whole"] == ["classifier.weight", "classifier.bias"]
    assert plan["task"] == "classification"


def test_merge_parts_tied_embeddings_and_keeps_the_answer(run, model, chats, tmp_path):
    out = tmp_path / "r"
    run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=3", "lr=1e-1", "target_modules=[embed_tokens]")
    found = run("merge", out, "-o", tmp_path / "m", "--json")
    assert found.code == 0, found.err
    assert found.json["error"]["relative"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False


def test_merge_refuses_what_has_no_matrix_and_leaves_nothing(run, model, chats, tmp_path):
    out = tmp_path / "r"
    run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=2", "method=hydralora")
    found = run("merge", out, "-o", tmp_path / "m")
    assert found.code == 1
    assert "no single matrix" in found.err
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".m.*"))


def test_merge_measures_and_refuses_by_the_tolerance(run, fine_tuned, tmp_path):
    half = run("merge", fine_tuned, tmp_path / "half", "model.dtype=bfloat16", "--json")
    assert half.code == 0, half.err
    assert 1e-6 < half.json["error"]["relative"] < 5e-2
    refused = run("merge", fine_tuned, tmp_path / "strict", "model.dtype=bfloat16", "--tolerance", "1e-9")
    assert refused.code == 1
    assert "differs from the unmerged" in refused.err
    assert not (tmp_path / "strict").exists()


def test_export_is_a_lora_with_a_stated_error(run, model, chats, tmp_path):
    out = tmp_path / "r"
    run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=2", "method=vera", "r=4")
    found = run("export", out, tmp_path / "e", "--r", "16", "--json").json
    assert 0 <= found["error"] < 1e-4
    config = json.loads((tmp_path / "e" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert run("generate", tmp_path / "e", "-p", "x", "--json").code == 0


def test_info_on_an_adapter_a_run_and_a_model(run, fine_tuned, model, encoder):
    adapter = run("info", fine_tuned / "adapter", "--json").json
    assert adapter["kind"] == "adapter"
    assert adapter["verified"] is True
    assert adapter["base"] == str(model)
    found = run("info", fine_tuned, "--json").json
    assert found["kind"] == "run"
    assert found["adapter_info"]["peft_type"] == "LORA"
    layers = {row["name"]: row for row in run("info", model, "--json").json["layers"]}
    assert layers["model.layers.*.self_attn.q_proj"]["count"] == 2
    assert layers["model.embed_tokens"]["kind"] == "embedding"
    assert run("info", encoder, "--json").json["class"] == "BertModel"


def test_people_get_tables_not_json(run, fine_tuned):
    found = run("eval", fine_tuned)
    assert found.json is None
    first, second, *_ = found.out.splitlines()
    assert first.startswith("evaluation: 1 of 12 records held out")
    assert second.split() == ["metric", "base", "adapter"]


def test_adapter_folder_names_its_base(run, fine_tuned):
    assert run("generate", fine_tuned / "adapter", "-p", "hi", "--max-new-tokens", "3", "--json").code == 0


def test_sampling_is_seeded(run, model):
    def one(seed):
        return run(
            "generate",
            f"model={model}",
            f"seed={seed}",
            "-p",
            "abc",
            "--temperature",
            "5",
            "--max-new-tokens",
            "12",
            "--json",
        ).json

    assert one(1) == one(1) != one(2)


def test_half_precision_on_the_cpu_becomes_float32_unless_asked(model):
    assert load_model(ModelSettings(str(model))).model.dtype == torch.float32
    assert load_model(ModelSettings(str(model), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_debug_shows_the_traceback(run, model):
    with pytest.raises(rl.RankloomError):
        run("plan", f"model={model}", "method=dorra", "--debug")


def test_machine_output_is_one_json_value_and_nothing_else(run, model, chats, tmp_path):
    began = time.perf_counter()
    found = run("train", f"model={model}", f"data={chats}", f"out={tmp_path / 'r'}", "steps=2", "--json")
    assert json.loads(found.out)["steps"] == 2
    assert found.out.count("\n") == 1
    assert json.loads(found.out)["seconds"] < time.perf_counter() - began


def test_a_model_with_its_tokenizer_in_one_line(model):
    from rankloom.hf import load_model as load

    found, tokenizer = load(str(model), dtype="bfloat16")
    assert found.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab"
    with pytest.raises(rl.RankloomError, match="did you mean 'dtype'"):
        load(str(model), dtyp="bfloat16")


def test_limits_are_the_ones_that_the_gate_keeps(run):
    from rankloom.formats.limits import Limits

    found = run("limits", "--json").json
    assert found == dataclasses.asdict(Limits())
    assert "ranks of rank_pattern" in run("limits").out
