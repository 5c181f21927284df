"""Faults of saved adapters: KB801 and KB806 to KB810."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kbitcheck.models.sources.resolve import resolve
from kbitcheck.sabotage.fault import merges, saves

RANK = 4
TARGETS = ("q_proj", "v_proj")
PREFIX = "base_model.model."
HEAD = f"{PREFIX}lm_head.weight"


RATIO = 0.02  # of the weights' spread: what a fine-tune adds, which a 4-bit grid has no place for


class Files:
    """What an adapter's two files hold: ``config`` and ``tensors``, those of a trained LoRA adapter of ``base``."""

    def __init__(self, base: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": list(TARGETS),
            "init_lora_weights": True,
        }
        self.tensors: dict[str, torch.Tensor] = {}
        model = resolve(base, static="always").meta(None)
        for name, module in model.named_modules():
            if name.endswith(TARGETS):
                outer, inner = module.weight.shape
                a, b = torch.randn(RANK, inner, generator=generator), torch.randn(outer, RANK, generator=generator)
                self.tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}

    def add_experts(self, module: str, parameter: str, *, experts: int, outer: int, inner: int) -> None:
        """Add the factors of one stack of experts, whether or not the base has it."""
        self.config["target_parameters"] = [f"mlp.experts.{parameter}"]
        self.tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(experts * RANK, inner)
        self.tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(outer, experts * RANK)

    def add_head(self) -> None:
        """Add a head that trained whole, as the base has it."""
        self.config["modules_to_save"] = ["lm_head"]
        head = resolve(self.config["base_model_name_or_path"]).load_unquantized().get_output_embeddings()
        self.tensors[HEAD] = head.weight.detach().float()

    def of(self, part: str) -> Mapping[str, torch.Tensor]:
        """The tensors whose names contain ``part``."""
        return {key: tensor for key, tensor in self.tensors.items() if part in key}

    def save(self, folder: Path) -> None:
        """Write both files."""
        (folder / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(
            {key: tensor.contiguous() for key, tensor in self.tensors.items()}, folder / "adapter_model.safetensors"
        )


@saves("KB801")
def a_target_is_misspelt(files: Files) -> None:
    files.config["target_modules"].append("o_prj")


@saves("KB801")
def a_pattern_names_nothing(files: Files) -> None:
    files.config["target_modules"] = r".*\.(query|value)"


@saves("KB806")
def nothing_ever_trained(files: Files) -> None:
    for tensor in files.of("lora_B").values():
        tensor.zero_()


@saves("KB807")
def one_target_never_trained(files: Files) -> None:
    for key, tensor in files.of("v_proj").items():
        if "lora_B" in key:
            tensor.zero_()


@saves("KB807")
def one_expert_never_trained(files: Files) -> None:
    """Of a stack that shares its factors, PEFT lays an expert out as each so manieth column of ``lora_B``."""
    files.add_experts("model.layers.0.mlp.experts", "down_proj", experts=4, outer=16, inner=8)
    stack = files.tensors[f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"]
    stack[:, 1 :: stack.shape[1] // RANK] = 0


@saves("KB807", beside=True)
def a_head_that_never_trained(files: Files) -> None:
    """It is stored whole, and is the base's."""
    files.add_head()


@saves("KB808")
def one_number_overflowed(files: Files) -> None:
    next(iter(files.of("lora_A").values()))[1, 2] = float("inf")


@saves("KB809")
def one_factor_was_not_saved(files: Files) -> None:
    del files.tensors[next(iter(files.of("lora_B")))]


@saves("KB809")
def the_rank_is_another(files: Files) -> None:
    files.config["rank_pattern"] = {r"layers\.1\.self_attn\.q_proj": 2 * RANK}


@saves("KB810")
def the_base_has_other_names(files: Files) -> None:
    """As of a class that wraps the text model."""
    files.tensors = {k.replace("model.layers", "model.language_model.layers"): t for k, t in files.tensors.items()}


@saves("KB810")
def the_base_is_wider(files: Files) -> None:
    for key, tensor in files.of("lora_A").items():
        files.tensors[key] = torch.cat([tensor, tensor], dim=1)


@saves("KB810")
def a_head_of_another_width(files: Files) -> None:
    files.add_head()
    files.tensors[HEAD] = files.tensors[HEAD][:, 1:]


@merges("KB804")
def values_are_never_merged(layer: Any) -> None:
    if layer.out_features > layer.in_features // 2:  # the queries', here
        layer.merge()


@merges("KB804")
def each_delta_is_added_twice(layer: Any) -> None:
    layer.merge()
    weight = layer.get_base_layer().weight
    if weight.is_floating_point():
        weight.data += layer.get_delta_weight("default")


@merges("KB804")
def a_merge_scales_by_the_rank_alone(layer: Any) -> None:
    """The scaling of rank-stabilised LoRA instead of plain LoRA's."""
    own = layer.scaling["default"]
    layer.scaling["default"] = own * RANK**0.5
    layer.merge()
    layer.scaling["default"] = own


@saves("KB805", beside=True)
def what_it_adds_is_finer_than_the_grid(files: Files) -> None:
    for tensor in files.of("lora_").values():
        tensor.mul_(RATIO)
