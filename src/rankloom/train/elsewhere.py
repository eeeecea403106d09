"""What PEFT, Transformers, TRL, Axolotl and LLaMA-Factory call our settings: told in errors, shown in the docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote


@dataclass(frozen=True)
class Word:
    """A setting of another program.

    `ours`: our setting, by its path or the end of it; or a whole change `setting=value` that says the same; or "" where
    there is none. `note`: what differs in its values, or what to do instead.
    """

    ours: str
    note: str = ""

    @property
    def setting(self) -> str:
        """Our setting, without a value."""
        return self.ours.partition("=")[0]

    @property
    def value(self) -> str:
        """The value that the other program's name stands for; "" where its own is taken over."""
        return self.ours.partition("=")[2]

    def as_argument(self, value: str) -> str:
        """The end of an error about the argument `name=value`: what to write."""
        if not self.ours:
            return f"; {self.note}"
        if self.value and value.lower() in OFF:
            return f"; it is {self.setting}: leave it out"
        change = self.ours if self.value else f"{self.ours}={value}" if value and not self.note else ""
        note = f" ({self.note})" if self.note and change else f": {self.note}" if self.note else ""
        return f"; it is {self.setting}{f': write {quote(change)}' if change else ''}{note}"

    def as_key(self, value: str, paths: list[str]) -> str:
        """The end of an error about `name: value` in a file; `paths`: what our setting may be there."""
        if not self.ours:
            return f"; {self.note}"
        said = " or ".join(paths) or self.setting
        if self.value and value.lower() in OFF:
            return f"; it is {said}: leave it out"
        return f"; it is {said}{f': {self.value}' if self.value else ''}{f' ({self.note})' if self.note else ''}"


OFF = ("false", "no", "none", "null", "0")
"""Values by which other programs say that something is not wanted."""


def _words(**names: str | tuple[str, str]) -> dict[str, Word]:
    return {name: Word(said) if isinstance(said, str) else Word(*said) for name, said in names.items()}


_LEAVE = ("", "it has no counterpart: leave it out")
_RESUME = ("", "it is the option --resume, 'auto' or a checkpoint's folder")
_METHOD = ("method", "by name, as in method=lora; `rankloom methods` lists them")
_BETAS = ("betas", "both of them, as in betas=[0.9, 0.999]")
_ONE_SIZE = ("batch_size", "one size for training and evaluation")
_EVAL_STEPS = ("eval_every", "in steps, as in eval_every=100")
_SAVE_STEPS = ("save_every", "in steps, as in save_every=100")
_HOLD_OUT = ("hold_out", "a number of records, as in hold_out=200; by default a tenth of them")
_PACKED = ("packing", "of the training rows; evaluation is never packed")
_FSDP = ("sharding=fsdp", "started with torchrun")
_LORA_PLUS = ("rules", "as in rules=[{name: lora_plus, ratio: 16}]")
_MIX = ("data", "sources with their ratios: data.source={a.jsonl: 3, b.jsonl: 1}")
_SOURCE = ("data", "a file, a folder or a hub id")
_ADAPTER = ("", "name the adapter's folder as the path, before the changes")

_STEPS = _words(
    learning_rate="lr",
    max_steps="steps",
    gradient_accumulation_steps="accumulate",
    adam_beta1=_BETAS,
    adam_beta2=_BETAS,
    adam_epsilon="eps",
    max_grad_norm="clip",
    bf16="precision=bf16",
    fp16="precision=fp16",
    tf32=_LEAVE,
    logging_steps="log_every",
    eval_steps="eval_every",
    eval_strategy=_EVAL_STEPS,
    evaluation_strategy=_EVAL_STEPS,
    save_steps="save_every",
    save_strategy=_SAVE_STEPS,
    save_total_limit="keep",
    load_best_model_at_end="end_with=best",
    early_stopping_patience="patience",
    output_dir="out",
    overwrite_output_dir=("", "a folder that holds a run is kept: give another out=, or go on by --resume auto"),
    resume_from_checkpoint=_RESUME,
    fsdp=_FSDP,
    deepspeed=_FSDP,
    load_in_4bit="store=normal_float",
    load_in_8bit="store={name: uniform, bits: 8}",
)
_FACTORS = _words(
    lora_r="r",
    lora_target_modules="target_modules",
    lora_modules_to_save="modules_to_save",
    use_rslora="scaling=rslora",
)
_RUN = _words(
    model_name_or_path="model",
    model_name="model",
    torch_dtype="model.dtype",
    num_train_epochs="epochs",
    per_device_train_batch_size="batch_size",
    per_device_eval_batch_size=_ONE_SIZE,
    lr_scheduler_type="schedule",
    optim=("optimizer", "adamw, adamw_8bit, paged_adamw or paged_adamw_8bit"),
    data_seed=("seed", "one seed for data, starts and dropout"),
    run_name=("out", "a run is named by its folder"),
    logging_dir=("out", "what is logged lies in the run's folder"),
    attn_implementation=_LEAVE,
    group_by_length=("packing=true", "which leaves no padding"),
    dataloader_num_workers=_LEAVE,
    remove_unused_columns=_LEAVE,
    push_to_hub=("", "a run writes a folder; rankloom.save(model, folder, push_to='owner/name') pushes"),
)

PEFT = _words(
    peft_type=_METHOD,
    task_type=("task", "causal-lm, masked-lm, classification or encoder"),
    use_rslora="scaling=rslora",
    use_dora="method=dora",
    use_qalora="method=qa_lora",
    qalora_group_size=("group_size", "of method=qa_lora"),
    loftq_config=("method=loftq", "bits and iters are its settings"),
    base_model_name_or_path="model",
    fan_in_fan_out=("", "it is told by the layer's class: leave it out"),
    inference_mode=_LEAVE,
)
TRL = {
    **_STEPS,
    **_RUN,
    **_FACTORS,
    **_words(
        dataset_name="data",
        dataset_train_split="split",
        dataset_test_split="eval_split",
        dataset_text_field=("columns", "as in data.columns={text: my_field}"),
        max_seq_length="max_length",
        assistant_only_loss="train_on=assistant",
        completion_only_loss="train_on=assistant",
        chat_template_path=("template", "the name of a model family such as llama3, or a Jinja text"),
        eval_packing=_PACKED,
        use_peft=("", "an adapter is what trains here: leave it out"),
        use_dora="method=dora",
        use_liger_kernel=("chunked_loss", "tokens at a time, as in chunked_loss=1024"),
    ),
}
AXOLOTL = {
    **_STEPS,
    **_FACTORS,
    **_words(
        base_model="model",
        datasets=("data", "one source, or several with their ratios: data.source={a.jsonl: 1, b.jsonl: 1}"),
        test_datasets="eval_source",
        val_set_size=_HOLD_OUT,
        dataset_prepared_path="cache",
        chat_template=("template", "auto, the name of a model family such as llama3, or a Jinja text"),
        sequence_len="max_length",
        sample_packing="packing",
        eval_sample_packing=_PACKED,
        pad_to_sequence_len=_LEAVE,
        train_on_inputs="train_on=all",
        roles_to_train=("train_on", "assistant, turns, last or all"),
        adapter=_METHOD,
        lora_target_linear="target_modules=all-linear",
        lora_model_dir=_ADAPTER,
        peft_use_dora="method=dora",
        peft_use_rslora="scaling=rslora",
        loraplus_lr_ratio=_LORA_PLUS,
        micro_batch_size="batch_size",
        eval_batch_size=_ONE_SIZE,
        num_epochs="epochs",
        lr_scheduler="schedule",
        evals_per_epoch=_EVAL_STEPS,
        saves_per_epoch=_SAVE_STEPS,
        flash_attention=_LEAVE,
        auto_resume_from_checkpoints=_RESUME,
        wandb_project=("report_to=wandb", "the project is rankloom"),
    ),
}
LLAMA_FACTORY = {
    **_STEPS,
    **_RUN,
    **_words(
        adapter_name_or_path=_ADAPTER,
        stage=("", "a run fine-tunes on answers, texts or classes, as its data say: leave it out"),
        do_train=("", "it is the command: rankloom train"),
        do_eval=("", "a run is judged before and after; `rankloom eval` judges it again"),
        finetuning_type=_METHOD,
        lora_rank="r",
        lora_target="target_modules",
        additional_target="modules_to_save",
        use_dora="method=dora",
        use_rslora="scaling=rslora",
        loraplus_lr_ratio=_LORA_PLUS,
        quantization_bit=("store", "as in store={name: normal_float, bits: 4}"),
        dataset=_SOURCE,
        dataset_dir=_SOURCE,
        eval_dataset="eval_source",
        val_size=_HOLD_OUT,
        max_samples=("data", "the number stands behind the source, as in data=train.jsonl#500"),
        mix_strategy=_MIX,
        interleave_probs=_MIX,
        cutoff_len="max_length",
        neat_packing="packing",
        train_on_prompt="train_on=all",
        mask_history="train_on=last",
        overwrite_cache=("cache", "off, auto or a folder; tables of other data or settings are never taken"),
        preprocessing_num_workers=_LEAVE,
        flash_attn=_LEAVE,
        plot_loss=("", "the curve is always drawn, into the run's folder"),
        export_dir=("", "it is the option --out of `rankloom merge`"),
    ),
}
PROGRAMS: Mapping[str, Mapping[str, Word]] = {
    "PEFT": PEFT,
    "TRL and Transformers": TRL,
    "Axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
}
"""Program → its names → ours. A name means the same in all of them."""
_COMMON = _words(
    lr_rate="lr",
    lora_rank="r",
    rank="r",
    alpha="lora_alpha",
    dropout="lora_dropout",
    train_file="data",
    dataset_path="data",
    batch="batch_size",
    num_steps="steps",
    config=("", "name the YAML file first: rankloom train run.yaml"),
)
ELSEWHERE: Mapping[str, Word] = {**_COMMON, **{name: word for one in PROGRAMS.values() for name, word in one.items()}}
"""Every name that is told in errors."""
