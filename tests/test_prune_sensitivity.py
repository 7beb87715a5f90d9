"""`prune --sensitivity`: every dimension of a bundle's or a recipe's model, as table, page and JSON."""

import json
import shutil
from html.parser import HTMLParser

import pytest
import soundfile
from audio_trees import SCENES, SECONDS, TAU_RATE_HZ, noise
from tiny_recipe import command, write_recipe

from aum_compress.bundle import read_bundle
from aum_compress.compress.prune_plan import Costing
from aum_compress.report.prune_sensitivity import sensitivity_html, sensitivity_lines

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "copy")
    return tmp_path / "copy"


def answer(*words):
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_every_dimension_of_a_bundle_is_tried(copied):
    bundle = copied / "runs" / "tiny" / "04-distill"
    found = json.loads(
        answer("prune", bundle, "--sensitivity", "--clips", 20, "--ratio", 0.25, "--ratio", 0.6, "--json")
    )
    card = read_bundle(bundle).card
    now = Costing("int8", card.input.clip_seconds)(card.model)
    assert (found["param_bytes"], found["macs"], found["precision"]) == (*now, "int8")
    assert (found["part"], found["clips"]) == ("validation", 20)
    by_place = {}
    for one in found["dimensions"]:
        by_place.setdefault(one["place"], []).append(one)
        assert one["new_size"] < one["size"]
        assert one["param_bytes"] < now.param_bytes
    assert [one["new_size"] for one in by_place["layers.0.d_inner"]] == [12, 6]
    assert [one["kind"] for one in by_place["layers.1"]] == ["blocks"]
    assert {"d_model", "stem.0.channels", "stem.1.hidden", "layers.1.d_state", "layers.0.directions"} < by_place.keys()
    written = json.loads((copied / "runs" / "tiny" / "prune-sensitivity.json").read_text())
    assert written == {key: value for key, value in found.items() if key != "files"}


def test_what_has_no_smaller_size_is_named(copied):
    bundle = copied / "runs" / "tiny" / "04-distill"
    words = ("prune", bundle, "--sensitivity", "--clips", 8, "--set", "prune.round_to=8")
    assert "not tried, since no smaller multiple is left" in answer(*words)
    found = json.loads(answer(*words, "--json"))
    assert {"place": "stem.0.channels", "kind": "channels", "size": 8, "multiple": 8} in found["not_tried"]
    places = [one["place"] for one in found["not_tried"]]
    assert not {one["place"] for one in found["dimensions"]} & set(places)
    assert "stem.0.channels (8, in multiples of 8)" in (copied / "runs" / "tiny" / "prune-sensitivity.html").read_text()


def test_a_recipe_is_run_to_where_pruning_starts(copied, finished, tmp_path):
    # how this one would prune does not matter: it is within its budget as it is
    recipe = write_recipe(tmp_path, finished.tree, prune={"to_budget": True, "finetune": {"epochs": 1}})
    text = answer("prune", recipe, "--sensitivity", "--out", copied, "--importance", "magnitude", "--clips", 8)
    assert "04-distill" in json.loads((copied / "runs" / "tiny" / "prune-sensitivity.json").read_text())["bundle"]
    assert "loss increase" in text
    assert "layers.1.d_inner" in text
    assert "ranked by magnitude" in text
    assert str(copied / "runs" / "tiny" / "prune-sensitivity.html") in text


@pytest.mark.parametrize(
    ("bundle", "words", "wrong"),
    [
        (
            "runs/tiny/06-quantize",
            (),
            "06-quantize: holds model int8 of a audio_mamba; wanted a bundle of an Audio Mamba",
        ),
        ("runs/tiny/01-reference", (), "holds model fp32 of a cp_mobile"),
        ("exports/tiny", (), "holds onnx"),
        ("runs/tiny/04-distill", ("--ratio", "1.5"), "ratios: found 1.5, wanted shares above 0 and below 1"),
    ],
)
def test_what_cannot_be_tried_is_refused(finished, bundle, words, wrong):
    result = command("prune", finished.out / bundle, "--sensitivity", *words)
    assert result.exit_code == 2
    assert wrong in result.stderr


@pytest.mark.parametrize(("verb", "bundle"), [("prune", "04-distill"), ("quantize", "05-prune")])
def test_a_model_of_other_data_or_features_than_the_recipes_is_refused(finished, tmp_path, verb, bundle):
    place = finished.out / "runs" / "tiny" / bundle
    for number, label in enumerate((*SCENES[:2], "bakery", *SCENES[2:])):  # one that the model does not know
        (tmp_path / label).mkdir()
        for clip in range(4):
            soundfile.write(tmp_path / label / f"{clip}.wav", noise(10 * number + clip), TAU_RATE_HZ)
    folders = f"data={{kind: folders, root: {tmp_path}, clip_seconds: {SECONDS}}}"
    for setting, differs in (
        (folders, "labels: knows airport, metro_station, street_traffic; the recipe's data have airport, bakery,"),
        ("features.f_min_hz=100", "f_min_hz: reads 0.0; the recipe gives 100.0"),
    ):
        result = command(verb, place, "--sensitivity", "--set", setting)
        assert result.exit_code == 2
        assert f"{bundle}: made of other data or features than those of recipe tiny:" in result.stderr
        assert differs in result.stderr


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("prune", ("--ratio", "0.5")),
        ("prune", ("--importance", "taylor")),
        ("prune", ("--clips", "256")),
        ("quantize", ("--clips", "512")),
    ],
)
def test_what_belongs_to_sensitivity_is_refused_without_it(finished, verb, words):
    result = command(verb, finished.out / "runs" / "tiny" / "04-distill", *words)
    assert result.exit_code == 2
    assert f"{verb}: {words[0]} was given, which belongs to --sensitivity. Add --sensitivity, or" in result.stderr


class Charts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.captions, self.curves, self.waiting = [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.waiting = tag == "figcaption"
        self.curves += tag == "polyline"

    def handle_data(self, data):
        if self.waiting:
            self.captions.append(data)
            self.waiting = False


def test_the_page_has_a_chart_for_each_block_and_stage():
    def tried(place, kind, size, new_size, rise):
        cost = {"param_bytes": 900, "macs": 9_000}
        named = {"place": place, "kind": kind, "size": size, "new_size": new_size, "ratio": 1 - new_size / size}
        return named | {"loss_increase": rise} | cost

    found = {
        "recipe": "<b>",
        "loss": 1.0,
        "clips": 8,
        "part": "train",
        "importance": "taylor",
        "precision": "int8",
        "param_bytes": 1_000,
        "macs": 10_000,
        "dimensions": [
            *(tried("layers.0.d_inner", "d_inner", 32, size, rise) for size, rise in ((24, 0.1), (16, 0.4))),
            *(tried("layers.0.d_state", "d_state", 8, size, rise) for size, rise in ((6, 0.01), (4, 0.02))),
            tried("layers.0.directions", "directions", 2, 1, 0.5),
            tried("d_model", "d_model", 32, 16, 0.7),
            tried("stem.0.channels", "channels", 16, 8, 0.6),
        ],
        "not_tried": [],
    }
    page = sensitivity_html(found)
    charts = Charts(page)
    assert charts.captions == ["layers.0", "residual stream: d_model", "stem.0: channels"]
    assert charts.curves == 4
    assert "<b>" not in page
    assert "layers.0.d_state to 6 (+0.010)" in sensitivity_lines(found)[1]
