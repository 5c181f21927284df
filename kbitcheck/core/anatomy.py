"""What a parameter is part of: a norm, the head, an expert, a router, a tower."""

import re

from kbitcheck.core.facts import ModelFacts, TensorFacts

NORM_EVIDENCE = frozenset({"class", "name", "shape"})

# The first that matches, so that a shared expert is an expert and a vision tower's attention is the tower's.
PARTS = {
    "vision": r"(^|\.)(vision\w*|visual|image\w*|vit)\.|mm_projector|multi_modal_projector",
    "audio": r"(^|\.)(audio\w*|speech\w*)\.",
    "routers": r"(^|\.)(router|gate)\.(\w+\.)*(weight|bias|e_score_correction_bias)$|router",
    "experts": r"experts?(\.|_|$)",
    "attention": r"attn|attention|(^|\.)(q_proj|k_proj|v_proj|o_proj)\.",
    "mlp": r"(^|\.)(mlp|ffn|fc1|fc2|feed_forward|block_sparse_moe|DenseReluDense|wi|wo|intermediate|output)(\.|_)",
}


EXPERT = re.compile(r"(.*\.)?\w*experts?\w*\.\d+(?=\.|$)")


def norm_parameters(model: ModelFacts) -> frozenset[str]:
    """Names of the parameters of every module that looks like a normalization layer, by class, name or shape."""
    norms = {m.name for m in model.modules.values() if m.norm & NORM_EVIDENCE}
    return frozenset(n for n in model.parameters if n.rpartition(".")[0] in norms)


def group_of(tensor: TensorFacts, model: ModelFacts, norms: frozenset[str]) -> str:
    """The group of a parameter; ``norms`` are the names of the normalization layers' parameters.

    The model itself names its embeddings and head. The rest goes by the names of the modules above: transformers has no
    other mark.
    """
    owner = tensor.name.rpartition(".")[0]
    if owner in model.embeddings:
        return "embeddings"
    if owner in model.heads:
        return "head"
    if tensor.name in norms:
        return "norms"
    return next((name for name, pattern in PARTS.items() if re.search(pattern, tensor.name)), "other")


def group_of_buffer(name: str) -> str:
    """The group of a buffer."""
    return "vision" if re.search(PARTS["vision"], name) else "buffers"


def unquantized(model: ModelFacts) -> dict[str, list[TensorFacts]]:
    """Unquantized parameters by group, each storage once."""
    groups: dict[str, list[TensorFacts]] = {}
    norms = norm_parameters(model)
    for tensor in {t.storage: t for t in reversed(list(model.parameters.values())) if not t.packed}.values():
        groups.setdefault(group_of(tensor, model, norms), []).append(tensor)
    return groups


def expert_of(name: str) -> str:
    """The path of the expert that a module or parameter of this name is in, one of several; empty where it is in none."""
    match = EXPERT.match(name)
    return match[0] if match else ""


def tower_of(name: str, towers: tuple[str, ...]) -> str:
    """The tower that shares the longest path with a parameter's name; of several the first; empty without towers."""
    path = name.split(".")

    def shared(tower: str) -> int:
        pairs = zip(path, tower.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), tower.count(".") + 1))

    return max(towers, key=shared, default="")
