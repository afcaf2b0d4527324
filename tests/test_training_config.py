"""Configurations: presets, files, overrides, mistakes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from featherface.cli import main
from featherface.training import PRESETS, Config, ConfigError, dump, from_dict, load_config, override, preset
from featherface.training.config import _documentation
from featherface.training.optimizer import learning_rate


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name, tmp_path):
    pytest.importorskip("tomllib")
    config = preset(name)
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    assert load_config(path) == config
    path.write_text(dump(config, comments=False))
    assert load_config(path) == config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert load_config(path) == config


def test_yaml_files(tmp_path):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(preset("seed").to_dict()))
    assert load_config(path) == preset("seed")
    path.write_text("optimizer:\n  lr: 1e-3\n")
    assert load_config(path).optimizer.lr == 1e-3


def test_the_seed_preset_is_the_documents_recipe():
    config = preset("seed")
    assert (config.task.assigner, config.task.classification, config.task.ohem_ratio) == ("multibox", "ohem", 7.0)
    assert (min(config.augmentation.scales), max(config.augmentation.scales)) == (0.3, 1.0)
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 1e-3)
    distillation = config.distillation
    assert (distillation.class_kind, distillation.temperature, distillation.class_weight) == ("kl", 4.0, 0.7)
    assert distillation.task_weight == 0.3
    assert distillation.box_weight == distillation.landmark_weight == distillation.feature_weight == 0


def test_every_option_is_explained():
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        texts = _documentation(type(value))
        text = type(value).__doc__
        for option in dataclasses.fields(value):
            assert option.name in texts or f", {option.name}" in text or f"``{option.name}``" in text, option.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "unknown option optimiser; did you mean optimizer"),
        ({"optimizer": {"lrate": 1}}, "unknown option optimizer.lrate"),
        ({"data": {"sources": [{"path": "x"}]}}, r"unknown option data.sources\[0\].path"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast'; expected a number"),
        ({"schedule": {"epochs": 1.5}}, "schedule.epochs is 1.5; expected a whole number"),
        ({"runtime": {"compile": "yes"}}, "expected true or false"),
        ({"optimizer": 3}, "optimizer is 3"),
        ({"task": {"assigner": "greedy"}}, "assigner is 'greedy'; choose from: multibox, atss, simota"),
        ({"runtime": {"amp": "fp8"}}, "runtime.amp is 'fp8'; choose from"),
        ({"batches": {"size": 0}}, "batches.size is 0; it must be at least 1"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan"),
        ({"augmentation": {"mosaic": 2}}, "augmentation.mosaic is 2.0; it must be from 0 to 1"),
        ({"augmentation": {"blur": float("nan")}}, "augmentation.blur is nan"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay is -1.0; it must be at least 0"),
        ({"augmentation": {"sizes": [64, 100]}}, "multiple of 32"),
        ({"augmentation": {"scales": []}}, "at least one scale"),
        ({"average": {"decay": 1.0}}, "average.decay"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 is 1; it must be at least 0 and below 1"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr is inf; it must be finite"),
        ({"augmentation": {"scales": [1.0, float("nan")]}}, r"augmentation.scales is \[1.0, nan\]; it must be finite"),
        ({"validation": {"limit": -1}}, "validation.limit is -1; it must be at least 0"),
        ({"task": {"multibox_threshold": 7}}, "task.multibox_threshold is 7.0; it must be from 0 to 1"),
        ({"distillation": {"cache_gb": 1.0}}, "views that repeat"),
    ],
)
def test_mistakes_name_the_option(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_overrides():
    pytest.importorskip("tomllib")
    config = override(
        preset("default"),
        [
            "optimizer.lr=1e-4",
            "data.root=/some where",
            "runtime.compile=true",
            'data.sources=[{folder = "a", labels = "none"}]',
            "augmentation.scales=[1, 2]",
            'model.options.innovations=["reuse"]',
        ],
    )
    assert config.optimizer.lr == 1e-4 and config.data.root == "/some where" and config.runtime.compile
    assert [source.folder for source in config.data.sources] == ["a"] and config.augmentation.scales == [1.0, 2.0]
    assert config.model.options == {"innovations": ["reuse"]}
    assert preset("default").data.root == "."
    for wrong in ("lr=1", "optimizer.lr", "=3", "optimizer.=3"):
        with pytest.raises(ConfigError, match=r"section\.option=value"):
            override(Config(), [wrong])
    with pytest.raises(ConfigError, match="name was given a value before"):
        override(Config(), ["model.name=featherface_v1", "model.name.x=1"])


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml")
    wrong = (("a.toml", "x = [", "malformed|tomli"), ("a.json", "[1]", "holds a list"), ("a.ini", "", "must be"))
    for name, text, message in wrong:
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)


def test_print_config_and_presets_from_the_command_line(capsys):
    assert main(["train", "--preset", "seed", "--set", "optimizer.lr=0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "lr = 0.5" in printed and 'assigner = "multibox"' in printed
    assert main(["train"]) == 2 and main(["train", "--preset", "best", "--print-config"]) == 2
    errors = capsys.readouterr().err
    assert "name the folder of the run" in errors and "no preset 'best'; choose from: default, cpu, seed" in errors
    tomllib = pytest.importorskip("tomllib")
    assert from_dict(tomllib.loads(printed)).optimizer.lr == 0.5


def test_a_data_root_is_taken_as_it_is_written(capsys):
    for root in ("2026-11-27", "1_000", "true", 'a "b"'):
        assert main(["train", "--data", root, "--print-config"]) == 0
        tomllib = pytest.importorskip("tomllib")
        assert tomllib.loads(capsys.readouterr().out)["data"]["root"] == root


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    schedule = Config().schedule
    schedule.epochs, schedule.warmup_epochs, schedule.final = 10, 2, 0.1
    rates = [learning_rate(step, 5, schedule, 1.0) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    schedule.warmup_epochs = 0
    assert learning_rate(0, 5, schedule, 1.0) == 1.0


def test_the_committed_configurations_are_still_understood():
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*_training*/config.toml"))
    assert len(files) >= 8
    for file in files:
        assert load_config(file).model.name in ("featherface_v2", "featherface_v2_ultra")


@pytest.mark.parametrize(
    "section,values,message",
    [
        ("data", {"sources": [{"folder": "a", "weight": math.inf}]}, "a has weight inf"),
        ("data", {"sources": [{"folder": "a", "weight": 1e9}]}, "a has weight 1"),
        ("data", {"sources": [{"folder": "a", "weight": math.nan}]}, "a has weight nan"),
        ("runtime", {"seed": 10**20}, "64 bits"),
    ],
)
def test_weights_of_sources_and_seeds_out_of_range(section, values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({section: values}).check()


def test_a_byte_order_mark_and_a_suffix_in_capitals(tmp_path):
    for name, text in (("a.JSON", '{"runtime": {"seed": 7}}'), ("a.json", '{"runtime": {"seed": 7}}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_config(tmp_path / name).runtime.seed == 7
