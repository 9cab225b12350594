"""Every wrong key or value ends in one line that names it; nothing is ignored, nothing is quietly converted into something else."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from sentinode.config import (
    AugmentConfig,
    Config,
    EvaluateConfig,
    PredictConfig,
    PrepareConfig,
    ReviewRule,
    ServeConfig,
    SweepConfig,
    TrainConfig,
    load_config,
    merge,
    parse_config,
    read_yaml_mapping,
    set_by_path,
)
from sentinode.config.errors import describe_validation_error
from sentinode.errors import ConfigError, UsageError
from sentinode.locations import locate

VERBS = (PrepareConfig, TrainConfig, EvaluateConfig, PredictConfig, ServeConfig)


def refusal(model: type[Config], **fields: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(model, fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_published_protocol_is_the_default() -> None:
    config = TrainConfig()
    assert (config.arch, config.weights, config.unfreeze_depth, config.input_size_px) == ("resnet34", "imagenet", 1, 224)
    assert (config.epochs, config.batch_size, config.learning_rate, config.weight_decay) == (15, 32, 1e-4, 0)
    assert (config.workers, config.seed, config.target_recall, config.fold) == (1, 42, 0.95, None)
    assert (config.lr_factor, config.lr_patience_epochs, config.lr_floor) == (0.5, 2, 1e-6)
    assert config.review == ReviewRule(below=0.85, band=0.05)
    assert PrepareConfig().ratios == (0.7, 0.15, 0.15)


@pytest.mark.parametrize("model", [*VERBS, SweepConfig, AugmentConfig, ReviewRule])
def test_every_field_is_documented(model: type[Config]) -> None:
    assert [name for name, field in model.model_fields.items() if name != "kind" and not field.description] == []


@pytest.mark.parametrize("model", VERBS)
def test_a_configuration_cannot_be_changed(model: type[Config]) -> None:
    config = model()
    name = next(iter(model.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))


@pytest.mark.parametrize("model", VERBS)
def test_an_unknown_key_is_refused_by_every_verb(model: type[Config]) -> None:
    assert refusal(model, nonsense=1).startswith("unknown key nonsense; known keys: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, "unknown key epoch; did you mean epochs?"),
        ({"augment": {"dihedrall": True}}, "unknown key augment.dihedrall; did you mean dihedral?"),
        ({"review": {"beloww": 0.9}}, "unknown key review.beloww; did you mean below?"),
        ({"epoch": 3, "batch_size": 0}, "unknown key epoch; did you mean epochs? (and 1 more)"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(fields: dict[str, object], message: str) -> None:
    assert refusal(TrainConfig, **fields) == message


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("epochs", -1, "greater than or equal to 0"),
        ("epochs", 3.5, "valid integer"),
        ("epochs", "many", "valid integer"),
        ("epochs", None, "valid integer"),
        ("input_size_px", 31, "greater than or equal to 32"),
        ("input_size_px", 513, "less than or equal to 512"),
        ("unfreeze_depth", 6, "less than or equal to 5"),
        ("learning_rate", 0, "greater than 0"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("target_recall", 1, "less than 1"),
        ("arch", "resnet43", "a classifier of torchvision, resnet34 for instance, or timm:NAME; did you mean resnet34?"),
        ("seed", 2**32, "less than 4294967296"),
        ("seed", -1, "greater than or equal to 0"),
        ("mean", [0.5, 0.5, 0.5, 0.5], "at most 3 items"),
        ("workers", 0, "greater than or equal to 1"),
        ("workers", "x", "valid integer"),
        ("workers", [1, 2, 3], "at most 2 items"),
        ("workers", [0, 2], "greater than or equal to 1"),
        ("class_weight", "autoo", "'auto' or a valid number"),
        ("class_weight", -1, "'auto' or greater than 0"),
        ("use_gpu", "maybe", "'auto' or a valid boolean"),
        ("augment", 3, "valid dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_was_expected(key: str, value: object, expectation: str) -> None:
    message = refusal(TrainConfig, **{key: value})
    assert message.startswith(f"{key}: got {value!r}, ")
    assert expectation in message
    assert "more)" not in message


def test_a_wrong_nested_value_is_named_with_its_path() -> None:
    assert refusal(TrainConfig, augment={"rotation_deg": 90}) == "augment.rotation_deg: got 90, input should be less than or equal to 45"


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (TrainConfig, {"augment": {"flip": True}}, "augment: flip is already part of dihedral"),
        (TrainConfig, {"workers": [3, 2]}, "min <= max"),
        (TrainConfig, {"arch": "vit_b_16", "input_size_px": 100}, "input_size_px 100 does not fit arch vit_b_16: it takes multiples of 16 px"),
        (TrainConfig, {"arch": "inception_v3", "input_size_px": 64}, "input_size_px 64 is too small for arch inception_v3: it takes 75 px or more"),
        (TrainConfig, {"std": [0.2, 0, 0.2]}, "std: every value must be above 0"),
        (TrainConfig, {"use_gpu": False, "precision": "fp16"}, "fp16 needs GPUs"),
        (TrainConfig, {"use_gpu": False, "sync_batch_norm": True}, "sync_batch_norm needs GPUs"),
        (TrainConfig, {"unfreeze_depth": 2, "unfreeze_schedule": {3: 2}}, "must go up"),
        (TrainConfig, {"unfreeze_depth": 0, "unfreeze_schedule": {3: 2, 5: 1}}, "must go up"),
        (PrepareConfig, {"ratios": [0.5, 0.5, 0.5]}, "sum to 1"),
        (PrepareConfig, {"ratios": [0, 0.5, 0.5]}, "train above 0"),
        (PrepareConfig, {"ratios": [1.1, -0.1, 0]}, "sum to 1"),
        (ServeConfig, {"max_batch_size": 65}, "max_ongoing_requests 64 must be at least max_batch_size 65"),
        (ServeConfig, {"min_replicas": 5}, "max_replicas 4 must be at least min_replicas 5"),
    ],
)
def test_values_that_contradict_each_other_are_refused(model: type[Config], fields: dict[str, object], message: str) -> None:
    assert message in refusal(model, **fields)


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (TrainConfig, "epochs", True),
        (TrainConfig, "learning_rate", True),
        (TrainConfig, "fold", False),
        (TrainConfig, "workers", True),
        (TrainConfig, "workers", [1, True]),
        (TrainConfig, "class_weight", True),
        (TrainConfig, "mean", [True, 0.5, 0.5]),
        (PrepareConfig, "folds", True),
        (ServeConfig, "gpus_per_replica", True),
    ],
)
def test_true_is_not_a_number(model: type[Config], key: str, value: object) -> None:
    assert refusal(model, **{key: value}) == f"{key}: got {value!r}, input should be a number, not true or false"


def test_true_is_kept_where_a_truth_value_is_meant() -> None:
    config = parse_config(TrainConfig, {"use_gpu": True, "augment": {"dihedral": False, "flip": True}})
    assert config.use_gpu is True
    assert config.augment.flip is True


def test_scientific_notation_without_a_dot_is_a_number_although_yaml_says_text(tmp_path: Path) -> None:
    path = written(tmp_path, "c.yaml", "learning_rate: 1e-4\nclass_weight: 2e0\n")
    assert read_yaml_mapping(path)["learning_rate"] == "1e-4"
    config = load_config(TrainConfig, [path], ["lr_floor=1e-9", "augment.colour_jitter=1e-2"])
    assert (config.learning_rate, config.class_weight, config.lr_floor, config.augment.colour_jitter) == (1e-4, 2.0, 1e-9, 0.01)


def test_settings_win_over_the_preset_and_the_preset_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "file.yaml", "epochs: 1\nbatch_size: 2\nseed: 3\naugment: {dihedral: false, rotation_deg: 1, colour_jitter: 0.5}\n")
    preset = written(tmp_path, "preset.yaml", "batch_size: 20\nseed: 30\naugment: {rotation_deg: 10}\n")
    config = load_config(TrainConfig, [file, preset], ["seed=300", "augment.colour_jitter=0"])
    assert (config.epochs, config.batch_size, config.seed) == (1, 20, 300)
    assert config.augment == AugmentConfig(dihedral=False, rotation_deg=10, colour_jitter=0)


def test_the_last_of_equal_settings_wins_and_overrides_win_over_all() -> None:
    assert load_config(TrainConfig, [], ["epochs=3", "epochs=4"]).epochs == 4
    assert load_config(TrainConfig, [], ["epochs=3"], epochs=5).epochs == 5


def test_settings_are_yaml_values() -> None:
    config = load_config(TrainConfig, [], ["workers=[1, 4]", "early_stopping_patience_epochs=null", "augment={dihedral: false}", "weights=/a=b"])
    assert config.workers == (1, 4)
    assert config.early_stopping_patience_epochs is None
    assert config.augment.dihedral is False
    assert config.weights == "/a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs", "--set 'epochs': expected key=value"),
        ("=3", "--set '=3': expected key=value"),
        ("epochs=[", "--set 'epochs=[': the value is not YAML"),
        ("epochs=2020-13-45", "--set 'epochs=2020-13-45': the value is not YAML"),
        ("epochs=", "epochs: got None"),
        ("augment.=3", "--set 'augment.=3': a key has an empty part"),
        (".epochs=3", "--set '.epochs=3': a key has an empty part"),
        ("augment..flip=3", "--set 'augment..flip=3': a key has an empty part"),
        ("augment.flop=true", "unknown key augment.flop; did you mean flip?"),
        ("epochs.count=3", "epochs: got {'count': 3}"),
    ],
)
def test_a_wrong_setting_is_one_line(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, [], [setting])
    assert str(caught.value).startswith(message)


def test_a_setting_below_something_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "c.yaml", "augment: 3\n")
    with pytest.raises(ConfigError, match=r"augment\.flip=true.: augment is 3, not a mapping"):
        load_config(TrainConfig, [path], ["augment.flip=true"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected a mapping"),
        ("1: 2\n", "expected a mapping"),
        ("a: [\n", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("epochs: 1\nseed: 2\nepochs: 3\n", "key epochs stands there twice"),
        ("augment: {flip: true, flip: false}\n", "key flip stands there twice"),
        ("when: 2020-13-45\n", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_a_file_that_is_not_a_plain_mapping_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_yaml_mapping(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file"):
        read_yaml_mapping(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml_mapping(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(TrainConfig, [written(tmp_path, "c.yaml", text)]) == TrainConfig()


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    path = written(tmp_path, "c.yaml", "a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\n")
    assert read_yaml_mapping(path) == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


def test_merging_and_setting_leave_their_inputs_alone() -> None:
    old = {"augment": {"flip": True, "dihedral": False}, "epochs": 1}
    assert merge(old, {"augment": {"flip": False}}) == {"augment": {"flip": False, "dihedral": False}, "epochs": 1}
    fields = dict(old)
    set_by_path(fields, "augment.flip", False)
    assert fields["augment"] == {"flip": False, "dihedral": False}
    assert old == {"augment": {"flip": True, "dihedral": False}, "epochs": 1}


def test_the_stored_configuration_gives_the_same_one_again() -> None:
    config = TrainConfig(workers=(1, 2), augment=AugmentConfig(hue_jitter=0), class_weight=2.5, fold=1)
    assert parse_config(TrainConfig, config.model_dump(mode="json")) == config


def test_workers_may_be_a_number_or_a_range() -> None:
    assert (TrainConfig(workers=3).min_workers, TrainConfig(workers=3).max_workers) == (3, 3)
    assert (TrainConfig(workers=(2, 5)).min_workers, TrainConfig(workers=(2, 5)).max_workers) == (2, 5)


def test_a_configuration_error_is_wrong_use() -> None:
    assert issubclass(ConfigError, UsageError)
    assert ConfigError.exit_code == 2


def test_errors_of_models_that_are_not_ours_are_described_too() -> None:
    class Inner(BaseModel, extra="forbid"):
        size: int

    class Outer(BaseModel, extra="forbid"):
        inner: Inner | None = None
        table: dict[str, Inner] = {}

    def describe(**fields: object) -> str:
        with pytest.raises(ValidationError) as caught:
            Outer(**fields)
        return describe_validation_error(caught.value, Outer)

    assert describe(inner={"size": 1, "sizes": 2}) == "unknown key inner.sizes; did you mean size?"
    assert describe(inner={}) == "inner.size: missing"
    assert describe(table={"a": {"size": "x"}}).startswith("table.a.size: got 'x', input should be a valid integer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ratios=[0.5,0.5]"], "ratios: value 3 of the list is missing"),
        (["class_folders=benign,tumour"], "class_folders: got 'benign,tumour', input should be a list in brackets"),
    ],
)
def test_a_list_that_is_too_short_or_none_is_told_without_the_words_of_python(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PrepareConfig, settings=settings)
    assert str(caught.value) == message


def test_depth_follows_the_unfreeze_schedule() -> None:
    config = TrainConfig(unfreeze_depth=1, unfreeze_schedule={2: 3, 5: 5})
    assert [config.depth_at(epoch) for epoch in (0, 1, 2, 4, 5, 9)] == [1, 1, 3, 3, 5, 5]
    assert config.max_depth == 5
    # Through JSON, as a run folder and a bundle keep it.
    assert TrainConfig(**config.model_dump(mode="json")) == config


def test_a_file_may_lie_in_an_object_store(s3_folder: str) -> None:
    (locate(s3_folder) / "train.yaml").write_bytes(b"epochs: 3\n")
    assert load_config(TrainConfig, [f"{s3_folder}/train.yaml"]).epochs == 3
    with pytest.raises(ConfigError, match=rf"config file {s3_folder}/none.yaml: No such file or directory"):
        load_config(TrainConfig, [f"{s3_folder}/none.yaml"])
