"""What each trainer really does: its own command trains a tiny 4-bit model on a CPU, plainly and watched.

Writes ``results/trainers.json`` and, from that alone, ``docs/trainers.md``. Names of trainers measure those anew and keep
the other rows; ``--page`` only writes the page. Environments are built once, in ``$KBITCHECK_TRAINERS`` or the user's cache.
"""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE.parent / "results" / "trainers.json"
PAGE = HERE.parent / "docs" / "trainers.md"
SECONDS = 600
STEPS = 3
# Before PEFT wraps a model: does anything of it still require grad?
SPY = """
import json, os, sys
from pathlib import Path
from kbitcheck.run.inject.sitecustomize import Finder

def after(name):
    cls = sys.modules[name].PeftModel
    own = cls.__init__
    def init(self, model, *args, **kwargs):
        trains = sum(p.requires_grad for p in model.parameters())
        Path(os.environ["KBITCHECK_SPY"]).write_text(json.dumps({"trains": trains}))
        own(self, model, *args, **kwargs)
    cls.__init__ = init

sys.meta_path.insert(0, Finder({"peft.peft_model"}, after))
"""
LLAMAFACTORY = """\
model_name_or_path: {data}/model
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
quantization_bit: 4
quantization_method: bnb
dataset_dir: {data}/alpaca
dataset: tiny
template: default
bf16: true
use_cpu: true
max_steps: 3
per_device_train_batch_size: 2
logging_steps: 1
report_to: none
output_dir: {out}
"""
AXOLOTL = """\
base_model: {data}/model
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - {{path: {data}/alpaca/train.json, type: alpaca, ds_type: json}}
sequence_len: 256
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 3
learning_rate: 0.0002
optimizer: adamw_torch
lr_scheduler: cosine
bf16: true
gradient_checkpointing: true
logging_steps: 1
seed: 7
output_dir: {out}
dataset_prepared_path: {out}/prepared
# On a CPU: use_cpu comes from a plugin, as axolotl has no key for it, and its triton kernels are off.
plugins: [on_a_cpu.OnACpu]
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
"""
PLUGIN = """\
from axolotl.integrations.base import BasePlugin


class OnACpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}
"""
UNSLOTH = """\
import unsloth
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = unsloth.FastLanguageModel.from_pretrained("{data}/model", load_in_4bit=True, max_seq_length=128)
model = unsloth.FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8)
arguments = SFTConfig(
    output_dir="{out}", max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none",
    dataset_text_field="text", bf16=True, use_cpu=True, seed=0,
)
data = load_dataset("json", data_files="{data}/text/train.jsonl", split="train")
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments).train()
model.save_pretrained("{out}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A trainer, what is installed for it beside the stack that is here, and its command.

    ``alone`` is installed without what it requires: ``needs`` names what of that a run needs. ``{python}`` in the command
    is the environment's, ``{config}`` the file that holds ``config``, ``{data}`` and ``{out}`` are folders.
    """

    title: str
    alone: Sequence[str]
    needs: Sequence[str]
    command: str
    config: str = ""
    suffix: str = ".yaml"
    stand_ins: Sequence[str] = ()


DATASETS = (
    "pandas",
    "pyarrow",
    "xxhash",
    "aiohttp",
    "dill<0.4.2",
    "multiprocess<0.70.20",
    "sentencepiece",
    "scipy",
    "httpx",
)
TRAINERS: Mapping[str, Trainer] = {
    "trl": Trainer(
        title="TRL",
        alone=["trl==1.16.0", "datasets==5.2.0"],
        needs=DATASETS,
        command="{bin}/trl sft --model_name_or_path {data}/model --dataset_name {data}/text --use_peft --load_in_4bit "
        "--lora_target_modules all-linear --use_cpu true --max_steps 3 --per_device_train_batch_size 2 "
        "--logging_steps 1 --report_to none --seed 0 --output_dir {out}",
    ),
    "llamafactory": Trainer(
        title="LLaMA-Factory",
        alone=[
            "llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0", "datasets==4.0.0",
            "tokenizers==0.22.2", "huggingface_hub<2",
        ],
        needs=[
            "pandas", "pyarrow", "xxhash", "aiohttp", "dill<0.3.9", "multiprocess<0.70.17", "fsspec<=2025.3.0", "av==16.0.0", "einops",
            "fastapi", "fire", "gradio<=5.50.0,>=4.38.0", "modelscope", "omegaconf", "scipy", "sentencepiece", "sse-starlette",
            "tiktoken", "tyro<0.9.0", "uvicorn", "hf-transfer", "torchdata==0.11.0", "huggingface_hub<2",
        ],
        command="{bin}/llamafactory-cli train {config}",
        config=LLAMAFACTORY,
        stand_ins=["torchaudio"],
    ),
    "axolotl": Trainer(
        title="axolotl",
        alone=[
            "axolotl==0.19.0", "transformers==5.16.1", "peft==0.20.0", "trl==1.9.0", "accelerate==1.13.0", "datasets==4.8.4",
            "tokenizers==0.23.1", "huggingface_hub==1.17.0", "liger-kernel==0.8.1", "axolotl-contribs-lgpl==0.0.7",
            "axolotl-contribs-mit==0.0.6", "schedulefree==1.4.1", "openenv-core==0.1.0", "triton",
        ],
        needs=[
            *DATASETS, "addict", "fire", "einops", "numba<1.0,>=0.63.1", "evaluate==0.4.1", "art", "python-dotenv", "zstandard",
            "fastcore", "langdetect==1.0.9", "immutabledict==4.2.0", "antlr4-python3-runtime==4.13.2", "posthog==6.7.11",
            "hf_transfer", "kernels<0.17.0,>=0.16.0", "optimum==1.16.2", "mistral-common", "wandb", "tensorboard", "nvidia-ml-py",
            "s3fs", "gcsfs", "adlfs", "ocifs",
        ],
        command="{bin}/axolotl train {config}",
        config=AXOLOTL,
    ),
    "swift": Trainer(
        title="ms-swift",
        alone=["ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "trl<1.0", "datasets==4.8.4"],
        needs=[
            *DATASETS, "addict", "attrdict", "binpacking", "cpm-kernels", "dacite", "einops", "fastapi", "importlib-metadata",
            "json-repair", "modelscope", "nltk", "openai", "oss2", "rouge", "simplejson", "tensorboard", "tiktoken",
            "transformers-stream-generator", "uvicorn", "zstandard", "jieba",
        ],
        command="{bin}/swift sft --model {data}/model --model_type llama --template default --dataset {data}/chat/train.jsonl "
        "--quant_method bnb --quant_bits 4 --torch_dtype bfloat16 --max_steps 3 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 1 --logging_steps 1 --use_cpu true --report_to none --seed 0 --save_steps 3 "
        "--split_dataset_ratio 0 --dataset_num_proc 1 --use_hf true --add_version false --output_dir {out}",
    ),
    "unsloth": Trainer(
        title="Unsloth",
        alone=[
            "unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "trl==0.24.0", "datasets==4.3.0", "fsspec<=2025.9.0", "tyro", "cut-cross-entropy",
            "hf_transfer", "nest-asyncio", "msgspec", "docstring-parser", "typeguard",
        ],
        needs=DATASETS,
        command="{python} {config}",
        config=UNSLOTH,
        suffix=".py",
    ),
}  # fmt: skip


def environment(name: str) -> Path:
    """The folder of a trainer's virtual environment, which is built where there is none."""
    from kbitcheck.run import virtualenvs

    folder = Path(os.environ.get("KBITCHECK_TRAINERS") or virtualenvs.cache().with_name("trainers")) / name
    if folder.exists():
        return folder
    trainer = TRAINERS[name]
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "zzz_parent.pth").write_text("\n".join(virtualenvs.parents()) + "\n")
    for module in trainer.stand_ins:
        (packages / f"{module}.py").touch()
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
    subprocess.run([*pip, "--no-deps", *trainer.alone], check=True)
    subprocess.run([*pip, *trainer.needs], check=True)
    return folder


def make_data(folder: Path) -> None:
    """Write a tiny Llama with random weights and a tokenizer of characters, and rows in the forms that trainers read."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    unknown = {"unk_token": special[3]}
    words = {character: number for number, character in enumerate([*special, *string.printable])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[], **unknown)),
        pad_token=special[0], bos_token=special[1], eos_token=special[2], **unknown,
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [(f"row {i}", "the quick brown fox") for i in range(32)]
    rows = {
        "text/train.jsonl": [{"text": f"{a}: {b}"} for a, b in texts],
        "chat/train.jsonl": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in texts
        ],
    }
    for path, lines in rows.items():
        (folder / path).parent.mkdir()
        (folder / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "alpaca").mkdir()
    alpaca = [{"instruction": a, "input": "", "output": b} for a, b in texts]
    (folder / "alpaca" / "train.json").write_text(json.dumps(alpaca))
    (folder / "alpaca" / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "train.json"}}))


def row(name: str, folder: Path) -> dict[str, Any]:
    """Train twice plainly and once watched: what the watched run shows, and whether it has the bits of the plain one."""
    trainer, home = TRAINERS[name], environment(name)
    (folder / "spy").mkdir(exist_ok=True)
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "on_a_cpu.py").write_text(PLUGIN)
    spied, report = folder / f"{name}-spied.json", folder / f"{name}.json"
    first = _train(trainer, home, folder, f"{name}-1", {"KBITCHECK_SPY": str(spied)}, spy=True)
    facts = {
        "trainer": trainer.title,
        "command": trainer.command,
        "config": trainer.config,
        "versions": _versions(home, trainer),
    }
    if first:
        return {**facts, "error": first}
    _train(trainer, home, folder, f"{name}-2", {})
    watch = [sys.executable, "-m", "kbitcheck", "watch", "--format", "json", "--output", str(report), "--"]
    _train(trainer, home, folder, f"{name}-watched", {}, before=watch)
    saved = json.loads(report.read_text())
    [case] = saved["facts"]["cases"].values()
    one, two, watched = (_weights(folder / f"{name}-{run}") for run in ("1", "2", "watched"))
    broken = [
        {"rule": r["rule"], "level": r["level"], "attributed_to": r.get("attributed_to", "")}
        for r in saved["results"]
        if r["status"] == "FAIL"
    ]
    return {
        **facts,
        "recipe": case["recipe"],
        "watched": {key: value for key, value in case["watched"].items() if key != "blocks"},
        "frozen_before_adapters": json.loads(spied.read_text())["trains"] == 0,
        "broken": broken,
        "passed": sum(r["status"] == "PASS" for r in saved["results"]),
        "bits": "the same" if watched == one else "two plain runs differ too" if one != two else "changed",
    }


def _train(
    trainer: Trainer,
    home: Path,
    folder: Path,
    out: str,
    more: Mapping[str, str],
    *,
    before: Sequence[str] = (),
    spy: bool = False,
) -> str:
    """Run a trainer's command; the last line of its error, or "" where it ends with 0 or is watched."""
    config = folder / f"{out}{trainer.suffix}"
    places = {
        "data": folder / "data",
        "out": folder / out,
        "config": config,
        "bin": home / "bin",
        "python": home / "bin" / "python",
    }
    config.write_text(trainer.config.format(**places))
    own = [str(HERE.parent), str(HERE.parent / "reference"), str(folder / "plugins")]
    path = os.pathsep.join([*([str(folder / "spy")] if spy else []), *own])
    drop = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in drop} | {
        "PYTHONPATH": path, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more,
    }  # fmt: skip
    words = [*before, *trainer.command.format(**places).split()]
    ended = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if not ended.returncode or before:
        return ""
    return next((line for line in reversed(ended.stderr.splitlines()) if "Error" in line), f"exit {ended.returncode}")


def _weights(folder: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    path = max(folder.rglob("adapter_model.safetensors"), key=lambda each: each.stat().st_mtime)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).float().numpy().tobytes() for name in sorted(file.keys())}


def _versions(home: Path, trainer: Trainer) -> dict[str, str]:
    name = trainer.alone[0].partition("==")[0]
    code = f"from importlib.metadata import version as v; print(*map(v, [{name!r}, 'transformers', 'peft']))"
    printed = subprocess.run([home / "bin" / "python", "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip((name, "transformers", "peft"), printed.split(), strict=True)) | {
        each: version(each) for each in ("torch", "bitsandbytes")
    }


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of rows."""
    ran = {name: r for name, r in rows.items() if "error" not in r}
    parts = [
        HEAD.format(steps=STEPS),
        "## Dtypes and freezing",
        _table(DTYPES, ran),
        "## Steps",
        _table(STEPS_SEEN, ran),
    ]
    parts += ["## What broke", _broken(ran), "## The commands"]
    parts += [_command(r) for r in rows.values()]
    return "\n\n".join(parts) + "\n"


HEAD = """\
<!-- Made by `python benchmarks/trainers.py` from results/trainers.json. -->
# What your trainer really does

Each trainer's own command trained a tiny Llama with random weights in 4 bits for {steps} steps on a CPU, offline, once watched by
[`kbitcheck watch`](watch.md). What a run shows here, its trainer does by default; your own run may differ: watch it."""


def _dtypes(part: str) -> Any:
    return lambda r: " and ".join(r["watched"]["dtypes"].get(part, ["none"]))


def _lost(matrix: str) -> Any:
    def share(r: Mapping[str, Any]) -> str:
        counts = r["watched"]["updates"].get(matrix, {"wanted": 0, "lost": 0})
        return f"{counts['lost'] / counts['wanted']:.0%}" if counts["wanted"] else "none wanted"

    return share


def _arguments(r: Mapping[str, Any]) -> str:
    seen = r["watched"]["checkpointing"]
    return f"use_reentrant={seen['use_reentrant']}" if seen else "off"


def _norms(r: Mapping[str, Any]) -> str:
    found = {d for part, ds in r["watched"]["dtypes"].items() if part.startswith("norms") for d in ds}
    return " and ".join(sorted(found))


def _embeddings(r: Mapping[str, Any]) -> str:
    found = {d for part, ds in r["watched"]["dtypes"].items() if part.startswith("embeddings") for d in ds}
    return " and ".join(sorted(found))


DTYPES = {
    "norms": _norms,
    "embeddings": _embeddings,
    "head": _dtypes("head"),
    "adapters": _dtypes("adapters"),
    "the base is frozen": lambda r: (
        "by the trainer, before adapters" if r["frozen_before_adapters"] else "by PEFT, with the adapters"
    ),
}
STEPS_SEEN = {
    "checkpointing": _arguments,
    "calls that switch it on": lambda r: str(len(r["watched"]["switched_on"])),
    "attention": lambda r: r["watched"]["attention"],
    "optimizer": lambda r: ", ".join(r["watched"]["optimizers"]),
    "largest rate": lambda r: f"{max(r['watched']['rates']):.2g}",
    "enters quantized layers": lambda r: ", ".join(r["watched"]["entering"]),
    "`lora_A` updates rounded away": _lost("lora_A"),
    "`lora_B` updates rounded away": _lost("lora_B"),
    "bits of the watched run": lambda r: r["bits"],
}


def _table(columns: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["trainer", *columns]
    lines = [
        head,
        ["---"] * len(head),
        *([r["trainer"], *(read(r) for read in columns.values())] for r in rows.values()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTIES = {"implementation": "the trainer", "stack": "the stack", "model": "the model", "": "nobody"}


def _broken(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for r in rows.values():
        each = [f"{b['rule']} ({b['level']}, by {PARTIES[b['attributed_to']]})" for b in r["broken"]]
        recipe = r["recipe"].partition(": ")[2]
        lines.append(f"* {r['trainer']}: {', '.join(each) or 'nothing'}; {r['passed']} rules kept. Dtypes: {recipe}.")
    return "\n".join(lines)


def _command(r: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
    command = (
        r["command"]
        .replace("{bin}/", "")
        .replace("{config}", "CONFIG")
        .replace("{data}", "DATA")
        .replace("{out}", "OUT")
    )
    config = r["config"].replace("{data}", "DATA").replace("{out}", "OUT").replace("{{", "{").replace("}}", "}")
    text = f"### {r['trainer']}\n\n{versions}\n\n```\n{command.replace('{python}', 'python')}\n```"
    text += f"\n\nwith CONFIG\n\n```\n{config}```" if config else ""
    return text + (f"\n\nIt does not run on a CPU here: `{r['error']}`" if "error" in r else "")


def main(names: Sequence[str]) -> None:
    """Measure the named trainers, or all, and write the rows and the page."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    if "--page" not in names:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "data").mkdir()
            make_data(Path(folder) / "data")
            for name in names or TRAINERS:
                print(f"{name} ...", file=sys.stderr)
                rows[name] = json.loads(json.dumps(row(name, Path(folder))).replace(str(folder), "DIR"))
                rows = {each: rows[each] for each in TRAINERS if each in rows}
                ROWS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
