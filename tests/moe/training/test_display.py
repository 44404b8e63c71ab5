import io

import pytest

from scatterfold.moe.training.display import Live, Plain, Silent, duration, make_display, quantity

TRAIN = {
    "step": 10,
    "loss": 2.5,
    "train_bits_per_byte": 3.61,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "tflops": 0.0123,
    "step_seconds": 2.0,
    "skipped_steps": 0,
    "experts/max_violation": 0.25,
    "experts/dropped_fraction": 0.0,
}
VALID = {"step": 10, "valid_loss": 2.25, "perplexity": 9.49, "bits_per_byte": 3.25, "valid_tokens": 500}


def test_a_plain_line_says_all_and_leaves_out_what_is_not_there(capsys):
    display = Plain(total_steps=100)
    display.update(TRAIN)
    line = capsys.readouterr().out
    assert line == (
        "step  10/100 | loss 2.5000 | bits/byte 3.610 | lr 1.00e-03 | grad norm 0.500 | tokens/s 12,346 | "
        "12.3 GFLOP/s | busiest expert 1.25x mean | ETA 3:00\n"
    )
    display.update({**TRAIN, "mfu": 0.412, "tflops": 407.5, "skipped_steps": 2, "experts/dropped_fraction": 0.05})
    line = capsys.readouterr().out
    assert "| 408 TFLOP/s | MFU 41.2% |" in line
    assert "skipped steps 2" in line
    assert "dropped 5.00%" in line


def test_plain_evaluations_say_when_they_are_the_best(capsys):
    display = Plain(total_steps=100)
    for loss in (2.25, 2.0, 2.1):
        display.update({**VALID, "valid_loss": loss})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step  10/100 | validation loss 2.2500 | perplexity 9.49 | 3.2500 bits/byte on 500 tokens | best"
    assert [line.endswith("best") for line in lines] == [True, True, False]


def test_the_live_panel_shows_figures_bar_and_evaluations():
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Live(100, console) as display:
        display.header([("model", "8 layers"), ("data", "10 MB [of text]")])
        display.update(TRAIN)
        display.update(VALID)
        display.update({**VALID, "step": 20, "valid_loss": 2.75})
        display.message("step 3: skipped [not markup]")
    text = out.getvalue()
    for part in ("8 layers", "10 MB [of text]", "10/100", "10%", "2.5000", "12,346", "1.25x mean", "3:00"):
        assert part in text
    assert "step 20: validation loss 2.7500" in text
    assert "best at step 10: validation loss 2.2500" in text
    assert "skipped [not markup]" in text


def test_the_live_panel_is_taken_down_after_an_error():
    from rich.console import Console

    display = Live(100, Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError), display:
        raise ValueError
    assert not display._live.is_started


def test_the_kind_follows_the_terminal_and_the_rank(monkeypatch):
    assert isinstance(make_display("auto", 10, is_main=True), Plain)  # pytest's stdout is no terminal
    assert isinstance(make_display("rich", 10, is_main=True), Live)
    assert isinstance(make_display("rich", 10, is_main=False), Silent)
    assert type(make_display("none", 10, is_main=True)) is Silent
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(make_display("auto", 10, is_main=True), Live)


def test_silence(capsys):
    with Silent() as display:
        display.header([("a", "b")])
        display.update(TRAIN)
        display.message("text")
    assert capsys.readouterr().out == ""


def test_durations_and_quantities():
    assert [duration(seconds) for seconds in (0.4, 61, 3600 * 12 + 5)] == ["0:00", "1:01", "12:00:05"]
    assert [quantity(n) for n in (999, 1234, 1_234_567, 46.7e9, 1.5e12)] == ["999", "1.23K", "1.23M", "46.7B", "1.5T"]
