"""What a user would write: load in nf4 or int8, prepare with PEFT, attach LoRA to all linear layers, take one training step."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BATCH, SEQ_LEN = 2, 24


QUANTS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def main(folder: str, quant: str = "nf4") -> None:
    """Take one step on the checkpoint in ``folder``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**QUANTS[quant]),
    )
    prepared = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(prepared, lora).train()
    optimizer = torch.optim.AdamW(p for p in tuned.parameters() if p.requires_grad)
    ids = torch.randint(3, model.config.vocab_size, (BATCH, SEQ_LEN))
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
