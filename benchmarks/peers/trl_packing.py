"""TRL's SFTTrainer with packing, at the best of the settings tried on a CPU.

Options: packs (packs a time), accumulate (micro-batches a step), attention. A step is 16 rows on average.
"""

from __future__ import annotations

from datasets import Dataset
from measure import Job, Meter, MeterCallback, load_model, pack_length, read_job
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(job: Job) -> None:
    meter = Meter(job)
    model = load_model(job)
    model.set_attn_implementation(job.options["attention"])
    packs_per_step = job.options["packs"] * job.options["accumulate"]
    arguments = SFTConfig(
        output_dir=job.output,
        packing=True,
        packing_strategy="bfd",
        max_length=pack_length(job.read_rows(), job.samples / packs_per_step),
        per_device_train_batch_size=job.options["packs"],
        gradient_accumulation_steps=job.options["accumulate"],
        gradient_checkpointing=False,
        max_steps=job.steps,
        save_strategy="no",
        learning_rate=job.learning_rate,
        bf16=False,  # the weights already are of the job's dtype; autocast on top is slower
        seed=job.seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(job.read_rows()),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", target_modules=job.targets, r=8, lora_alpha=32, lora_dropout=0.0
        ),
        callbacks=[MeterCallback(meter)],
    )
    trainer.train()
    meter.write(trainer.model)


if __name__ == "__main__":
    main(read_job())
