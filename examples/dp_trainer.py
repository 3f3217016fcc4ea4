"""The model and the sentences of `dp_loop.py`, trained by Hugging Face's Trainer with differential privacy.

    python examples/dp_trainer.py /tmp/dp_trainer

Expected, in about ten seconds: Trainer's log with `epsilon` in each line, 8 at the end, and `eval_loss` falling from
about 5.5 to below 2.5. Checkpoints lie in the folder, the key of sampling and noise beside it in
`/tmp/dp_trainer.private`: whoever gets a checkpoint must not get the key.
"""

from __future__ import annotations

import sys
from functools import partial

from dp_loop import sentences, small_gpt2
from transformers import TrainingArguments

from veiltune.dp.encoding import collate
from veiltune.dp.plan import DPPlan
from veiltune.dp.trainer import DPTrainer


def main(folder: str) -> tuple[float, float]:
    """Trains; returns the held-out loss before and after."""
    train, held_out = sentences()[:4000], sentences()[4000:4200]
    trainer = DPTrainer(
        small_gpt2(),
        TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=100,  # differentiated at once: memory, not the result
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_steps=20,
            report_to=[],
        ),
        plan=DPPlan.for_epsilon(8.0, num_units=len(train), expected_batch_size=150, steps=40),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=partial(collate, pad_id=0),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()  # resume_from_checkpoint=True takes up a run that was cut off, with the same result
    return before, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    print("eval_loss before {:.2f}, after {:.2f}".format(*main(sys.argv[1])))
