"""The tutorials' own script: transformers' Trainer over PEFT. As it stands, or tuned by an expert.

As it stands it is 8 rows a time, accumulated twice, with checkpointing and dropout. Tuned means nothing is
recomputed, no dropout, and rows of one length together. Options: tuned (bool), micro_batch (rows a time).
Source: datawhalechina/self-llm, DeepSeek 04, less saving; rows come in file order instead of shuffled, as
they do in ours: the same rows in the same steps.
"""

from __future__ import annotations

from measure import Job, Meter, MeterCallback, load_model, read_job
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main(job: Job) -> None:
    meter = Meter(job)
    tuned = job.options["tuned"]
    model = load_model(job)
    if not tuned:
        model.enable_input_require_grads()
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=job.targets,
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.0 if tuned else 0.1,
    )
    model = get_peft_model(model, lora)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    trainer = Trainer(
        model=model,
        args=_arguments(job, tuned),
        train_dataset=job.read_rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
        callbacks=[MeterCallback(meter)],
    )
    trainer.train()
    meter.write(model)


def _arguments(job: Job, tuned: bool) -> TrainingArguments:
    micro_batch = job.options["micro_batch"]
    return TrainingArguments(
        output_dir=job.output,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.samples // micro_batch,
        logging_steps=10,
        max_steps=job.steps,
        save_strategy="no",
        learning_rate=job.learning_rate,
        gradient_checkpointing=not tuned,
        train_sampling_strategy="group_by_length" if tuned else "sequential",
        seed=job.seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    main(read_job())
