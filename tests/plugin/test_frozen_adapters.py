"""A model whose adapters a later preparation froze: the report says that, and nothing about twins or optimizers."""

import pytest

import kbitcheck
from kbitcheck.backends.quantization import Quantization
from tests.few_steps import of_few_steps
from tests.shallow import shallow


def test_adapters_that_a_preparation_froze_are_named_as_the_cause() -> None:
    peft = pytest.importorskip("peft")
    model = shallow("tiny:llama").load(Quantization.parse("nf4"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    peft.prepare_model_for_kbit_training(wrapped)
    with pytest.raises(kbitcheck.NonConformance) as caught:
        kbitcheck.assert_prepared(wrapped, select=of_few_steps())
    report = caught.value.report
    results = {result.rule: result for result in report.results}
    assert report.exit_code == 1
    assert results["KB102"].status == "FAIL"
    assert (results["KB211"].status, results["KB211"].reason) == ("SKIP", "no parameter is trainable")
    assert results["KB304"].reason == "no adapter is trainable (KB102)"
    assert not [r for r in report.results if r.status == "ERROR"]
