"""Streams mixed by a schedule: ratios, passes, and the same samples in any world, from any place, after any change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.world import World

from opsin.data import mixture as mixing
from opsin.data.loader import build_loader
from opsin.data.mixture import Mixture, scheduled_work, split_places
from opsin.data.mixture_spec import make_mixture
from opsin.data.schema import COLUMNS, pack_images
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError

BATCH = 8
SIZES = {"a": 30, "b": 9, "c": 101}
NAMES = list(SIZES)


def like(
    phases: list, *, epoch_size: int = 40, device_batch: int = BATCH, canonical: int = 2, **options: Any
) -> Any:
    """What the arrangement asks a dataset whose streams have these sizes, in shards of ten."""
    per_stream = [[10] * (n // 10) + [n % 10] * (n % 10 > 0) for n in SIZES.values()]
    shards, sizes = [len(p) for p in per_stream], list(SIZES.values())
    return SimpleNamespace(
        mixture=Mixture(NAMES, phases, sizes=sizes, epoch_size=epoch_size, global_batch=BATCH, **options), stream_names=NAMES, num_canonical_nodes=canonical,
        samples_per_shard=np.concatenate(per_stream), shards_per_stream=np.array(shards),
        shard_offset_per_stream=np.cumsum(shards) - shards, samples_per_stream=np.array(sizes),
        sample_offset_per_stream=np.cumsum(sizes) - sizes, shuffle=True, shuffle_algo="py1e", shuffle_seed=3,
        shuffle_block_size=1 << 18, batch_size=device_batch, epoch_size=epoch_size,
    )  # fmt: skip


def global_batches(
    dataset: Any, epoch: int, ranks: int = 1, workers: int = 1, nodes: int = 1, seen: int = 0
) -> list[list[tuple[int, int]]]:
    """Global batch -> (sample, visit), sorted, as a DataLoader takes batches from its workers in turn."""
    grid = scheduled_work(dataset, World(nodes, ranks // nodes, workers, 0), epoch, seen)
    flat = grid.reshape(ranks, workers, -1, dataset.batch_size)
    steps = [flat[:, b % workers, b // workers].reshape(-1) for b in range(flat.shape[1] * flat.shape[2])]
    out = []
    for step in steps:
        ids, visits = split_places(step)
        if (ids >= 0).any():
            assert (ids >= 0).all()  # whole batches, no fillers
            out.append(sorted(zip(ids.tolist(), visits.tolist(), strict=True)))
    return out


def stream_of(sample: int) -> str:
    return NAMES[int(np.searchsorted(np.cumsum(list(SIZES.values())), sample, "right"))]


def run(dataset: Any, epochs: int, **world: int) -> list[list[tuple[int, int]]]:
    return [batch for epoch in range(epochs) for batch in global_batches(dataset, epoch, **world)]


MIXED = [(0, {"a": 1}), (7, {"a": 2, "b": 1, "c": 1}), (19, {"c": 1})]


@pytest.mark.parametrize("batches", ["mixed", "single"])
@pytest.mark.parametrize("ramp", ["step", "linear"])
@pytest.mark.parametrize("small", [0, 20, 1024])
def test_no_sample_comes_again_before_its_stream_is_through(
    batches: str, ramp: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "SMALL", small)
    served = run(like(MIXED, batches=batches, ramp=ramp), 12)
    for name, size in SIZES.items():
        own = [place for batch in served for place in batch if stream_of(place[0]) == name]
        passes = len(own) // size + 1
        for visit in range(passes):
            ids = [sample for sample, v in own if v == visit]
            assert len(set(ids)) == len(ids) == (size if visit < passes - 1 else len(own) % size)
    if batches == "single":
        assert all(len({stream_of(sample) for sample, _ in batch}) == 1 for batch in served)


def test_the_mixture_switches_at_its_batch_and_a_paused_stream_keeps_its_place() -> None:
    served = run(like([(0, {"a": 1, "c": 3}), (5, {"c": 1}), (11, {"a": 1})]), 4)
    shares = [sum(stream_of(s) == "a" for s, _ in batch) for batch in served]
    assert shares == [2] * 5 + [0] * 6 + [8] * 9
    a = [place for batch in served for place in batch if stream_of(place[0]) == "a"]
    assert sorted(s for s, v in a if v == 0) == list(range(30))  # ten before the pause, twenty after it


@given(
    weights=st.lists(st.lists(st.sampled_from([0, 0.01, 1, 2]), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    ramp=st.sampled_from(["step", "linear"]), batches=st.sampled_from(["mixed", "single"]), seen=st.integers(0, 5),
    epoch=st.integers(0, 3), canonical=st.integers(1, 5), workers=st.integers(1, 3), shuffle=st.booleans(),
    small=st.sampled_from([0, 20, 1024]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_any_world_serves_the_same_global_batches_from_any_place(
    weights: list,
    ramp: str,
    batches: str,
    seen: int,
    epoch: int,
    canonical: int,
    workers: int,
    shuffle: bool,
    small: int,
) -> None:
    phases = [(4 * i, dict(zip(NAMES, row, strict=True))) for i, row in enumerate(weights)]

    def make(ranks: int) -> Any:
        return like(phases, ramp=ramp, batches=batches, device_batch=BATCH // ranks, canonical=canonical)

    datasets = {ranks: make(ranks) for ranks in (1, 2, 4)}
    for dataset in datasets.values():
        dataset.shuffle = shuffle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "SMALL", small)
        whole = global_batches(datasets[1], epoch)
        assert len(whole) == 5
        for ranks, nodes in ((1, 1), (2, 1), (2, 2), (4, 2)):
            rest = global_batches(datasets[ranks], epoch, ranks, workers, nodes, seen * BATCH)
            assert rest == whole[seen:]


def test_each_node_reads_its_own_part_where_batches_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one stream and two machines: half of the shards each, up to what a batch's halves need."""
    monkeypatch.setattr(mixing, "SMALL", 0)
    dataset = like([(0, {"c": 1})], epoch_size=96, device_batch=BATCH // 2, canonical=2)
    grid = scheduled_work(dataset, World(2, 1, 1, 0), 0, 0)
    ids = [split_places(node.reshape(-1))[0] for node in grid]
    shards = [{int(i - 39) // 10 for i in node if i >= 0} for node in ids]
    assert len(shards[0] & shards[1]) <= 1


def test_an_events_change_keeps_what_was_served() -> None:
    dataset = like([(0, {"a": 1, "b": 2, "c": 5})])
    before = run(dataset, 3)
    counts = dataset.mixture.counts(np.arange(16))
    dataset.mixture.change({"b": 1}, 15)
    assert (dataset.mixture.counts(np.array([15])) == counts[15]).all()
    after = [batch for epoch in (3, 4) for batch in global_batches(dataset, epoch)]
    assert {stream_of(s) for batch in after for s, _ in batch} == {"b"}
    b = [p for batch in before + after for p in batch if stream_of(p[0]) == "b"]
    for visit in range(len(b) // 9):
        assert len({s for s, v in b if v == visit}) == 9
    assert (dataset.mixture.counts(np.arange(16)) == counts).all()  # and what is asked of the epochs before
    assert dataset.mixture.weights_at(14) == {"a": 0.125, "b": 0.25, "c": 0.625}
    other = like([(0, {"a": 1, "b": 2, "c": 5})])
    other.mixture.load(dataset.mixture.state())
    assert [batch for epoch in (3, 4) for batch in global_batches(other, epoch)] == after
    assert dataset.mixture.weights_at(15) == {"a": 0, "b": 1, "c": 0}


def test_a_run_with_very_many_changes_has_a_small_state() -> None:
    dataset = like([(0, {"a": 1})])
    batches: list[list[tuple[int, int]]] = []
    for epoch in range(60):
        batches += global_batches(dataset, epoch)
        dataset.mixture.change({NAMES[epoch % 3]: 1.0, "c": 0.1}, 5 * (epoch + 1))
        dataset.mixture.change({NAMES[(epoch + 1) % 3]: 1.0, "c": 0.1}, 5 * (epoch + 1))  # on second thoughts
        state = dataset.mixture.state()
        assert len(str(state)) < 300
        again = like([(0, {"a": 1})])
        again.mixture.load(state)
        assert global_batches(again, epoch + 1) == global_batches(dataset, epoch + 1)
    with pytest.raises(ValueError, match="lies before the schedule's start"):
        dataset.mixture.counts(np.array([3]))
    for name, size in SIZES.items():
        own = [place for batch in batches for place in batch if stream_of(place[0]) == name]
        assert len(set(own)) == len(own) and max(v for _, v in own) == (len(own) - 1) // size


# --- as a YAML writes it


def made(**spec: Any) -> Mixture:
    return make_mixture(spec, NAMES, [30, 9, 101], BATCH, 80)


def test_times_are_taken_to_the_next_whole_batch() -> None:
    phases = [{"start": start, "weights": {"a": 1}} for start in ("0ba", "1ep", "100sp", "0.5dur", "90ba")]
    assert [start for start, _ in made(phases=phases, duration="10ep").phases] == [0, 10, 13, 50, 90]
    assert [
        start for start, _ in made(phases=[{"start": at, "weights": {"a": 1}} for at in (0, 3)]).phases
    ] == [0, 3]
    assert made(weights={"a": 1e308, "b": 1e308}).weights_at(0) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert made(weights={"a": 1, "b": 3}).weights_at(5) == {"a": 0.25, "b": 0.75, "c": 0.0}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "give either weights or phases"),
        ({"weights": {"a": 1}, "phases": []}, "give either weights or phases"),
        ({"weight": {"a": 1}}, "mixture.weight: unknown key; did you mean 'weights'"),
        ({"weights": {"aa": 1}}, "mixture.weights.aa: no such stream; did you mean 'a'"),
        ({"weights": {"a": -1}}, "mixture.weights.a: -1: use 0 (off) or more"),
        ({"weights": {"a": float("nan")}}, "mixture.weights.a: nan: use 0"),
        ({"weights": {"a": 0}}, "all are 0"),
        ({"weights": {"a": 1}, "ramp": "linaer"}, "ramp 'linaer': unknown; did you mean 'linear'"),
        ({"weights": {"a": 1}, "batches": "singel"}, "did you mean 'single'"),
        ({"phases": [{"start": "1ba", "weights": {"a": 1}}]}, "phases.0.start: 1ba is 1ba; this phase must start at 0ba"),
        ({"phases": [{"start": "0ba", "weights": {"a": 1}}, {"start": "5sp", "weights": {"b": 1}},
                     {"start": "1ba", "weights": {"a": 1}}]}, "phases.2.start: 1ba is 1ba; this phase must come after"),
        ({"phases": [{"start": "0ba"}]}, "a phase has start and weights"),
        ({"phases": [{"start": "soon", "weights": {"a": 1}}]}, "'soon' is no time; use 100ba"),
        ({"phases": [{"start": 0.5, "weights": {"a": 1}}]}, "start: 0.5: use a number of batches, or 100ba"),
        ({"phases": [{"start": True, "weights": {"a": 1}}]}, "start: True: use a number of batches"),
        ({"phases": [{"start": float("inf"), "weights": {"a": 1}}]}, "start: inf: use a number of batches"),
        ({"phases": [{"start": "0dur", "weights": {"a": 1}}], "duration": "1.5ep"}, "needs a duration in ba, ep or sp"),
        ({"phases": [{"start": "0tok", "weights": {"a": 1}}]}, "use ba, ep, sp or dur"),
        ({"phases": [{"start": "0dur", "weights": {"a": 1}}], "duration": "5tok"}, "needs a duration in ba, ep or sp"),
    ],
)  # fmt: skip
def test_what_makes_no_schedule_is_one_line(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        make_mixture(spec, NAMES, [30, 9, 101], BATCH, 80)
    assert said in str(error.value) and "\n" not in str(error.value) and "dataset.mixture" in str(error.value)


# --- real datasets


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Folders of tiny samples: ``a`` 30, ``b`` 9, ``c`` 101."""
    root = tmp_path_factory.mktemp("streams")
    for name, size in SIZES.items():
        with MDSWriter(out=str(root / name), columns=COLUMNS, hashes=["xxh64"], size_limit=2000) as writer:
            for i in range(size):
                writer.write({"id": f"{name}{i}", "conversations": [], "images": pack_images([]), "meta": {}})
    return {name: {"remote": str(root / name)} for name in SIZES}


PHASES = [
    {"start": "0ba", "weights": {"a": 1, "c": 1}},
    {"start": "7ba", "weights": {"a": 1, "b": 1, "c": 2}},
    {"start": "120sp", "weights": {"b": 1, "c": 1}},
]


def open_(streams: dict[str, Any], **options: Any) -> StreamingVLMDataset:
    options = {"batch_size": BATCH, "shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 2, "tail": "fill",
               "mixture": {"phases": PHASES}, "epoch_size": 80, **options}  # fmt: skip
    return StreamingVLMDataset(streams=streams, **options)


def loader(dataset: StreamingVLMDataset, workers: int, persistent: bool = False) -> Any:
    return build_loader(list, dataset, BATCH, num_workers=workers, persistent_workers=persistent)  # type: ignore[arg-type]


def told(batch: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(s["id"], s["visit"]) for s in batch]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (3, True)])
def test_a_loader_mixes_resumes_and_counts_visits(streams: dict, workers: int, persistent: bool) -> None:
    dataset = open_(streams)
    loaded = loader(dataset, workers, persistent)
    assert len(dataset) == 80 and len(loaded) == 10
    epochs = [[told(batch) for batch in loaded] for _ in range(3)]
    served = [batch for epoch in epochs for batch in epoch]
    shares = [{n: sum(i[0] == n for i, _ in batch) for n in NAMES} for batch in served]
    assert all(s == {"a": 4, "b": 0, "c": 4} for s in shares[:7])
    assert all(s == {"a": 2, "b": 2, "c": 4} for s in shares[7:15])
    assert all(s == {"a": 0, "b": 4, "c": 4} for s in shares[15:])
    for name, size in SIZES.items():
        own = [place for batch in served for place in batch if place[0][0] == name]
        assert len(set(own)) == len(own)  # (id, visit): each once a pass
        assert max(v for _, v in own) == (len(own) - 1) // size
    middle = {**dataset.state_dict(24, True), "epoch": 1}
    for other in {0, 2}:
        again = open_(streams)
        again.load_state_dict(middle)
        rest = [told(batch) for batch in loader(again, other)]
        assert rest == epochs[1][3:]
        assert [told(batch) for batch in loader(again, other)] == epochs[2]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_change_between_epochs_reaches_workers_and_checkpoints(
    streams: dict, workers: int, persistent: bool
) -> None:
    def names(batches: list[list[tuple[str, int]]]) -> set[str]:
        return {i[0] for batch in batches for i, _ in batch}

    dataset = open_(streams, mixture={"weights": {"a": 1}})
    loaded = loader(dataset, workers, persistent)
    assert names([told(b) for b in loaded]) == {"a"}
    dataset.set_mixture({"b": 1, "c": 3})
    state = dataset.state_dict(0, True)
    changed = [told(b) for b in loaded]
    assert names(changed) == {"b", "c"} and all(sum(i[0] == "b" for i, _ in b) == 2 for b in changed)
    middle = dataset.state_dict(40, True)
    dataset.set_mixture({"a": 1})
    back = [told(b) for b in loaded]
    assert names(back) == {"a"} and back[0][0][1] >= 80 // 30  # where it was left, not at its beginning
    for saved, expected in ((state, changed), (middle, changed[5:])):
        resumed = open_(streams, mixture={"weights": {"a": 1}})
        resumed.load_state_dict(saved)
        assert [told(b) for b in loader(resumed, workers, persistent)] == expected


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, True)])
def test_a_change_in_mid_epoch_waits_for_the_next_one(streams: dict, workers: int, persistent: bool) -> None:
    def whole() -> tuple[StreamingVLMDataset, list]:
        dataset = open_(streams, mixture={"weights": {"a": 1, "c": 1}})
        return dataset, [[told(b) for b in loader(dataset, 0)] for _ in range(2)]

    expected = whole()[1][0]
    dataset = open_(streams, mixture={"weights": {"a": 1, "c": 1}})
    loaded = loader(dataset, workers, persistent)
    batches = iter(loaded)
    served = [told(next(batches)) for _ in range(4)]
    dataset.set_mixture({"b": 1})
    state = dataset.state_dict(32, True)
    assert (state["epoch"], state["sample_in_epoch"]) == (0, 32)
    assert served + [told(b) for b in batches] == expected
    changed = [told(b) for b in loaded]
    assert {i[0] for b in changed for i, _ in b} == {"b"}
    resumed = open_(streams, mixture={"weights": {"a": 1, "c": 1}})
    resumed.load_state_dict(state)
    resumed.set_mixture({"b": 1})  # again, before it goes on: its place stays
    again = loader(resumed, workers, persistent)
    assert [told(b) for b in again] == expected[4:] and [told(b) for b in again] == changed


def test_what_a_mixture_excludes_is_one_line(streams: dict) -> None:
    for options, said in (
        ({"epoch_size": 83}, "epoch_size 83: a mixture needs whole global batches of 8; use 80"),
        ({"epoch_size": 0}, "epoch_size 0: a mixture needs whole global batches of 8; use 8"),
        ({"epoch_size": "1ki"}, "epoch_size 1ki: use a number of samples, or 10k or 2m"),
        ({"batching_method": "stratified"}, "batching_method 'stratified' and a mixture exclude each other"),
        ({"streams": {**streams, "a": {**streams["a"], "proportion": 0.5}}}, "dataset.streams.a.proportion: weights stand"),
        ({"mixture": {"weights": {"d": 1}}}, "dataset.mixture.weights.d: no such stream"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            open_(**{"streams": streams, **options})
        assert said in str(error.value) and "\n" not in str(error.value)
    plain = open_(streams, mixture=None, epoch_size=None)
    with pytest.raises(UserError, match="it has no mixture that could be changed"):
        plain.set_mixture({"a": 1})
    dataset = open_(streams, epoch_size=None)
    assert dataset.epoch_size == 136  # of 140, whole batches
    list(zip(range(8), dataset, strict=False))
    state = dataset.state_dict(8, True)
    for other in (
        open_(streams, epoch_size=136, mixture={"weights": {"a": 1}}),
        open_(streams, epoch_size=136, batch_size=4),
        open_(streams, epoch_size=None, mixture=None),
        open_(
            {**streams, "b": streams["a"], "a": streams["b"]}, epoch_size=136
        ),  # other data, of another size
        open_(streams, epoch_size=128),
    ):
        with pytest.raises(UserError, match=r"another mixture|into an epoch of"):
            other.load_state_dict(state)
    with pytest.raises(
        UserError, match="another mixture"
    ):  # between epochs, too: places count from the first
        open_(streams, epoch_size=128).load_state_dict({**state, "epoch": 1, "sample_in_epoch": 0})
    fresh = open_(streams, epoch_size="136")
    fresh.load_state_dict(state)
    with pytest.raises(UserError, match=r"mixture\.d: no such stream"):
        fresh.set_mixture({"d": 1})


@pytest.mark.world
def test_two_ranks_mix_the_same_global_batches(streams: dict, ranks: Any) -> None:
    options = {"shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 2, "tail": "fill",
               "mixture": {"phases": PHASES}, "epoch_size": 80, "streams": streams}  # fmt: skip
    served = ranks.run(
        "jobs:served", timeout=240, batch_size=BATCH // 2, workers=2, epochs=2, options=options
    )
    alone = loader(open_(streams), 0)
    for epoch in range(2):
        for one, left, right in zip(alone, served[0][epoch], served[1][epoch], strict=True):
            assert sorted(s["id"] for s in one) == sorted(left + right)
