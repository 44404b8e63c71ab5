"""`scatterfold train init_from=DIR`: which model is trained, and what the user may still say about it."""

import json
import shutil

import pytest
import yaml

from scatterfold.moe.interop import open_model, write_model
from scatterfold.tools import composition
from scatterfold.tools.init_from import KEY
from scatterfold.tools.request import Request
from scatterfold.tools.train import _compose

QUIET = ("logger.display=none", "trainer.steps=1", "trainer.checkpoint_every=0")


@pytest.fixture
def data(tiny):
    """The overrides of the tiny run that say nothing about its model."""
    return [word for word in tiny if not word.startswith("model")]


@pytest.fixture(scope="module")
def export(finished_run, tmp_path_factory):
    """The finished run as a folder of our own, with a router that no default has."""
    folder = tmp_path_factory.mktemp("exports") / "export"
    stored = open_model(finished_run)
    stored = stored.with_model({**stored.config, "router": THRESHOLD}, stored.tensors)
    write_model(stored, folder)
    return folder


THRESHOLD = {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.4}


def compose(*words):
    config, _ = _compose([str(word) for word in words])
    return config


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("valid_loss")) for line in lines]


def test_the_model_of_the_folder_is_trained_and_the_same_command_resumes(scatterfold, tmp_path, data, finished_run):
    shutil.copytree(finished_run, tmp_path / "source")
    words = [*data, *QUIET, "init_from=source", "run_dir=run", "seed=3"]
    assert scatterfold("train", *words).code == 0
    resolved, before = config_of(tmp_path / "run"), config_of(finished_run)
    assert {**before["model"], "vocab_size": 257} == resolved["model"]
    assert before["router"] == resolved["router"]
    assert resolved["init_from"] == "source"
    again = scatterfold("train", *words, "trainer.steps=2")
    assert again.code == 0 and [step for step, _, _ in metrics(tmp_path / "run")] == [1, 1, 2, 2]
    shutil.rmtree(tmp_path / "source")  # the run has what it needs
    assert scatterfold("train", *words, "trainer.steps=3").code == 0
    assert config_of(tmp_path / "run")["model"] == resolved["model"]
    lost = scatterfold("train", *data, *QUIET, "init_from=source", "run_dir=other")
    assert lost.code == 2 and "init_from=source: source does not exist" in lost.line


def test_values_change_what_the_folder_says(export, data):
    config = compose(*data, f"init_from={export}", "router.threshold=0.7", "model.max_positions=64", "seed=2")
    assert config["router"] == {**THRESHOLD, "threshold": 0.7}
    assert config["model"]["max_positions"] == 64 and config["model"]["num_experts"] == 4
    assert config["seed"] == 2 and KEY not in json.dumps(config["model"])


def test_a_value_of_a_class_that_only_the_folder_names_is_known(export, data, scatterfold):
    assert compose(*data, f"init_from={export}", "router.max_experts=3")["router"]["max_experts"] == 3
    wrong = scatterfold("train", *data, f"init_from={export}", "router.treshold=0.3")
    assert wrong.code == 2 and "router.treshold=0.3 is an unknown key (did you mean router.threshold?)" in wrong.line


def test_what_the_user_chooses_is_not_taken_from_the_folder(export, data):
    base = compose(*data)
    chosen = compose(*data, "model=tiny", f"init_from={export}")
    assert chosen["model"] == base["model"] and chosen["router"] == base["router"]
    only_router = compose(*data, "router=switch", f"init_from={export}")
    assert only_router["model"]["width"] == 16 and only_router["router"]["top_k"] == 1


def test_an_experiment_or_a_file_of_ones_own_may_choose_the_model(export, data, tmp_path, finished_run, monkeypatch):
    demo = compose(*data, "experiment=demo", f"init_from={export}")
    assert demo["model"] == compose(*data, "experiment=demo")["model"]
    dense = compose(*data, "experiment=dense_baseline", f"init_from={export}")
    assert dense["model"]["num_experts"] == 0 and dense["model"]["width"] == 128
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "own.yaml"
    own.write_text(f"# @package _global_\n# Mine.\ninit_from: {export}\ntrainer:\n  steps: 9\n")
    begun = compose(*data[:-1], "--config-dir", tmp_path, "experiment=own")
    assert begun["model"]["width"] == 16 and begun["router"] == THRESHOLD
    own.write_text("# @package _global_\n# Mine.\nmodel:\n  layers: 3\n")
    mine = compose(*data, "--config-dir", tmp_path, "experiment=own", f"init_from={export}")
    assert mine["model"]["layers"] == 3 and mine["model"]["width"] == 128
    configs = shutil.copytree(composition.CONFIGS, tmp_path / "configs")
    (configs / "experiment" / "own.yaml").write_text(f"# @package _global_\n# Ours.\ninit_from: {export}\n")
    monkeypatch.setattr(composition, "CONFIGS", configs)
    assert compose(*data, "experiment=own")["router"] == THRESHOLD
    rerun = compose("--config-path", finished_run, f"init_from={export}")
    assert rerun["router"] == config_of(finished_run)["router"]  # its config.yaml states a model


def test_the_configuration_is_shown_as_it_will_be(export, data, scatterfold):
    shown = scatterfold("train", "--cfg", "job", *data, f"init_from={export}", "router.threshold=0.6")
    assert shown.code == 0
    config = yaml.safe_load(shown.out)
    assert config["router"] == {**THRESHOLD, "threshold": 0.6} and config["model"]["width"] == 16


def test_a_folder_leaves_no_choice_behind(export, data, scatterfold):
    compose(*data, f"init_from={export}")
    outcome = scatterfold("train", *data, "model=init_from")
    assert outcome.code == 2 and "model=init_from does not exist" in outcome.line


def test_a_sweep_gives_each_trial_what_the_user_typed(export, data, tmp_path, monkeypatch):
    from scatterfold.tools.sweep import trials

    started = []

    def start(self, words, folder, environment):
        started.append(words)
        (folder / trials.LOG_FILE).write_text("scatterfold: not run\n")
        return 1

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials.Sweep, "_wait", start)
    words = [*data, f"init_from={export}", "router.threshold=0.3,0.6"]
    assert _compose(["-m", *words, "hydra.sweep.dir=sweep"])[0] == 1
    assert [dict(word.split("=", 1) for word in typed)["router.threshold"] for typed in started] == ["0.3", "0.6"]
    assert not any(word.endswith(f"={KEY}") for typed in started for word in typed)


def test_the_tokenizer_comes_along_unless_the_user_names_one(finished_run, data, tmp_path):
    from dataclasses import replace

    from scatterfold.moe.data.tokenizer import HFTokenizer

    file = tmp_path / "it's a tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    write_tokenizer(file)
    write_model(replace(open_model(finished_run), tokenizer=HFTokenizer(file)), tmp_path / "it's" / "export")
    folder = tmp_path / "it's" / "export"
    begun = compose(*data, f'init_from="{folder}"')
    assert begun["data"]["tokenizer"] == str(folder / "tokenizer.json")
    assert begun["data"]["eod"] == "<|endoftext|>"
    named = compose(*data, f'init_from="{folder}"', f'data.tokenizer="{file}"')
    assert named["data"]["tokenizer"] == str(file) and named["data"]["eod"] is None
    assert compose(*data, f'init_from="{folder}"', "model=tiny")["data"]["tokenizer"] == "bytes"


def write_tokenizer(file):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["word"], trainer)
    tokenizer.save(str(file))


def test_what_an_optimizer_remembers_is_taken_where_it_is(scatterfold, tmp_path, data, finished_run, export):
    begin = [*data, *QUIET, "init_optimizer=true"]
    assert scatterfold("train", *begin, f"init_from={finished_run}", "run_dir=run").code == 0
    for words, message in (
        ([f"init_from={export}"], f"init_optimizer=true, but {export} holds no state of an optimizer, allowed: false"),
        ([], "init_optimizer=true without init_from, allowed: false, or init_from=DIR"),
        ([f"init_from={finished_run}", "init_optimizer=yes please"], "init_optimizer='yes please' has the wrong type"),
    ):
        outcome = scatterfold("train", *begin, *words, "run_dir=never")
        assert outcome.code == 2 and message in outcome.line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_does_not_fit_is_one_line(scatterfold, tmp_path, data, export):
    for words, message in (
        (["model=tiny"], "is of another model: embedding.weight is (257, 16) there and (257, 128) here"),
        (["model.width=32"], "is of another model: embedding.weight is (257, 16) there and (257, 32) here"),
        (["router.bias_rate=0.1"], "router.bias_rate=0.1 is an unknown key"),
        (["router=sigmoid_bias"], "1 missing there, first blocks.0.mlp.router.expert_bias"),
    ):
        outcome = scatterfold("train", *data, *QUIET, f"init_from={export}", *words, "run_dir=never")
        assert outcome.code == 2 and message in outcome.line
    assert not list(tmp_path.iterdir())


def test_request_is_untouched(export, data):
    """What a launcher passes on to its ranks is what the user typed."""
    _, request = _compose([*data, f"init_from={export}"])
    assert isinstance(request, Request) and request.overrides == (*data, f"init_from={export}")
