import pytest

from aum_compress.audio.config import LogMelConfig
from aum_compress.errors import RecipeError
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.recipe import dump_recipe, find_recipe, load_recipe, recipe_head, recipes_folder, validate_recipe
from aum_compress.recipe_schema import ModelSection, StudentSection

MINIMAL = """\
data: {kind: synth}
student: {train: {epochs: 3, learning_rate: 1e-3}}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def shipped():
    return sorted(recipes_folder().glob("*.yaml"))


def test_the_recipes_of_the_readme_ship():
    wanted = {"quickstart", "esc10-mobile", "folder", "tau-128kb-int8", "tau-64k-fp16"}
    assert {path.stem for path in shipped()} >= wanted


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_says_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = " ".join(recipe_head(path)).lower()
    assert all(word in head for word in ("makes", "takes", "measured"))
    _, n_mels, n_frames = 1, recipe.features.n_mels, recipe.features.n_frames(recipe.data.clip_seconds)
    for section in (recipe.reference, recipe.teacher, recipe.student):
        if section:
            assert section.resolve(n_mels, n_frames, 10).n_mels == n_mels
    assert validate_recipe(recipe.model_dump(mode="json", by_alias=True), "again") == recipe


def test_scientific_numbers_are_numbers(minimal):
    assert load_recipe(minimal).student.train.learning_rate == 1e-3


def test_name_defaults_to_the_file(minimal):
    assert load_recipe(minimal).name == "mine"


def test_settings_are_applied_and_validated(minimal):
    recipe = load_recipe(minimal, ["student.train.epochs=7", "features.n_mels=64", "quantize.weight_bits=8", "seed=3"])
    assert (recipe.student.train.epochs, recipe.features.n_mels, recipe.seed) == (7, 64, 3)
    assert recipe.quantize.weight_bits == 8
    assert load_recipe(minimal, ["quantize.weight_bits=8", "quantize=null"]).quantize is None


def test_resolved_recipe_reads_back_equal(minimal, tmp_path):
    recipe = load_recipe(minimal, ["distill.train.epochs=2", "distill.lambda=0.5", "distill.teachers=[some/bundle]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert "lambda: 0.5" in again.read_text()


def test_a_setting_changes_the_section_it_names_and_no_other():
    """The shipped recipes say a training once, behind a YAML anchor."""
    path = find_recipe("quickstart")
    before, after = load_recipe(path), load_recipe(path, ["distill.train.augment.mixstyle_p=0"])
    assert before.distill.train.augment.mixstyle_p == before.teacher.train.augment.mixstyle_p > 0
    assert after.distill.train.augment.mixstyle_p == 0
    assert (after.teacher, after.prune) == (before.teacher, before.prune)


def test_null_switches_off_what_has_a_default(minimal, tmp_path):
    recipe = load_recipe(minimal, ["student.train.gradient_clip=null"])
    assert load_recipe(minimal).student.train.gradient_clip == 1.0
    assert recipe.student.train.gradient_clip is None
    again = tmp_path / "mine.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert "teacher" not in again.read_text(), "what is left out stays left out"


def test_pruning_says_all_its_defaults(minimal):
    by_ratio = load_recipe(minimal, ["prune.finetune.epochs=1"]).prune
    assert (by_ratio.ratio, by_ratio.dimensions, by_ratio.steps) == (0.25, ("d_inner",), 1)
    to_budget = load_recipe(minimal, ["prune={to_budget: true, finetune: {epochs: 1}}"]).prune
    assert to_budget.ratio is to_budget.steps is None
    assert {"d_model", "stem", "blocks"} < set(to_budget.dimensions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["student.train.epoch=3"], "student.train.epoch: unknown key; did you mean epochs?"),
        (["studnt.train.epochs=3"], "studnt: unknown key; did you mean student?"),
        (["student.train.epochs=three"], "student.train.epochs: Input should be a valid integer.*got 'three'"),
        (["student.train.epochs=0"], "student.train.epochs: Input should be greater than 0, got 0"),
        (["data.kind=tua"], "data: Input tag 'tua'.*'tau', 'folders', 'synth'"),
        (["prune.ratio=1.5", "prune.finetune.epochs=1"], "prune.ratio: Input should be less than 1, got 1.5"),
        (["features.window_samples=9999"], "features: window_samples 9999 must be at most n_fft 4096"),
        (["export.dynamic_batch=true"], "export.precisions: int8 needs a quantize section"),
        (["student.train=null"], "student.train: needed"),
        (
            ["quantize={weights: int4-weight}", "export={ort: true, precisions: [int4]}"],
            "export.ort: int4: onnxruntime cannot read weights of 4 bits back from its own format",
        ),
        (["distill.train.epochs=1"], "distill.teachers: names teacher, but the recipe has no section teacher"),
        (
            ["distill.train={epochs: 1, label_smoothing: 0.1}", "distill.teachers=[some/bundle]"],
            "distill.train.label_smoothing: has no part in the distillation loss",
        ),
        (["verify.clips=3"], "verify: needs an export section"),
        (["student={preset: cp-mobile, train: {epochs: 1}}", "prune.finetune.epochs=1"], "prune: works on Audio Mamba"),
        (
            ["quantize={train: {epochs: 1, activation_checkpointing: true}}"],
            "quantize.train.activation_checkpointing: a block that is computed again would move the ranges",
        ),
        (["prune={ratio: 0.8, finetune: {epochs: 1}}"], "ratio: 0.8 is above max_block_ratio, 0.75: raise that one"),
        (["quantize={frozen_epochs: 4, train: {epochs: 4}}"], "4 of 4 epochs, in which no range would move"),
        (["prune={to_budget: true, ratio: 0.2, finetune: {epochs: 1}}"], "ratio: has no part in pruning to the budget"),
        (["prune={dimensions: [d_state, d_state], finetune: {epochs: 1}}"], "d_state, d_state: each is named once"),
        (["prune={dimensions: [heads], finetune: {epochs: 1}}"], "prune.dimensions.0: Input should be 'd_inner'"),
        (["prune={start: teacher, finetune: {epochs: 1}}"], "prune.start: teacher, but the recipe has no section"),
        (["prune={start: teacher, finetune: {epochs: 1}}"], "leave out student and distill, which would go unused"),
        (
            ["teacher={preset: cp-mobile, train: {epochs: 1}}", "prune={start: teacher, finetune: {epochs: 1}}"],
            "prune: works on Audio Mamba, and cp-mobile is none",
        ),
        (
            [
                "teacher={preset: aum-tiny, train: {epochs: 1}}",
                "prune={start: teacher, finetune: {epochs: 1, label_smoothing: 0.1}}",
            ],
            "prune.finetune.label_smoothing: has no part in the distillation loss",
        ),
        (["student.train.augment.device_response_p=0.5"], "device_response_p needs device_response_folder"),
        (["reference={preset: cp-mobile, depth: 3, train: {epochs: 1}}"], "depth cannot be changed"),
        (["reference={preset: cp-mobile, checkpoint: a.pth, train: {epochs: 1}}"], "checkpoint cannot be changed"),
        (
            ["reference={preset: cp-mobile, train: {epochs: 1, activation_checkpointing: true}}"],
            "reference: train.activation_checkpointing: works on Mamba blocks, and cp-mobile has none",
        ),
        (
            ["student.preset=cp-mobile", "distill={teachers: [x], train: {epochs: 1, activation_checkpointing: true}}"],
            "distill.train.activation_checkpointing: works on Mamba blocks",
        ),
        (["data.validation_fraction=0"], "student.train.keep: best is chosen on validation clips"),
        (["student.train.weight_average=1.0"], "student.train.weight_average: Input should be less than 1"),
        (
            ["student.train.weight_average=0.9", "student.train.strategy=fsdp"],
            "weight_average: needs all weights in each process, and strategy fsdp cuts them up; use ddp",
        ),
        (
            ["student.train.views=4", "student.train.augment.time_roll_seconds=0"],
            "views: 4 were wanted, and all would be the same: set one of augment.time_roll_seconds above 0",
        ),
        (
            ["student.train.augment.speed_factor=1.2"],
            "augment.speed_factor: is drawn for views alone; set",
        ),
        (
            ["student.train.augment.device_response_exclude=[a.wav]"],
            "device_response_exclude has nothing to leave files out of: device_response_p is 0",
        ),
        (["distill={train: {epochs: 1}, feature_anneal: 0}"], "distill.feature_anneal: Input should be greater than 0"),
        (["student.train.scan_learning_rate=0"], "scan_learning_rate: Input should be greater than 0"),
        (["student.position=rope", "student.directions=3"], "student.directions: unknown key"),
        (["student"], "--set student: wanted section.key=value"),
        (["seed.x=1"], "--set seed.x=1: seed is not a section"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(minimal, settings, message):
    settings = ["seed=0", *settings]
    with pytest.raises(RecipeError, match=message):
        load_recipe(minimal, settings)


def test_all_problems_at_once(minimal):
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, ["student.train.epochs=x", "seed=-1", "teacher.preset=aum-huge"])
    message = str(caught.value)
    assert all(place in message for place in ("student.train.epochs:", "seed:", "teacher.preset:", "teacher.train:"))


def test_not_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("data: [unclosed")
    with pytest.raises(RecipeError, match=r"bad.yaml: is not YAML"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(RecipeError, match="wanted sections"):
        load_recipe(path)


def test_no_such_recipe_suggests_one():
    with pytest.raises(RecipeError, match="quickstrat: no such recipe.*Did you mean quickstart"):
        find_recipe("quickstrat")


def test_sections_resolve_to_configurations():
    config = ModelSection(preset="aum-tiny", d_model=64, depth=3, d_state=8, block_type="none").resolve(64, 33, 5)
    assert isinstance(config, AudioMambaConfig)
    assert [(b.d_inner, b.d_state, b.dt_rank, b.block_type) for b in config.blocks] == [(128, 8, 4, "none")] * 3
    assert isinstance(ModelSection(preset="cp-mobile").resolve(256, 65, 10), CPMobileConfig)
    wide = StudentSection(d_inner=80).resolve(256, 65, 10)
    assert {block.d_inner for block in wide.blocks} == {80}


def test_head_positions_and_blocks_are_chosen_in_the_recipe(minimal):
    settings = ["student.head=mlp", "student.position=rope", "student.block_type=v1"]
    config = load_recipe(minimal, settings).student.resolve(256, 65, 10)
    assert (config.head, config.position, config.blocks[0].block_type) == ("mlp", "rope", "v1")
    assert load_recipe(minimal, ["student.directions=1"]).student.block_type == "none"  # as recipes once said it
    with pytest.raises(RecipeError, match="d_model 62 must be a multiple of 4"):
        load_recipe(minimal, [*settings, "student.d_model=62"]).student.resolve(256, 65, 10)


def test_stem_that_does_not_fit_is_a_recipe_error():
    with pytest.raises(RecipeError, match="preset aum-tiny: .*leaves a 0 x"):
        ModelSection(preset="aum-tiny").resolve(8, 65, 10)


def test_front_end_clip_arithmetic():
    front_end = LogMelConfig()
    assert (front_end.clip_samples(1.0), front_end.n_frames(1.0)) == (32_000, 65)
