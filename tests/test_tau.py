"""The TAU loader, on a small tree with real names and, where it is at hand, on the official split files."""

from collections import Counter
from pathlib import Path

import pytest
from audio_trees import META_COLUMNS, SCENES, meta_row, tau_names, write_table, write_tau_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import DataConfig, TauData
from aum_compress.data.splitting import read_table, take_groups, take_stratified
from aum_compress.data.tau import load_tau, parse_name
from aum_compress.errors import DataError


def config(root: Path, **settings: object) -> TauData:
    return TauData(kind="tau", root=root, **settings)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tau_tree(tmp_path_factory.mktemp("tau") / "tree")


@pytest.fixture
def names_only(tmp_path: Path) -> Path:
    """The tree without its sounds: the loader opens none."""
    (tmp_path / "audio").mkdir()
    train, test = tau_names()
    for name in train + test:
        (tmp_path / name).touch()
    write_table(tmp_path / "split25.csv", META_COLUMNS[:2], [meta_row(name)[:2] for name in train])
    write_table(tmp_path / "test.csv", META_COLUMNS[:2], [meta_row(name)[:2] for name in test])
    return tmp_path


def test_index_of_the_official_lists(tree: Path) -> None:
    index = load_tau(config(tree, validation_fraction=0.2), seed=0)
    train, test = tau_names()
    assert index.labels == SCENES
    assert {clip.clip_id for clip in index.train + index.validation} == set(train)
    assert [clip.clip_id for clip in index.test] == test
    assert index.seen_devices == {"a", "b", "s1"}
    assert all(clip.path.is_file() for clip in index.train)
    # one of six places a class
    assert Counter(clip.label for clip in index.validation) == dict.fromkeys(SCENES, 4)
    assert not {clip.group for clip in index.train} & {clip.group for clip in index.validation}


def test_names_say_what_meta_says(tree: Path, names_only: Path) -> None:
    with_meta, without = load_tau(config(tree), seed=3), load_tau(config(names_only), seed=3)
    for one, other in zip(with_meta.train + with_meta.test, without.train + without.test, strict=True):
        assert (one.clip_id, one.label, one.device, one.group) == (
            other.clip_id,
            other.label,
            other.device,
            other.group,
        )


def test_meta_wins_over_names(names_only: Path) -> None:
    train, test = tau_names()
    rows = [
        (name, scene, "somewhere-else" if device == "b" else place, "phone")
        for name, scene, place, device in map(meta_row, train + test)
    ]
    write_table(names_only / "meta.csv", META_COLUMNS, rows)
    index = load_tau(config(names_only), seed=0)
    assert index.seen_devices == {"phone"}
    assert "somewhere-else" in {clip.group for clip in index.train + index.validation}


def test_seed_decides_validation(tree: Path) -> None:
    def places(seed: int) -> set[str]:
        return {clip.group for clip in load_tau(config(tree), seed).validation}

    assert places(1) == places(1)
    assert len({frozenset(places(seed)) for seed in range(5)}) > 1


def test_parse_name() -> None:
    root = Path("root")
    clip = parse_name(root, "audio/street_pedestrian-lisbon-1000-40000-7-s3.wav")
    assert clip == Clip(
        "audio/street_pedestrian-lisbon-1000-40000-7-s3.wav",
        root / "audio/street_pedestrian-lisbon-1000-40000-7-s3.wav",
        "street_pedestrian",
        "s3",
        "lisbon-1000",
        follows="audio/street_pedestrian-lisbon-1000-40000-6-s3.wav",
    )
    of_2020 = parse_name(root, "audio/airport-barcelona-0-12-b.wav")
    assert (of_2020.label, of_2020.group, of_2020.device) == ("airport", "barcelona-0", "b")
    assert parse_name(root, "audio/recording 7.wav") is None


def test_test_list_without_labels(names_only: Path) -> None:
    write_table(names_only / "test.csv", ("filename",), [(name,) for name in tau_names()[1]])
    assert Counter(clip.label for clip in load_tau(config(names_only), 0).test) == dict.fromkeys(SCENES, 6)


def test_explicit_paths_win(names_only: Path) -> None:
    train, test = tau_names()
    write_table(names_only / "split" / "mine_train.csv", ("filename",), [(name,) for name in train if "-a.wav" in name])
    write_table(names_only / "split" / "mine_test.csv", ("filename",), [(name,) for name in test if "-s4.wav" in name])
    index = load_tau(
        config(names_only, train_split="mine_train.csv", test_split=str(names_only / "split/mine_test.csv")), 0
    )
    assert index.seen_devices == {"a"}
    assert {clip.device for clip in index.test} == {"s4"}


def test_whole_development_set_keeps_test_places_and_unseen_devices_out(names_only: Path) -> None:
    extra = [
        "audio/airport-lyon-1003-40003-9-a.wav",
        "audio/airport-lisbon-1000-40000-9-s5.wav",
        "audio/airport-oslo-7-7-7-c.wav",
    ]
    for name in extra:
        (names_only / name).touch()
    index = load_tau(config(names_only, train_split="100"), 0)
    # the first extra file is of a test place, the second of a device that must stay unseen
    assert {clip.clip_id for clip in index.train + index.validation} == {*tau_names()[0], extra[2]}


def test_limits_are_stratified(tree: Path) -> None:
    index = load_tau(config(tree, limit_train=36, limit_test=9, validation_fraction=0.25), 0)
    assert Counter(clip.label for clip in index.train + index.validation) == dict.fromkeys(SCENES, 12)
    assert Counter(clip.label for clip in index.test) == dict.fromkeys(SCENES, 3)


def test_files_longer_than_a_clip_are_not_cut_without_a_word(tree: Path) -> None:
    with pytest.raises(DataError, match=r"wav: lasts 0\.10 s, and data\.clip_seconds is 0\.05.*clip_seconds: 0\.1,"):
        load_tau(config(tree, clip_seconds=0.05), 0)
    assert load_tau(config(tree, clip_seconds=0.095), 0).train, "recorders round"


def test_no_audio_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder audio/"):
        load_tau(config(tmp_path), 0)


def test_split_that_is_not_there_names_the_places_searched(tree: Path) -> None:
    with pytest.raises(DataError, match=r"5 % training split(.|\n)*evaluation_setup"):
        load_tau(config(tree, train_split="5"), 0)
    with pytest.raises(DataError, match=r"nowhere\.csv \(data\.test_split\)"):
        load_tau(config(tree, test_split="nowhere.csv"), 0)


def test_label_that_contradicts_the_name(names_only: Path) -> None:
    write_table(names_only / "test.csv", META_COLUMNS[:2], [(tau_names()[1][0], "tram")])
    with pytest.raises(DataError, match=r"test\.csv: 1 rows(.|\n)*'tram' here and 'airport' by its name"):
        load_tau(config(names_only), 0)


def test_name_that_says_nothing(names_only: Path) -> None:
    write_table(names_only / "test.csv", ("filename",), [("audio/x.wav",)])
    with pytest.raises(DataError, match=r"audio/x\.wav has no name like"):
        load_tau(config(names_only), 0)


def test_file_in_both_lists(names_only: Path) -> None:
    with pytest.raises(DataError, match="in the training list and in the test list"):
        load_tau(config(names_only, test_split="split25.csv"), 0)


def test_place_in_both_lists_is_said(names_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, _ = tau_names()
    write_table(
        names_only / "test.csv", ("filename",), [(name.replace("-3-s1", "-4-c"),) for name in train if "-s1" in name]
    )
    load_tau(config(names_only), 0)
    assert "18 of 18 recording places of the test list are in the training list too" in caplog.text


def test_class_without_training_clips(names_only: Path) -> None:
    train, _ = tau_names()
    write_table(names_only / "split25.csv", ("filename",), [(name,) for name in train if "airport" not in name])
    with pytest.raises(DataError, match="no training clips of airport"):
        load_tau(config(names_only), 0)


def test_class_with_one_place(names_only: Path) -> None:
    train, _ = tau_names()
    write_table(
        names_only / "split25.csv", ("filename",), [(n,) for n in train if "airport" not in n or "lisbon-1000" in n]
    )
    with pytest.raises(DataError, match="validation part: all clips of airport are of one group"):
        load_tau(config(names_only), 0)


def test_file_listed_twice_in_meta(names_only: Path) -> None:
    row = meta_row(tau_names()[0][0])
    write_table(names_only / "meta.csv", META_COLUMNS, [row, row])
    with pytest.raises(DataError, match="listed more than once"):
        load_tau(config(names_only), 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no column filename"),
        (b"filename,scene_label\na.wav,bus\n", "tab-separated"),
        (b"filename\tscene_label\n", "no rows"),
        (b"filename\tscene_label\na.wav\n", "line 2: 1 fields, wanted 2"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_table_that_is_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "split.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_table(path, ("filename",) if b"," not in content else ("filename", "scene_label"))
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "other.csv", ("filename",))


def test_table_of_a_spreadsheet(tmp_path: Path) -> None:
    """Byte order mark, CRLF, empty last line."""
    path = tmp_path / "t.csv"
    path.write_bytes("\ufefffile;fold\r\na b.wav;1\r\n\r\n".encode())
    assert read_table(path, ("file", "fold"), delimiters=",\t;") == [{"file": "a b.wav", "fold": "1"}]


groups_of_classes = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=6, max_size=40).filter(
    lambda groups: min((sum(label == x for label, _ in groups) for x in {g[0] for g in groups}), default=0) > 1
)


@settings(max_examples=40, deadline=None)
@given(groups=groups_of_classes, fraction=st.floats(0.05, 0.6), seed=st.integers(0, 9))
def test_groups_are_taken_whole_and_about_enough(groups: list[tuple[str, int]], fraction: float, seed: int) -> None:
    clips = [
        Clip(f"{number}/{k}", Path("x"), label, "", f"group{number}")
        for number, (label, size) in enumerate(groups)
        for k in range(size)
    ]
    rest, taken = take_groups(clips, fraction, seed, "validation")
    assert sorted(clip.clip_id for clip in rest + taken) == sorted(clip.clip_id for clip in clips)
    assert not {clip.group for clip in rest} & {clip.group for clip in taken}
    for label in {label for label, _ in groups}:
        size, share = (sum(clip.label == label for clip in part) for part in (clips, taken))
        assert 0 < share < size
        # greedy: never further off than one group
        assert abs(share - fraction * size) <= max(n for name, n in groups if name == label)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=5), limit=st.integers(1, 120), seed=st.integers(0, 9))
def test_limit_keeps_proportions(counts: list[int], limit: int, seed: int) -> None:
    clips = [Clip(f"{n}/{k}", Path("x"), str(n), "", "") for n, count in enumerate(counts) for k in range(count)]
    taken = take_stratified(clips, limit, seed)
    total = len(clips)
    assert len(taken) == min(limit, total)
    found = Counter(clip.label for clip in taken)
    for n, count in enumerate(counts):
        assert abs(found[str(n)] - count * len(taken) / total) < len(counts)


def test_index_says_everything_at_once() -> None:
    clip = Clip("a#0", Path("a"), "x", "", "g")
    index = DataIndex(Path("root"), ("x", "y"), 1.0, (clip,), (clip,), ())
    with pytest.raises(DataError) as caught:
        index.validate()
    for said in (
        "root",
        "test part has no clips",
        "no training clips of y",
        "1 clips are listed twice",
        "1 groups stand in",
    ):
        assert said in str(caught.value)


def test_config_reads_yaml_numbers_and_refuses_the_rest() -> None:
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"kind": "tau", "root": "x", "train_split": 25}).train_split == "25"
    folders = {"kind": "folders", "root": "x"}
    assert adapter.validate_python({**folders, "groups_csv": "g.csv", "test_folds": [1, 2]}).test_folds == ("1", "2")
    refused = {
        "neither 5, 10": {"kind": "tau", "root": "x", "train_split": "30"},
        "test_folds needs groups_csv": {**folders, "test_folds": [1]},
        "both name a test part": {**folders, "groups_csv": "g.csv", "test_folds": [1], "test_fraction": 0.3},
        "Extra inputs": {"kind": "synth", "roots": "x"},
        "less than 1": {"kind": "synth", "validation_fraction": 1},
    }
    for said, section in refused.items():
        with pytest.raises(ValidationError, match=said):
            adapter.validate_python(section)


def test_official_split_files(tmp_path: Path, real_audio: Path) -> None:
    (tmp_path / "audio").mkdir()
    (tmp_path / "split_setup").symlink_to((real_audio / "tau-splits").resolve())
    index = load_tau(config(tmp_path, train_split=25), seed=0)
    assert (len(index.train) + len(index.validation), len(index.test), len(index.labels)) == (34_900, 29_680, 10)
    assert {clip.device for clip in index.test} - index.seen_devices == {"s4", "s5", "s6"}
    shares = {
        label: sum(clip.label == label for clip in index.validation)
        / sum(clip.label == label for clip in index.train + index.validation)
        for label in index.labels
    }
    assert all(0.13 < share < 0.18 for share in shares.values()), shares
    assert not {clip.group for clip in index.train + index.validation} & {clip.group for clip in index.test}
