"""The planner: every figure exact, every limit kept, and what it writes is what a recipe builds."""

import json
import random
import subprocess
import sys

import pytest
import yaml
from tiny_recipe import command

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.budget.check import check_model
from aum_compress.budget.latency import estimated_ms
from aum_compress.budget.limits import RULES, named_limits
from aum_compress.budget.plan import SORTS, Plan, Wanted, first_rows, make_plan, token_range
from aum_compress.budget.plan_recipe import student_section, write_student
from aum_compress.budget.records import Limits
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.integer_inputs import default_storages
from aum_compress.models.quantized import stored_tensors, swap_in_quantized
from aum_compress.recipe_schema import StudentSection


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(Wanted())


def test_thousands_are_looked_at_and_all_that_fit_are_found(plan):
    assert plan.looked_at > 100_000
    assert len(plan.students) > 10_000
    for student in plan.students:
        assert student.cost.param_bytes <= 128_000
        assert student.macs <= 30_000_000
        assert 64 <= student.n_tokens <= 400


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(fewest_tokens=128, most_tokens=144),
        Wanted(precision="fp16", mixers=("mamba2", "conv"), fewest_tokens=16, most_tokens=64),
        Wanted(precision="fp32", n_mels=64, n_frames=200, n_classes=4, clip_seconds=2.0, most_tokens=100),
    ],
    ids=["int8", "mamba2 and conv", "other features"],
)
def test_figures_are_those_of_the_counters_to_the_last_byte(wanted):
    students = make_plan(wanted).students
    for student in random.Random(0).sample(students, 40):
        config = AudioMambaConfig.model_validate(student.config.model_dump())
        stored = analytic_stored(config, wanted.precision).values()
        assert config.n_tokens == student.n_tokens
        assert student.cost.param_bytes == sum(layer.param_bytes for layer in stored)
        assert student.cost.params == sum(layer.params for layer in stored)
        assert student.cost.wide_params == sum(layer.wide_params for layer in stored)
        assert student.cost.macs == sum(analytic_macs(config).values())
        assert student.cost.ms == pytest.approx(estimated_ms(config))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "conv"])
def test_figures_are_those_of_the_quantised_model(mixer):
    found = make_plan(Wanted(fewest_tokens=64, most_tokens=80, mixers=(mixer,)))
    student = found.best_by_tokens()[-1]
    model = fold_batch_norm(build_model(AudioMambaConfig.model_validate(student.config.model_dump())))
    swap_in_quantized(model, default_storages(model))
    spec = InputSpec(front_end=LogMelConfig(), clip_seconds=1.0)
    report = check_model(model, spec, stored_tensors(model, half=True))
    assert (report.param_bytes, report.params, report.macs) == (
        student.cost.param_bytes,
        student.cost.params,
        student.macs,
    )
    assert not report.over


def test_bytes_bind_at_64_tokens_and_macs_at_250(plan):
    binding = plan.binding_by_tokens()
    assert set(binding[64]) == {"bytes"}
    for tokens, counts in binding.items():
        if tokens <= 128:
            assert set(counts) == {"bytes"}, tokens
        if tokens >= 250:
            assert counts.most_common(1)[0][0] == "MACs", tokens
        if tokens >= 264:
            assert set(counts) == {"MACs"}, tokens
    assert max(binding) >= 300


def test_halved_weights_move_the_crossing_to_more_tokens():
    binding = make_plan(Wanted(precision="fp16", fewest_tokens=144, most_tokens=256)).binding_by_tokens()
    assert all(counts.most_common(1)[0][0] == "bytes" for counts in binding.values())


@pytest.mark.parametrize("sort", SORTS)
def test_criteria_sort(sort):
    students = make_plan(Wanted(fewest_tokens=64, most_tokens=66), sort).students
    figures = {
        "use": lambda s: -s.use,
        "params": lambda s: -s.cost.params,
        "macs": lambda s: s.macs,
        "ms": lambda s: s.cost.ms,
    }
    found = [figures[sort](student) for student in students]
    assert found == sorted(found)


def test_use_is_one_only_where_nothing_is_left_over(plan):
    first = plan.students[0]
    assert first.use == pytest.approx((first.cost.param_bytes / 128_000 * first.macs / 30_000_000) ** 0.5)
    assert 0.99 < first.use <= 1
    assert first.binding == max(first.shares, key=first.shares.get)


def test_first_rows_are_one_for_each_number_of_tokens_unless_every_is_wanted(plan):
    rows = first_rows(plan, 1000, every=False)
    assert len({(student.tokens_are, student.n_tokens) for student in rows}) == len(rows)
    assert {student.tokens_are for student in rows} == {"patch", "frame", "cell"}
    assert first_rows(plan, 3, every=True) == list(plan.students[:3])


def test_a_limit_on_time_is_kept():
    wanted = {"fewest_tokens": 64, "most_tokens": 66}
    slow = make_plan(Wanted(**wanted)).students
    middle = sorted(student.cost.ms for student in slow)[len(slow) // 2]
    quick = make_plan(Wanted(**wanted, max_ms=middle)).students
    assert 0 < len(quick) < len(slow)
    assert all(student.cost.ms <= middle for student in quick)


def test_dcase2022_allows_parameters_not_bytes_and_no_wide_matrix():
    limits = named_limits("dcase2022")
    assert RULES["dcase2022"].limits == limits == Limits(None, 30_000_000, 128_000, int8_weights=True)
    with pytest.raises(BudgetExceeded, match="state matrices of mixer mamba are stored in float16"):
        make_plan(Wanted(limits=limits, most_tokens=64))
    students = make_plan(Wanted(limits=limits, mixers=("mamba2",), fewest_tokens=64, most_tokens=66)).students
    assert all(student.cost.params <= 128_000 and not student.cost.wide_params for student in students)
    assert max(student.cost.param_bytes for student in students) > 128_000
    assert "parameters" in {student.binding for student in students}


def test_what_is_written_is_built_by_a_recipe(plan, tmp_path):
    rows = first_rows(plan, 20, every=False)
    for number, student in enumerate(rows, start=1):
        path = tmp_path / f"{number}.yaml"
        write_student(rows, number, path)
        section = StudentSection.model_validate(yaml.safe_load(path.read_text())["student"])
        assert section.resolve(256, 65, 10) == AudioMambaConfig.model_validate(student.config.model_dump())
    assert path.read_text().startswith(f"# {rows[-1].n_tokens} tokens, {rows[-1].cost.param_bytes:,} bytes at int8")
    with pytest.raises(AumError, match="exists and is not overwritten"):
        write_student(rows, 1, path)
    with pytest.raises(AumError, match="row 21: wanted one of 1 to 20"):
        write_student(rows, 21, tmp_path / "new.yaml")
    with pytest.raises(AumError, match="cannot be written"):
        write_student(rows, 1, tmp_path / "none" / "new.yaml")


@pytest.mark.parametrize("mixer", ["mamba2", "conv"])
def test_students_of_other_mixers_can_be_written_too(mixer):
    student = make_plan(Wanted(mixers=(mixer,), fewest_tokens=64, most_tokens=66)).students[0]
    read = StudentSection.model_validate(student_section(student)).resolve(256, 65, 10)
    assert read == AudioMambaConfig.model_validate(student.config.model_dump())


@pytest.mark.parametrize(("text", "found"), [("64..400", (64, 400)), ("65", (65, 65)), ("1..1", (1, 1))])
def test_token_ranges(text, found):
    assert token_range(text) == found


@pytest.mark.parametrize("text", ["", "64..", "..64", "a", "64-400", "-3", "6.5"])
def test_token_ranges_of_another_form_are_refused(text):
    with pytest.raises(AumError, match=r"wanted FEWEST\.\.MOST"):
        token_range(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fewest_tokens": 10, "most_tokens": 9}, r"found 10\.\.9, wanted FEWEST\.\.MOST"),
        ({"fewest_tokens": 0}, "fewest_tokens: found 0"),
        ({"clip_seconds": 0.0}, "clip_seconds: found 0.0"),
        ({"mixers": ("gru",)}, "found 'gru', wanted one of mamba, mamba2, conv"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(AumError, match=message):
        Wanted(**wrong)
    with pytest.raises(AumError, match="sort: found 'beauty'"):
        make_plan(Wanted(), "beauty")


def test_a_block_in_full_leaves_no_other_word_about_blocks():
    block = {"mixer": "mamba2", "d_inner": 32, "d_state": 16}
    found = StudentSection.model_validate({"depth": 3, "blocks": [block]}).resolve(256, 65, 10)
    assert [(b.mixer, b.d_inner, b.head_dim) for b in found.blocks] == [("mamba2", 32, 16)] * 3
    for key, value in {"d_inner": 32, "d_state": 4, "dt_rank": 1, "block_type": "v1"}.items():
        with pytest.raises(ValueError, match=f"blocks: say all about the blocks; leave out {key}"):
            StudentSection.model_validate({"blocks": [block], key: value})


# --- on the command line


def test_plan_on_the_command_line_shows_and_writes(tmp_path):
    path = tmp_path / "student.yaml"
    result = command("budget", "plan", "--tokens", "64..66", "--top", 2, "--write", 2, path)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["#", "tokens"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert "configurations fit; 2 shown" in lines[3]
    assert any(line.startswith("bytes bind most students") for line in lines)
    assert yaml.safe_load(path.read_text())["student"]["preset"] == "student"


def test_plan_as_json_has_stable_keys():
    result = command("budget", "plan", "--tokens", "64", "--mixer", "mamba2", "--mixer", "conv", "--every", "--json")
    found = json.loads(result.stdout)
    assert set(found) == {"wanted", "looked_at", "fitting", "binding_by_tokens", "students"}
    assert found["wanted"]["mixers"] == ["mamba2", "conv"]
    assert found["wanted"]["limits"] == {"max_param_bytes": 128_000, "max_macs": 30_000_000}
    assert len(found["students"]) == 20
    assert set(found["students"][0]) == {
        *("tokens", "token_grid", "stem", "d_model", "depth", "block", "param_bytes", "params", "macs"),
        *("estimated_ms", "binding", "shares", "use"),
    }


def test_plan_of_nothing_is_exit_3():
    result = command("budget", "plan", "--tokens", "64", "--max-param-bytes", 100)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "configurations with 64..64 tokens at int8 fits: max_param_bytes 100, max_macs 30,000,000" in result.stderr
    assert command("budget", "plan", "--tokens", "64", "--max-ms", 0.001).exit_code == 3


def test_plan_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import aum_compress.budget.plan_recipe"
    subprocess.run([sys.executable, "-c", code], check=True)
