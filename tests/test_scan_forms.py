"""The selective scan in ONNX, in every form and for every kind of block, is the oracle."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from answers import message
from exported import CONFIG, LABELS, SPEC, liven, metadata
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_recipe import command

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.export.onnx_writer import export_onnx, fold_if_needed
from aum_compress.export.scan_forms import FORMS
from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_NAMES, scan_function
from aum_compress.export.ssd_function import ssd_function
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.models.config import BlockConfig
from aum_compress.models.factory import build_model
from aum_compress.models.scan import selective_scan_oracle, two_way_scan
from aum_compress.models.ssd import ssd, ssd_oracle

CONTROL_FLOW = {"Scan", "Loop", "If"}
KINDS = st.sampled_from(list(SCAN_NAMES))
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
"""B, L, D, N."""
# a graph is made for every example: a failure is shown as found
FEW = settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def draw(kind: str, sizes: tuple[int, int, int, int], seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Inputs of the function, in float64."""
    batch, length, d_inner, d_state = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (batch, length, d_inner),
        "B": (batch, length, d_state),
        "A": (d_inner, d_state),
        "D": (d_inner,),
    }
    shapes |= {"delta": shapes["u"], "z": shapes["u"], "C": shapes["B"]}
    tensors = {}
    for name in scan_function(20, kind, "scan", length).input:
        letter = name.removesuffix("_back")
        values = torch.randn(shapes[letter], generator=generator, dtype=torch.float64)
        tensors[name] = -torch.exp(values) if letter == "A" else scale * values if letter == "delta" else values
    return {name: tensor.float().double() for name, tensor in tensors.items()}


def oracle(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """y (B,L,D): both directions by the plain loop."""
    given = {name: t.transpose(1, 2) if t.dim() == 3 else t for name, t in tensors.items()}
    own = {letter: given[letter] for letter in ("u", "delta", "A", "B", "C", "D")}
    y = selective_scan_oracle(**own, z=given["z"], delta_softplus=True)
    if "A_back" in given:
        turned = {letter: t.flip(-1) if t.dim() == 3 else t for letter, t in own.items()}
        turned |= {name.removesuffix("_back"): t for name, t in given.items() if name.endswith("_back")}
        y = y + selective_scan_oracle(**turned, z=given["z"].flip(-1), delta_softplus=True).flip(-1)
    return y.transpose(1, 2)


def run(kind: str, form: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    length = tensors["u"].shape[1]
    return run_function(scan_function(20, kind, form, length), tensors)


def run_function(function: onnx.FunctionProto, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    feeds = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    float32 = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(name, float32, [None] * t.ndim) for name, t in feeds.items()]
    n_axes = next(iter(feeds.values())).ndim
    output = onnx.helper.make_tensor_value_info("y", float32, [None] * n_axes)
    call = onnx.helper.make_node(function.name, list(feeds), ["y"], domain=SCAN_DOMAIN)
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([call], "scan", inputs, [output]),
        functions=[function],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(SCAN_DOMAIN, 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def relative_error(found: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max() / wanted.abs().max())


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_the_oracle(form):
    @FEW
    @given(KINDS, SIZES, st.integers(0, 10_000))
    def check(kind, sizes, seed):
        tensors = draw(kind, sizes, seed)
        assert relative_error(run(kind, form, tensors), oracle(tensors)) < 1e-5

    check()


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_step_sizes_from_nothing_to_forgetting_everything_at_once_keep_their_digits(form, scale):
    """Steps so large that exp(-cumsum(dt*A)) is infinite, and so small that 1 + exp(delta) is 1."""
    tensors = draw("fo-bi", (1, 40, 4, 3), seed=3, scale=scale)
    if not scale:
        tensors["delta"] = torch.full_like(tensors["delta"], -17)
        tensors["D"] = torch.zeros_like(tensors["D"])
    assert relative_error(run("fo-bi", form, tensors), oracle(tensors)) < 1e-5


def test_the_refused_form_is_not_finite_where_ours_are_exact():
    """The cumulative-sum form divides by exp(s), which leaves float32 within 28 steps of dt 0.2 and A -16."""
    tensors = draw("one-way", (1, 40, 2, 2), seed=0)
    tensors["delta"] = torch.full_like(tensors["delta"], 0.2).expm1().log()  # softplus of it is 0.2
    tensors["A"] = torch.full_like(tensors["A"], -16.0)
    sums = torch.full((40,), 0.2 * -16.0).cumsum(0)
    assert not torch.isfinite(torch.exp(-sums)).all()
    for form in FORMS:
        assert relative_error(run("one-way", form, tensors), oracle(tensors)) < 1e-5


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize(("length", "steps"), [(12, 0.3), (40, 5.0), (144, 5.0), (513, 30.0)])
def test_ssd_is_the_oracle_even_behind_steps_so_large_that_float32_sums_lose_the_small_ones(two_way, length, steps):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (1, length, 2, 3),
        "dt": (1, length, 2),
        "A": (2,),
        "B": (1, length, 4),
        "C": (1, length, 4),
        "D": (2,),
    }
    tensors = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    tensors["A"] = torch.tensor([-1.0, -8.0], dtype=torch.float64)
    tensors["dt"] = (torch.rand(shapes["dt"], generator=generator) * steps).double()
    tensors["dt"][:, length // 2 :] = torch.tensor(0.01).double()
    wanted = ssd_oracle(*tensors.values(), two_way)
    small = slice(length // 2 + 1, None)
    with torch.no_grad():
        torch_s = ssd(*(t.float() for t in tensors.values()), two_way).numpy()
    for found in (run_function(ssd_function(20, two_way), tensors), torch_s):
        assert relative_error(found, wanted) < 1e-5
        assert relative_error(found[:, small], wanted[:, small]) < 1e-5


@pytest.mark.parametrize("name", ["cumsum", "cumulative", "cumulative-sum"])
def test_the_refused_form_is_asked_for_and_the_answer_says_why(name, tmp_path):
    text = message("export", tmp_path / "none", "--to", tmp_path / "to", "--scan", name)
    assert f"--scan {name}: exp(s) * cumsum(drive * exp(-s)), with s the running sum of dt*A, is refused" in text
    assert "Wanted scan, chunked, unrolled (docs/latency.md)" in text
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"data: {{kind: synth}}\nexport: {{scan: {name}}}\n")
    assert f"export.scan: {name}: exp(s) * cumsum(drive * exp(-s))" in message("recipes", "check", recipe)
    other = command("export", tmp_path / "none", "--to", tmp_path / "to", "--scan", "other")
    assert other.exit_code == 2
    assert "'other' is not one of 'scan', 'chunked', 'unrolled'" in " ".join(other.stderr.split())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["fo-bi", "bi-bi"]), SIZES, st.integers(0, 10_000))
def test_two_way_scan_is_the_oracle_in_both_directions(kind, sizes, seed):
    tensors = draw(kind, sizes, seed)
    given = {name: t.transpose(1, 2) if t.dim() == 3 else t for name, t in tensors.items()}
    back = tuple(given[f"{letter}_back"] for letter in ("u", "delta", "B", "C", "D")) if kind == "bi-bi" else None
    own = tuple(given[letter] for letter in ("u", "delta", "A", "B", "C", "D", "z", "A_back"))
    with torch.no_grad():
        node = two_way_scan(*own, back)
    torch.testing.assert_close(node, oracle(tensors).transpose(1, 2))
    torch.testing.assert_close(two_way_scan(*own, back), node)  # as training runs it


def mixed_model():
    blocks = tuple(BlockConfig(d_inner=12, d_state=3, dt_rank=2, block_type=kind) for kind in ("none", "v1", "v2"))
    return liven(build_model(CONFIG.model_copy(update={"blocks": blocks})))


@pytest.mark.parametrize("form", list(FORMS))
def test_a_whole_model_exports_verifies_and_counts_alike_in_every_form(form, tmp_path):
    model, path = mixed_model(), tmp_path / "model.onnx"
    export_onnx(model, path, metadata("fp32"), scan=form)
    verification = verify_onnx(path, Reference(fold_if_needed(model), LABELS, SPEC))
    assert verification.passed, "\n".join(verification.lines())
    operators = {node.op_type for function in onnx.load(path).functions for node in function.node}
    assert bool(CONTROL_FLOW & operators) == (form == "scan")
    report = check_onnx(path, config=fold_if_needed(model).config)  # agrees with the configuration, or raises
    assert any("runs" in note and "products" in note for note in report.notes) == (form == "chunked")
