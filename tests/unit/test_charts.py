"""Charts of a step's memory and of gradients: what is drawn, and the numbers beside it."""

from __future__ import annotations

from typing import Any

from kbitcheck.report.parts import gradient_chart, step_chart

PARTS = [
    {"kind": kind, "where": where, "nbytes": nbytes}
    for kind, where, nbytes in (
        ("packed weights", "mlp", 300), ("packed weights", "attention", 100), ("other weights", "head", 50),
        ("upcast", "head", 50), ("adapters", "", 20), ("optimizer", "", 40), ("activations", "h.0", 70),
    )
]  # fmt: skip
KINDS = {
    "activations": [10, 30, 70, 5],
    "logits and loss": [0, 0, 90, 0],
    "gradients": [0, 0, 0, 20],
    "workspace": [8, 8, 0, 8],
}
FORECAST: dict[str, Any] = {
    "parts": PARTS, "curve": {"kinds": KINDS, "turn": 2, "blocks": {"h.0": 1, "h.1": 2}}, "batch": 2, "seq_len": 24,
    "mode": "reentrant", "device": "cpu", "adapters": 20, "accumulate": 1,
}  # fmt: skip
STEPS = {"blocks": ["h.0", "h.1"], "plain": [50, 60], "checkpointed": [11, 13]}


def numbers(chart: Any) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in chart.rows}


def test_a_step_is_drawn_by_kind_from_its_beginning_to_its_end() -> None:
    (chart,) = step_chart.charts({"c": {"forecast": FORECAST}})
    assert numbers(chart) == {
        "weights": ("450",) * 3,
        "upcast": ("50",) * 3,
        "adapters, gradients": ("20", "20", "40"),
        "optimizer": ("40",) * 3,
        "activations": ("10", "70", "5"),
        "logits": ("0", "90", "0"),
        "workspace": ("8", "0", "8"),
        "all": ("578", "720", "593"),
    }
    for label in (
        "weights",
        "upcast",
        "adapters, gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "backward",
    ):
        assert f">{label}<" in chart.svg
    assert ">measured<" not in chart.svg
    assert chart.caption.endswith("No step was run, so that nothing was measured.")


def test_gradients_that_add_up_over_batches_are_there_from_the_beginning() -> None:
    (chart,) = step_chart.charts({"c": {"forecast": {**FORECAST, "accumulate": 2}}})
    assert numbers(chart)["adapters, gradients"] == ("40", "40", "60")


def test_what_was_measured_stands_beside_a_prediction_of_the_same_shape() -> None:
    ran = {"forecast": FORECAST, "batch": [2, 24], "activations_by_block": STEPS}
    (chart,) = step_chart.charts({"c": ran})
    assert ">measured<" in chart.svg
    assert dict(step_chart.measured(ran)) == {1: 560 + 11, 2: 560 + 24}
    (other,) = step_chart.charts({"c": {**ran, "batch": [2, 12]}})
    assert ">measured<" not in other.svg
    assert "a step of 2 × 12 tokens" in other.caption
    elsewhere = {**STEPS, "blocks": ["x.0", "x.1"]}
    assert ">measured<" not in next(step_chart.charts({"c": {**ran, "activations_by_block": elsewhere}})).svg


def test_of_several_cases_the_largest_step_is_drawn() -> None:
    larger = {**FORECAST, "parts": [*PARTS, {"kind": "upcast", "where": "x", "nbytes": 900}]}
    (chart,) = step_chart.charts({"a": {"forecast": FORECAST}, "b": {"forecast": larger}, "c": {}})
    assert chart.caption.startswith("b: ")
    assert "Of 2 cases" in chart.caption
    assert not [*step_chart.charts({"c": {"forecast": {**FORECAST, "curve": None}}})]


def test_a_block_shows_its_worst_layer() -> None:
    errors: dict[str, Any] = {
        "layers": ["m.h.0.q", "m.h.0.k", "m.h.1.q", "head"],
        "error": [0.01, 0.03, 0.02, 0.5],
        "bound": [0.04, 0.04, 0.04, 0.4],
    }
    (chart,) = gradient_chart.charts({"c": {"gradient_errors": errors}})
    assert [row[0] for row in chart.rows] == errors["layers"]
    assert gradient_chart.by_block([*zip(errors["layers"], errors["error"], errors["bound"], strict=True)]) == [
        ("m.h.0", 0.03, 0.04), ("m.h.1", 0.02, 0.04), ("head", 0.5, 0.4),
    ]  # fmt: skip
    many = {"layers": [f"h.{n}.q" for n in range(90)], "error": [0.01] * 90, "bound": [0.04] * 90}
    (chart,) = gradient_chart.charts({"c": {"gradient_errors": many}})
    assert "The worst 60 of 90 blocks." in chart.caption
