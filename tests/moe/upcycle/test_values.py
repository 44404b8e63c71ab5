"""What drop and noise do to the values, and what cutting does to the neurons."""

import pytest
import torch

from scatterfold.moe.upcycle import UpcycleSettings, upcycle
from scatterfold.parallel.checkpoint.lazy import in_memory

WIDTH, FFN = 64, 400


@pytest.fixture
def dense(make_dense):
    return make_dense(layers=1, width=WIDTH, ffn_width=FFN)


def experts_of(stored):
    """gate and up (E, F, D), down (E, D, F)."""
    w_in = stored.tensors["blocks.0.mlp.experts.w_in"].read()
    return w_in[:, 0], w_in[:, 1], stored.tensors["blocks.0.mlp.experts.w_out"].read()


def dense_of(stored):
    return [stored.tensors[f"blocks.0.mlp.{name}.weight"].read() for name in ("w_gate", "w_up", "w_out")]


def intact(made, dense):
    """(E, 3, F) bool: which neurons each matrix of each expert has kept."""
    gate, up, down = dense_of(dense)
    new_gate, new_up, new_down = experts_of(made)
    kept = [(new_gate == gate).all(2), (new_up == up).all(2), (new_down == down).all(1)]
    return torch.stack(kept, 1)


@pytest.mark.parametrize("method", ["drop", "noise"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_shared_indices_change_the_same_neurons_in_all_matrices(dense, method, share):
    kept = intact(upcycle([dense], UpcycleSettings(method=method, share=share)), dense)
    assert (kept.sum(2) == FFN - round(share * FFN)).all()
    assert torch.equal(kept.all(1), kept.any(1))
    assert share == 1.0 or not torch.equal(kept[0], kept[1])  # experts differ in which


@pytest.mark.parametrize("method", ["drop", "noise"])
def test_indices_per_matrix_leave_fewer_neurons_intact(dense, method):
    kept = intact(upcycle([dense], UpcycleSettings(method=method, indices="per_matrix")), dense)
    assert (kept.sum(2) == FFN // 2).all()
    assert float(kept.all(1).double().mean()) == pytest.approx(0.125, abs=0.02)  # (1 - r)^3


def test_drop_draws_from_the_mean_and_deviation_of_what_it_replaces(make_dense):
    dense = make_dense(layers=1, width=WIDTH, ffn_width=FFN)
    shifted = {
        f"blocks.0.mlp.{name}.weight": torch.randn(shape) * std + mean
        for name, shape, std, mean in (
            ("w_gate", (FFN, WIDTH), 0.1, 0.5),
            ("w_up", (FFN, WIDTH), 2.0, -1.0),
            ("w_out", (WIDTH, FFN), 0.01, 0.0),
        )
    }
    dense = dense.with_model(dense.config, {**dense.tensors, **{k: in_memory(v) for k, v in shifted.items()}})
    made = upcycle([dense], UpcycleSettings(method="drop"))
    kept = intact(made, dense)[:, 0]
    for matrix, old in zip(experts_of(made), dense_of(dense)):
        for expert, changed in zip(matrix, ~kept):
            rows, before = (expert, old) if expert.shape[0] == FFN else (expert.T, old.T)
            new, replaced = rows[changed], before[changed]
            assert float(new.mean()) == pytest.approx(float(replaced.mean()), abs=4 * float(old.std()) / 110)
            assert float(new.std()) == pytest.approx(float(replaced.std()), rel=0.03)  # 12,800 values
            assert float((new - replaced).std()) == pytest.approx(float(replaced.std()) * 2**0.5, rel=0.04)


def test_noise_is_relative_to_the_matrix(dense):
    made = upcycle([dense], UpcycleSettings(method="noise", share=0.5, noise_std=0.25))
    for matrix, old in zip(experts_of(made), dense_of(dense)):
        noise = (matrix - old).abs() > 0
        assert float((matrix - old)[noise].std()) == pytest.approx(0.25 * float(old.std()), rel=0.02)


@pytest.mark.parametrize("granularity", [2, 8])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_experts_of_a_copy_partition_its_neurons(dense, granularity, shared):
    """Each neuron of a copy is in one expert, with gate, up and down together; copies are cut differently."""
    method = {"method": "shared", "shared_shards": 1} if shared else {"method": "fine_grained"}
    group = granularity - shared
    settings = UpcycleSettings(
        **method, granularity=granularity, experts=3 * group, top_k=group, shuffle=True, scale="output"
    )
    made = upcycle([dense], settings)
    gate, up, down = dense_of(dense)
    number = {tuple(row.tolist()): neuron for neuron, row in enumerate(gate)}
    found = []
    for e in range(3 * group):
        neurons = [number[tuple(row.tolist())] for row in experts_of(made)[0][e]]
        assert torch.equal(experts_of(made)[1][e], up[neurons])
        assert torch.equal(experts_of(made)[2][e], down[:, neurons])
        found.append(neurons)
    first = FFN // granularity * shared
    copies = [sum(found[copy * group : (copy + 1) * group], []) for copy in range(3)]
    assert all(sorted(copy) == list(range(first, FFN)) for copy in copies)
    assert copies[0] != copies[1] != copies[2]
    rows = made.tensors["blocks.0.mlp.router.weight"].read().unflatten(0, (3, group))
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and not torch.equal(rows[0], rows[1])


def test_without_shuffling_shards_follow_each_other(dense):
    made = upcycle([dense], UpcycleSettings(method="fine_grained", granularity=4, scale="output", top_k=4))
    assert torch.equal(experts_of(made)[0][:4].flatten(0, 1), dense_of(dense)[0])
    assert torch.equal(experts_of(made)[0][4:].flatten(0, 1), dense_of(dense)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "drop"},
        {"method": "noise", "indices": "per_matrix"},
        {"method": "fine_grained", "granularity": 4, "top_k": 4, "shuffle": True},
        {"method": "shared", "granularity": 4, "shared_shards": 2, "shuffle": True, "shared_gate": True},
        {"method": "adapter", "adapter_width": 6},
    ],
    ids=lambda settings: settings["method"],
)
def test_any_part_has_the_bits_of_the_whole(dense, settings):
    """So ranks that hold different parts make one model; another seed makes another."""
    made, again, other = (upcycle([dense], UpcycleSettings(**settings, seed=seed)) for seed in (3, 3, 4))
    differs = False
    for name, tensor in made.tensors.items():
        whole = tensor.read()
        differs |= not torch.equal(whole, other.tensors[name].read())
        cuts = [slice(size // 3, size - size // 4) for size in tensor.shape]
        part = again.tensors[name].read(cuts)
        assert torch.equal(part, whole[tuple(cuts)])
    assert differs


def test_nothing_depends_on_the_number_of_threads(dense):
    settings = UpcycleSettings(method="drop")
    threads = torch.get_num_threads()
    try:
        values = []
        for count in (1, 3):
            torch.set_num_threads(count)
            values.append(experts_of(upcycle([dense], settings)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*values))


def test_bfloat16_stays_bfloat16_and_powers_of_two_stay_exact(dense):
    narrow = dense.with_model(dense.config, {n: t.to(torch.bfloat16) for n, t in dense.tensors.items()})
    made = upcycle([narrow], UpcycleSettings(method="fine_grained", granularity=4, top_k=4))
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    up, down = experts_of(made)[1], experts_of(made)[2]
    assert torch.equal(up[:4].flatten(0, 1), dense_of(narrow)[1] * 2)  # sqrt(c) = 2
    assert torch.equal(torch.cat(list(down[:4]), 1), dense_of(narrow)[2] * 2)
