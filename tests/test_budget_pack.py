"""A pack of models, one a device: each has to fit on its own, the largest decides."""

import pytest

from aum_compress.budget.pack import enforce_pack, pack_report
from aum_compress.budget.records import BudgetReport, LayerCost, Limits
from aum_compress.errors import AumError, BudgetExceeded


def report_of(param_bytes: int, macs: int) -> BudgetReport:
    layers = (LayerCost("head", "linear", param_bytes, param_bytes, macs, {}),)
    return BudgetReport(layers, Limits(), 1.0, ("configuration",))


def test_the_largest_model_decides_and_costs_do_not_add_up():
    pack = pack_report({"a": report_of(100_000, 20_000_000), "b": report_of(90_000, 30_000_000)})
    assert (pack.largest_by_bytes, pack.largest_by_macs) == ("a", "b")
    assert (pack.param_bytes, pack.macs) == (100_000, 30_000_000)
    assert not pack.over
    enforce_pack(pack)


def test_one_model_over_puts_the_pack_over_and_is_named_with_its_layers():
    pack = pack_report({"a": report_of(128_000, 1), "s1": report_of(128_001, 30_000_002), "b": report_of(128_000, 1)})
    assert pack.models_over == ("s1",)
    with pytest.raises(BudgetExceeded) as caught:
        enforce_pack(pack)
    message = str(caught.value)
    assert "1 of 3 models" in message
    assert "s1: 128,001 bytes of parameters, budget is 128,000 (over by 1); largest: head 128,001" in message
    assert "s1: 30,000,002 MACs" in message
    assert "a: " not in message
    assert caught.value.exit_code == 3


def test_as_json_the_verdict_stands_above_the_models():
    found = pack_report({"a": report_of(1, 2), "b": report_of(128_001, 1)}).to_dict()
    assert found["verdict"] == "over"
    assert found["models_over"] == ["b"]
    assert (found["largest_by_bytes"], found["largest_by_macs"]) == ("b", "a")
    assert (found["param_bytes"], found["macs"]) == (128_001, 2)
    assert found["models"]["a"]["verdict"] == "within"


def test_an_empty_pack_is_refused():
    with pytest.raises(AumError, match="found no model"):
        pack_report({})
