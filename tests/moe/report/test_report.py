import base64
import json
import math
import re

import numpy as np
import pytest

from scatterfold.moe.report import write_report
from scatterfold.moe.report.figures import MAX_LAYERS, draw_experts, draw_loss, smooth
from scatterfold.moe.report.history import ExpertLoads, read_history

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, layers=3, experts=4, steps=40):
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "experts.jsonl", "w") as loads:
        for step in range(1, steps + 1):
            bits = 2 + 6 * math.exp(-step / 10)
            line = {
                "step": step,
                "loss": bits * math.log(2),
                "train_bits_per_byte": bits,
                "lr": 1e-3,
                "grad_norm": 1 / step,
            }
            if layers:
                line |= {"experts/max_violation": 0.5, "experts/router_entropy": 1.0, "experts/per_token": 2.0}
                load = np.full(experts, 1 / experts).tolist()
                record = {"step": step, "layers": [{"layer": i, "load": load} for i in range(layers)]}
                loads.write(json.dumps(record) + "\n")
            metrics.write(json.dumps(line) + "\n")
        for step, bits, tokens in ((steps // 2, 2.6, 100), (steps, 2.2, 100), (steps, 2.1, 900)):
            line = {"step": step, "valid_loss": 1.5, "perplexity": 4.5, "bits_per_byte": bits, "valid_tokens": tokens}
            metrics.write(json.dumps(line) + "\n")
        metrics.write('{"step": 41, "lo')  # a kill cut it short
    if not layers:
        (folder / "experts.jsonl").unlink()
    summary = {
        "valid_loss": 1.5,
        "perplexity": 4.5,
        "bits_per_byte": 2.1,
        "baselines": {"unigram": 4.8, "trigram": 2.9, "gzip": 2.4},
        "facts": [["model", "2 layers <of> width 8"]],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("seed: 0\nname: <b>\n")
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "command": ["train", "a<b"]}))


def embedded(page):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_page_holds_its_pictures_and_figures(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report" / "report.html"
    page = path.read_text()
    names = {"loss.png", "experts.png", "routing.png", "optimization.png"}
    assert {file.name for file in path.parent.glob("*.png")} == names
    images = embedded(page)
    assert sorted(images) == sorted((path.parent / name).read_bytes() for name in names)
    assert all(image.startswith(PNG) for image in images)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)  # nothing is loaded from elsewhere
    assert "2.1000" in page
    assert "byte trigram" in page
    assert "&lt;of&gt;" in page
    assert "name: &lt;b&gt;" in page


def test_evaluations_on_different_texts_do_not_share_a_curve(tmp_path):
    write_run(tmp_path)
    history = read_history(tmp_path)
    assert [line["bits_per_byte"] for line in history.comparable] == [2.6, 2.2]
    (axes,) = draw_loss(history).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn["validation: 2.200"] == [2.6, 2.2]
    assert drawn["whole validation text: 2.100"] == [2.1]


def test_a_dense_model_has_no_expert_pictures(tmp_path):
    write_run(tmp_path, layers=0)
    page = write_report(tmp_path).read_text()
    assert not (tmp_path / "report" / "experts.png").exists()
    assert len(embedded(page)) == 2


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None, "lr": 1.0, "grad_norm": None}) + "\n")
    assert write_report(tmp_path).exists()


def test_the_loss_picture_shows_both_curves_and_the_baselines(tmp_path):
    write_run(tmp_path)
    axes = draw_loss(read_history(tmp_path)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-5:-3] == ["validation: 2.200", "whole validation text: 2.100"]
    assert labels[-3:] == ["byte unigram: 4.800", "byte trigram: 2.900", "gzip -9: 2.400"]
    assert axes.get_ylabel() == "bits per byte"


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 30])
def test_the_heatmap_shows_load_relative_to_balance_for_each_layer(layers):
    steps = np.array([10, 20, 30])
    loads = np.full((3, layers, 4), 0.25)
    loads[1, 0] = [0.5, 0.5, 0.0, 0.0]
    figure = draw_experts(ExpertLoads(list(range(layers)), steps, loads))
    pictures = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert len(pictures) == min(layers, MAX_LAYERS)
    assert pictures[0].get_title() == "layer 0"
    assert pictures[-1].get_title() == f"layer {layers - 1}"
    shown = np.asarray(pictures[0].collections[0].get_array()).reshape(4, 3)
    np.testing.assert_allclose(shown[:, 0], 1.0)
    np.testing.assert_allclose(shown[:, 1], [2.0, 2.0, 0.0, 0.0])
    assert pictures[0].get_xlim() == (0.0, 30.0)


def test_smoothing_keeps_a_line_and_lowers_noise():
    line = np.arange(500.0)
    np.testing.assert_allclose(smooth(line), line)
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(noise)[50:450].std() < 0.4 * noise.std()
    assert len(smooth(np.array([]))) == 0
