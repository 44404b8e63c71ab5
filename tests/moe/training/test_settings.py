import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.settings import LoggerSettings, TrainerSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "trainer.steps=0 is too small, allowed: 1 or more"),
        ({"precision": "fp16"}, "trainer.precision='fp16' is unknown, allowed: fp32, bf16"),
        ({"activation_checkpointing": "some"}, "allowed: none, full, selective"),
        ({"device": "tpu"}, "allowed: auto, cpu, cuda"),
        ({"eval_every": -1}, "trainer.eval_every=-1 is too small"),
        ({"eval_batches": 0}, "trainer.eval_batches=0 is too small, allowed: null, 1 or more"),
        ({"gradient_clip": 0.0}, "trainer.gradient_clip=0.0 is out of range, allowed: null, above 0"),
        ({"keep_last": 0}, "trainer.keep_last=0 is too small"),
        ({"max_skipped_steps": 0}, "trainer.max_skipped_steps=0 is too small"),
    ],
)
def test_impossible_trainer_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainerSettings(**{"steps": 10, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wandb": "on"}, "logger.wandb='on' is unknown, allowed: disabled, offline, online"),
        ({"display": "gui"}, "logger.display='gui' is unknown"),
        ({"expert_every": -1}, "logger.expert_every=-1 is too small"),
    ],
)
def test_impossible_logger_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        LoggerSettings(**change)
