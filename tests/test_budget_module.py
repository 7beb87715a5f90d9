"""`check_module`: any module, any input, and what it refuses."""

import doctest

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aum_compress.budget.check
import aum_compress.budget.contraction
from aum_compress.budget.check import check_module
from aum_compress.budget.records import Limits, enforce
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig, PatchStem, uniform_blocks
from aum_compress.models.factory import build_model


@pytest.mark.parametrize("module", [aum_compress.budget.check, aum_compress.budget.contraction])
def test_examples_in_docstrings(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


class Waveform(nn.Module):
    """Framing, a linear filterbank and a recurrent layer: no fixed features."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 8, 16, stride=8, bias=False)
        self.memory = nn.GRU(8, 4, batch_first=True, bias=False)

    def forward(self, samples: Tensor) -> Tensor:
        return self.memory(self.filters(samples[:, None]).abs().transpose(1, 2))[0].mean(1)


def test_a_waveform_model_layer_by_layer():
    report = check_module(Waveform(), torch.zeros(1, 160), clip_seconds=0.02)
    frames = (160 - 16) // 8 + 1
    macs = {layer.name: layer.macs for layer in report.layers}
    assert macs == {"": 0, "filters": frames * 8 * 16, "memory": frames * 3 * 4 * (8 + 4)}
    assert report.macs == 50 * sum(macs.values()), "for one second"
    assert report.param_bytes == 4 * (8 * 16 + 3 * 4 * (8 + 4))
    assert {layer.name: layer.kind for layer in report.layers}["memory"] == "gru"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(
        self, tokens: Tensor, *, scale: Tensor, state: tuple[Tensor, Tensor] | None = None, twice: bool = False
    ):
        x = self.out(self.table(tokens) * scale)
        if twice:
            x = x * 2
        return {"logits": x, "state": [part + 1 for part in state or ()]}


def test_keyword_tensors_tokens_nested_states_and_flags():
    tokens, scale = torch.tensor([[1, 9, 3]]), torch.zeros(6)
    report = check_module(TwoInputs(), {"tokens": tokens, "scale": scale})
    assert report.macs == 3 * 6 * 2
    assert report.elementwise == {"multiply": 18}
    with_state = {"tokens": tokens, "scale": scale, "state": (torch.zeros(4), torch.zeros(2)), "twice": True}
    assert check_module(TwoInputs(), with_state).elementwise == {"multiply": 24, "add": 6}


def test_positional_arguments_with_a_state():
    x, state = torch.zeros(5, 1, 4), (torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    assert check_module(nn.LSTM(4, 3), (x, state)).macs == 5 * 4 * 3 * (4 + 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bytes_are_those_of_the_model_s_precision_and_macs_do_not_hang_on_it(dtype):
    report = check_module(nn.Linear(6, 2).to(dtype), torch.zeros(1, 6, dtype=dtype))
    assert report.param_bytes == 14 * dtype.itemsize
    assert (report.macs, report.dcase_macs) == (12, 14)
    assert report.peak_activation_bytes == 4 * 8, "in float32"


def test_a_model_without_data_is_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 1000))
    report = check_module(model, torch.zeros(1, 3, dtype=torch.long))
    assert report.macs == 3 * 4 * 1000
    assert report.param_bytes == 4 * (20 + 5000)
    assert model[1].weight.is_meta


def test_limits_hold_and_the_largest_layers_are_named():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False))
    x = torch.zeros(1, 10)
    enforce(check_module(model, x, limits=Limits(max_param_bytes=1200, max_macs=300)))
    with pytest.raises(BudgetExceeded, match=r"1,200 bytes .* \(over by 1\); largest: 0 800, 1 400"):
        enforce(check_module(model, x, limits=Limits(max_param_bytes=1199, max_macs=300)))
    with pytest.raises(BudgetExceeded, match=r"600 MACs for one second .*over by 300\)"):
        enforce(check_module(model, x, limits=Limits(max_param_bytes=1200, max_macs=300), clip_seconds=0.5))


def test_one_of_our_models_is_held_against_its_configuration():
    config = AudioMambaConfig(
        n_mels=16,
        n_frames=16,
        n_classes=2,
        d_model=8,
        blocks=uniform_blocks(1, 8, d_state=2),
        stem=PatchStem(patch_mels=8, patch_frames=8, stride_mels=8, stride_frames=8),
    )
    model = build_model(config)
    assert check_module(model, torch.zeros(1, 1, 16, 16)).witnesses == ("traced graph", "configuration")
    with pytest.raises(AumError, match=r"example of a AudioMamba: wanted a tensor \(1, 1, 16, 16\)"):
        check_module(model, torch.zeros(2, 1, 16, 16))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = torch.get_rng_state()
    check_module(model, torch.zeros(2, 4))
    assert model.training
    assert not model[0]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), expected)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def branch_on_a_value(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def loop_over_a_value(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max())):
        x = x + 1
    return x


def size_from_values(x: Tensor) -> Tensor:
    return x[x > 0]


def leave_torch(x: Tensor) -> Tensor:
    return torch.from_numpy(np.exp(x.numpy()))


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (branch_on_a_value, "if x.sum() > 0:"),
        (loop_over_a_value, "for _ in range(int(x.abs().max())):"),
        (size_from_values, "return x[x > 0]"),
        (leave_torch, "return torch.from_numpy(np.exp(x.numpy()))"),
    ],
)
def test_a_branch_on_values_is_refused_with_its_line(function, line):
    with pytest.raises(AumError) as caught:
        check_module(nn.Sequential(nn.Identity(), Function(function)), torch.zeros(1, 4))
    assert "Sequential: reads values of its input in Python" in str(caught.value)
    assert f"test_budget_module.py, line {function.__code__.co_firstlineno + 1}: {line}" in str(caught.value)


def test_branches_on_sizes_and_on_the_model_s_own_values_are_fine():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("switch", torch.tensor(True))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 3 and bool(self.switch):
                return x.view(x.shape[0], -1, 2) * len(x)
            raise AssertionError

    assert check_module(Fixed(), torch.zeros(1, 4)).elementwise == {"multiply": 4}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (Double.apply, "prim::PythonOp.Double"),
        (lambda x: scripted(x), "prim::CallFunction"),
        (torch.linalg.inv, "aten::linalg_inv"),
        (lambda x: torch.cdist(x, x), "aten::cdist"),
        (torch.matrix_exp, "aten::linalg_matrix_exp"),
    ],
)
def test_what_is_unknown_is_named_with_its_layer_and_never_zero(function, operator):
    model = nn.Sequential(nn.Linear(4, 4), Function(function))
    with pytest.raises(AumError, match=rf"cost is unknown(.|\n)*- 1: {operator}\n"):
        check_module(model, torch.eye(4))


def test_dropout_that_stays_on_is_refused():
    with pytest.raises(AumError, match=r"1: aten::dropout: drops values in evaluation mode too"):
        check_module(nn.Sequential(nn.Dropout(), Function(lambda x: nn.functional.dropout(x))), torch.zeros(1, 4))


def test_a_scripted_module_is_refused():
    with pytest.raises(AumError, match="ScriptModules. Wanted a module in plain torch, without TorchScript"):
        check_module(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Linear(4, 2), torch.zeros(1, 5), r"Linear: cannot be traced on input \(1, 5\): RuntimeError: mat1"),
        (nn.Linear(4, 2), {"x": torch.zeros(1, 4)}, "unexpected keyword argument 'x'"),
        (nn.Linear(4, 2), (), "Linear: example: found no tensor"),
        (Function(lambda x: x.shape), torch.zeros(1, 4), "Function: returns Size, wanted tensors"),
    ],
)
def test_an_example_that_does_not_fit(model, example, message):
    with pytest.raises(AumError, match=message):
        check_module(model, example)


def test_a_clip_without_length_is_refused():
    with pytest.raises(AumError, match="clip_seconds: found 0, wanted a positive number"):
        check_module(nn.Linear(4, 2), torch.zeros(1, 4), clip_seconds=0)


def test_layers_that_are_not_registered_are_refused_rather_than_left_out():
    hidden = nn.Linear(4, 4)
    with pytest.raises(AumError, match="that registers its layers"):
        check_module(Function(lambda x: hidden(x)), torch.zeros(1, 4))


def test_a_table_in_a_plain_attribute_is_noted():
    table = torch.ones(4, 4)
    report = check_module(Function(lambda x: x @ table + x @ table * 2.0), torch.zeros(1, 4))
    assert report.param_bytes == 0
    assert any(note.startswith("64 bytes of tensors that are neither parameters") for note in report.notes)


def test_figures_of_dcase_s_script_stand_beside():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 5))
    report = check_module(model, torch.zeros(1, 2, 6))
    assert report.dcase_bytes == 4 * (18 + 65)
    assert report.dcase_macs == 4 * 18 + 65, "torchinfo takes a bias for a product"
    assert report.macs == 4 * 18 + 60
    assert report.notes == ()


def test_what_torchinfo_fails_on_is_absent_not_wrong(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Failed to run torchinfo")

    monkeypatch.setattr("torchinfo.summary", fails)
    report = check_module(nn.Linear(4, 2), torch.zeros(1, 4))
    assert (report.macs, report.dcase_bytes, report.dcase_macs) == (8, 40, None)
    assert any("torchinfo 1.8.0" in note for note in report.notes)


def test_a_model_that_cannot_be_copied_is_refused():
    with pytest.raises(AumError, match="Function: cannot be copied: PickleError"):
        check_module(Function(scripted), torch.zeros(1, 4))
