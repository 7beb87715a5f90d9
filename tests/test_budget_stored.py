"""Bytes at stored width: narrow precisions, masks, parametrisations, shared memory, packed int8 layers of torch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune, weight_norm

from aum_compress.budget.check import check_module
from aum_compress.budget.records import Limits, Stored
from aum_compress.budget.stored import stored_by_module
from aum_compress.errors import AumError

X = torch.zeros(1, 6)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def total(model: nn.Module, stored: dict[str, Tensor] | None = None) -> int:
    return sum(own.param_bytes for own in stored_by_module(model, stored).values())


def test_int8_weights_with_scales_and_zero_points_beside():
    stored = {
        "0.weight": torch.zeros(4, 6, dtype=torch.int8),
        "0.weight_scale": torch.zeros(4, dtype=torch.float16),
        "0.weight_zero_point": torch.zeros(4, dtype=torch.int8),
        "0.bias": torch.zeros(4, dtype=torch.float16),
        "2.weight": torch.zeros(2, 4, dtype=torch.int8),
        "2.weight_scale": torch.zeros(()),
    }
    report = check_module(linear(), X, stored=stored)
    assert {layer.name: layer.param_bytes for layer in report.layers if layer.param_bytes} == {
        "0": 24 + 8 + 4 + 8,
        "2": 8 + 4,
    }
    assert report.params == 24 + 4 + 8
    assert report.dcase_bytes == 24 + 8 + 8, "DCASE's script does not see the scales"
    assert not check_module(linear(), X, stored=stored, limits=Limits(int8_weights=True)).wide_params


def test_two_int4_values_a_byte():
    stored = {
        "0.weight": torch.zeros(4, 3, dtype=torch.uint8),  # packed
        "0.weight.scales": torch.zeros(4, 2, dtype=torch.float16),  # two groups a row
        "0.bias": torch.zeros(4),
        "2.weight": torch.zeros(2, 4),
        "lookup": torch.zeros(16, dtype=torch.int8),
    }
    found = stored_by_module(linear(), stored)
    assert found["0"] == Stored(12 + 16 + 16, 24 + 4, 0)
    assert found["2"] == Stored(32, 8, 8), "wide: a matrix in float32"
    assert found[""] == Stored(16), "what belongs to no layer belongs to the model"


def test_half_precision():
    assert total(linear().half()) == 2 * (24 + 4 + 8)


def test_stored_tensors_have_to_cover_the_model():
    with pytest.raises(AumError, match=r"do not cover the model:\n  - 0\.bias: absent\n  - 2\.weight: absent"):
        stored_by_module(linear(), {"0.weight": torch.zeros(4, 6)})


def test_a_masked_weight_counts_in_full_and_its_mask_not():
    model = linear()
    prune.l1_unstructured(model[0], "weight", amount=0.9)
    prune.random_unstructured(model[0], "bias", amount=0.5)
    assert set(model.state_dict()) >= {"0.weight_orig", "0.weight_mask", "0.bias_mask"}
    report = check_module(model, X)
    assert report.param_bytes == total(linear()) == 4 * 36
    assert report.params == 36
    assert report.macs == 6 * 4 + 4 * 2, "zeros are multiplied too"
    assert not model[0].weight.is_leaf, "it was not changed by the check"
    prune.remove(model[0], "weight")
    assert total(model) == 4 * 36


def test_a_mask_of_another_kind_is_a_buffer_like_any_other():
    model = linear()
    model.register_buffer("attention_mask", torch.zeros(5, 5))
    assert total(model) == 4 * 36 + 100


def test_of_a_parametrised_weight_what_is_stored_counts():
    # weight_norm stores a direction (4,6) and a magnitude (4,1) for the weight
    model = linear()
    parametrizations.weight_norm(model[0])
    assert total(model) == 4 * (36 + 4)
    assert check_module(model, X).elementwise["norm"] == 24
    old_style = linear()
    weight_norm(old_style[0])
    old_style(X)
    assert total(old_style) == 4 * (36 + 4)
    assert check_module(old_style, X).macs == 32


def test_buffers_count_where_they_are_persistent():
    model = linear()
    model.register_buffer("read", torch.zeros(10))
    model.register_buffer("computed", torch.zeros(1000), persistent=False)
    model.append(nn.BatchNorm1d(2))  # 2 parameters and 2 statistics a channel, and a counter that inference never reads
    found = stored_by_module(model)
    assert found[""] == Stored(40)
    assert found["3"] == Stored(4 * 8, 4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.again = self.inner
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.inner(self.table(tokens))))


def test_tied_weights_and_modules_with_two_owners_count_once():
    model = Tied()
    assert total(model) == 4 * (40 + 20)
    assert total(model, dict(model.state_dict())) == 4 * (40 + 20)
    report = check_module(model, torch.tensor([[1]]))
    assert report.params == 60
    assert report.macs == 2 * 16 + 40


def test_two_parameters_over_one_memory_count_once_and_parts_of_it_apart():
    model = linear()
    model[0].bias = nn.Parameter(model[0].weight.data[:, 0])  # a column of the weight is another stretch of it
    assert total(model) == 4 * 36
    twin = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    twin[1].weight = nn.Parameter(twin[0].weight.data)
    assert total(twin) == 36
    assert total(copy.deepcopy(nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)]))) == 72


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_layers_of_torch_are_unpacked():
    model = quantization.quantize_dynamic(linear(), {nn.Linear}, dtype=torch.qint8)
    report = check_module(model, X)
    # int8 weight, one float64 scale, one int64 zero point, float32 bias
    assert {layer.name: layer.param_bytes for layer in report.layers if layer.param_bytes} == {
        "0": 24 + 8 + 8 + 16,
        "2": 8 + 8 + 8,
    }
    assert report.params == 36
    assert report.macs == 32
    assert report.dcase_bytes == 0
    assert any(note.startswith("dcase_bytes is 0") and "all 80 bytes" in note for note in report.notes)
    assert report.wide_params == 0


class Static(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.dequantize = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.relu = nn.Conv2d(2, 4, 3, groups=2), nn.ReLU()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.linear(self.relu(self.conv(self.quantize(x))).flatten(1)))


@pytest.mark.filterwarnings("ignore")
def test_static_int8_layers_of_torch_are_unpacked_channel_by_channel():
    x = torch.zeros(1, 2, 6, 6)
    float_model = Static().eval()
    model = quantization.fuse_modules(float_model, [["conv", "relu"]])
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(model, inplace=True)
    model(torch.randn(2, 2, 6, 6))
    quantization.convert(model, inplace=True)
    report = check_module(model, x)
    per_channel = 8 + 8  # torch keeps scales in float64 and zero points in int64
    assert {layer.name: layer.param_bytes for layer in report.layers if layer.param_bytes} == {
        "quantize": 4 + 8,
        "conv": 36 + 4 * per_channel + 16 + 12,
        "linear": 192 + 3 * per_channel + 12 + 12,
    }
    assert report.params == 36 + 4 + 192 + 3
    as_float = check_module(float_model, x)
    assert report.macs == as_float.macs == 64 * 9 + 192
    assert report.elementwise["relu"] == as_float.elementwise["relu"] == 64
    assert model.conv.weight().dtype == torch.qint8, "it was not changed by the check"


@pytest.mark.filterwarnings("ignore")
def test_other_int8_layers_of_torch_are_refused():
    model = quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 3)), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(AumError, match=r"0\._all_weight_values\.0\.param: found ScriptObject, wanted a tensor"):
        check_module(model, torch.zeros(2, 1, 4))


def test_state_that_is_no_tensor_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self) -> tuple[int, int]:
            return (1, 2)

        def set_extra_state(self, state: tuple[int, int]) -> None: ...

    with pytest.raises(AumError, match=r"_extra_state: found tuple, wanted a tensor"):
        check_module(Extra(17, 3), torch.zeros(1, 17))
