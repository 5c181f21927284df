"""Outside a backend's folder and its oracle nothing imports, names or dispatches on the backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kbitcheck_reference
import pytest

import kbitcheck
from kbitcheck.backends import registry

PACKAGE, ORACLE = Path(kbitcheck.__file__).parent, Path(kbitcheck_reference.__file__).parent
# Names that only someone who knows the library's inside would write.
PRIVATE = {
    "bitsandbytes": {
        "bitsandbytes", "bnb", "Params4bit", "Int8Params", "Linear4bit", "Linear8bitLt", "QuantState", "MatMul8bitLt",
        "MatmulLtState", "BitsAndBytesConfig", "quant_state", "SCB", "load_in_4bit", "load_in_8bit", "dequantize_4bit",
        "bnb_4bit_quant_type", "llm_int8_skip_modules", "support_avx512bf16_for_cpu",
    },
    "quanto": {"quanto", "QuantoConfig", "QLinear", "QModuleMixin", "WeightQBytesTensor", "WeightQBitsTensor", "qint4", "qint8"},
    "aqlm": {"aqlm", "QuantizedLinear", "AqlmConfig", "nbits_per_codebook", "linear_weights_not_to_quantize"},
    "compressed_tensors": {"compressed_tensors", "quantization_scheme", "weight_packed", "CompressedTensorsConfig"},
    "torchao": {"torchao", "Int8Tensor", "act_quant_kwargs", "TorchAoConfig"},
    # GPTQModel runs the layers of two backends.
    "gptq": {"gptq", "g_idx", "TorchLinear", "GPTQConfig"},
    "awq": {"awq", "autoawq", "torch_awq", "AwqTorchLinear", "AwqConfig"},
    "hqq": {"hqq", "HQQLinear", "HqqConfig", "W_q"},
    "fp8": {"fp8", "weight_scale_inv", "FP8Linear", "FP8Experts", "FP8GroupedLinear", "finegrained_fp8", "FineGrainedFP8Config"},
    "mxfp4": {"mxfp4", "Mxfp4GptOssExperts", "Mxfp4GptOssMLP"},
}  # fmt: skip


def sources(name: str) -> Iterator[Path]:
    for root in (PACKAGE, ORACLE):
        for path in sorted(root.rglob("*.py")):
            inside = f"backends/{name}/" in path.as_posix() or path == ORACLE / "formats" / f"{name}.py"
            if not inside:
                yield path


def violations(source: str, private: set[str], schemes: set[str]) -> Iterator[str]:
    """Imports and identifiers in ``private``, and places where a text that is a scheme or a private name decides."""
    if not any(name in source for name in private | schemes):
        return
    for node in ast.walk(ast.parse(source)):
        suspects = identifiers(node) & private | (deciding_texts(node) & (private | schemes))
        yield from (f"{getattr(node, 'lineno', 0)}: {name}" for name in sorted(suspects))


def identifiers(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return set((node.module or "").split(".")) | {alias.name for alias in node.names}
    return {getattr(node, "id", ""), getattr(node, "attr", "")}


def deciding_texts(node: ast.AST) -> set[str]:
    """Texts that are compared, are keys, or name an attribute."""
    inner: list[ast.AST | None] = []
    if isinstance(node, ast.Compare | ast.Match):
        inner = list(ast.walk(node))
    elif isinstance(node, ast.Dict):
        inner = list(node.keys)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
        inner = list(node.args)
    return {n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@pytest.mark.parametrize("name", [b.name for b in registry.registered()])
def test_a_backend_is_one_place(name: str) -> None:
    schemes = {scheme for scheme in registry.schemes() if registry.of_scheme(scheme).name == name}
    assert PRIVATE[name]
    seen = {
        path.relative_to(PACKAGE.parent).as_posix(): list(violations(path.read_text("utf-8"), PRIVATE[name], schemes))
        for path in sources(name)
    }
    assert {path: lines for path, lines in seen.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import bitsandbytes",
        "from bitsandbytes.nn import modules",
        "from transformers import x\nx = Params4bit",
        "def f(q):\n    return q.scheme == 'int8'",
        "BYTES = {'nf4': 4}",
        "def f(w):\n    return getattr(w, 'quant_state', None)",
    ],
)
def test_a_violation_is_seen(source: str) -> None:
    schemes = {scheme for scheme in registry.schemes() if registry.of_scheme(scheme).name == "bitsandbytes"}
    assert list(violations(source, PRIVATE["bitsandbytes"], schemes))


def test_dtypes_and_docstrings_are_no_violation() -> None:
    source = '"""bitsandbytes: nf4."""\nimport torch\nx = torch.int8\nDEFAULT = "nf4"\n'
    assert not list(violations(source, PRIVATE["bitsandbytes"], {"nf4", "int8"} - {"int8"}))
