"""Pages and carried values moved by compiled programs: what they mean, in place, and between processes and devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fastgpt_jax.artifact.cache_layout import CacheEntry, CacheLayout
from fastgpt_jax.artifact.executable import (
    ArrayType,
    Placement,
    Spec,
    compile_afresh,
    deserialize,
    kept_arguments,
    serialize,
)
from fastgpt_jax.artifact.transfers import MovesPages, Transfer, make_transfers
from sharding import count_collectives

NUM_PAGES, PAGE_SIZE, NUM_SLOTS = 5, 2, 3
STATE = (  # of layers [2], rounded with scales; as they are; a window of layers, a carry
    ArrayType((2, NUM_PAGES, PAGE_SIZE, 3, 4), "int8"),
    ArrayType((2, NUM_PAGES, PAGE_SIZE, 3), "float32"),
    ArrayType((NUM_PAGES, PAGE_SIZE, 4), "bfloat16"),
    ArrayType((NUM_SLOTS, 2, 3), "float32"),
    ArrayType((NUM_SLOTS,), "int32"),
)
LAYOUT = CacheLayout(
    (
        CacheEntry("kv0", "kv", (3, 4), "int8", 2, 96, "model.py:1", "float32"),
        CacheEntry("window1", "window", (3,), "float32", 2, 24, "model.py:2"),
        CacheEntry("kv2", "kv", (4,), "bfloat16", 1, 8, "model.py:3"),
        CacheEntry("carry3", "carry", (), "int32", 1, 4, "model.py:4"),
    ),
    PAGE_SIZE,
    NUM_PAGES,
    "rectangular",
)
PAGE_AXES = (1, 1, 0)


class Moves(MovesPages):
    """The programs of a layout, compiled here."""

    def __init__(self, layout: CacheLayout = LAYOUT, state: tuple[ArrayType, ...] = STATE):
        self._layout = layout
        self.made = make_transfers(layout, state)
        self._compiled = {name: transfer.lower(lambda spec: None).compile() for name, transfer in self.made.items()}

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def transfer(self, name: str) -> Any:
        return self._compiled[name]


@pytest.fixture(scope="module")
def moves() -> Moves:
    return Moves()


def make_state(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.integers(-99, 99, x.shape), dtype=jax.numpy.dtype(x.dtype)) for x in STATE]


def on_device(state: list[np.ndarray]) -> list[jax.Array]:
    return [jax.numpy.array(x) for x in state]


def pages(*numbers: int) -> np.ndarray:
    """Padded with the first page that does not exist."""
    padding = [NUM_PAGES] * (LAYOUT.transfer_pages - len(numbers))
    return np.asarray([*numbers, *padding], np.int32)


def at(state: list[Any], page: int) -> list[np.ndarray]:
    """A page of every pool."""
    return [np.take(np.asarray(x), page, axis) for x, axis in zip(state[:3], PAGE_AXES, strict=True)]


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_pages_are_copied_all_read_before_any_is_written(moves: Moves):
    before = make_state()
    after = moves.copy_pages(on_device(before), pages(0, 3, 2), pages(3, 1, 4))
    sources = {3: 0, 1: 3, 4: 2}
    for page in range(NUM_PAGES):
        assert_equal(at(after, page), at(before, sources.get(page, page)))
    assert_equal(after[3:], before[3:])


def test_pages_go_to_the_host_and_into_other_pages(moves: Moves):
    before, other = make_state(), make_state(1)
    state = on_device(before)
    values = jax.device_get(moves.read_pages(state, pages(4, 1)))
    assert_equal(state, before)
    assert [x.dtype for x in values] == [x.dtype for x in before[:3]]
    after = moves.write_pages(on_device(other), pages(0, 2), values)
    for page in range(NUM_PAGES):
        wanted = {0: at(before, 4), 2: at(before, 1)}.get(page, at(other, page))
        assert_equal(at(after, page), wanted)
    assert_equal(after[3:], other[3:])


def test_what_a_request_carries_goes_into_another_slot(moves: Moves):
    before, other = make_state(), make_state(1)
    values = moves.read_slot(on_device(before), 2)
    assert_equal(values, [x[2] for x in before[3:]])
    after = moves.write_slot(on_device(other), 0, jax.device_get(values))
    for slot in range(NUM_SLOTS):
        assert_equal(
            [x[slot] for x in after[3:]], [x[2 if slot == 0 else slot] for x in (before if slot == 0 else other)[3:]]
        )
    assert_equal(after[:3], other[:3])


def test_a_layout_without_pools_or_without_carried_values_moves_none():
    only_pages = dataclasses.replace(LAYOUT, entries=(LAYOUT.entries[2],))
    assert set(make_transfers(only_pages, STATE[2:3])) == {"copy-pages", "read-pages", "write-pages"}
    only_carried = Moves(dataclasses.replace(LAYOUT, entries=(LAYOUT.entries[3],)), STATE[4:])
    assert set(only_carried.made) == {"read-slot", "write-slot"}
    state = on_device(make_state()[4:])
    assert only_carried.copy_pages(state, pages(0), pages(1)) is state
    assert only_carried.write_pages(state, pages(0), []) is state and only_carried.read_pages(state, pages(0)) == []


@pytest.mark.parametrize("name", ["copy-pages", "write-pages", "write-slot"])
def test_the_state_is_changed_in_place(moves: Moves, name: str):
    transfer: Transfer = moves.made[name]
    module = moves.transfer(name)
    state_bytes = sum(x.nbytes for x in transfer.state)
    assert module.memory_analysis().alias_size_in_bytes == state_bytes
    assert not copied(module, transfer.state), "nothing as large as a pool is copied"


@pytest.mark.parametrize("name", ["read-pages", "read-slot"])
def test_what_is_read_stays(moves: Moves, name: str):
    assert moves.transfer(name).memory_analysis().alias_size_in_bytes == 0


@pytest.mark.parametrize("num_devices", [1, 2])
def test_stored_programs_move_what_is_cut_over_devices(num_devices: int):
    spec: Spec = ((), (), (), ("tensor",))
    cut = (*(dataclasses.replace(x, spec=spec) for x in STATE[:2]), *STATE[2:]) if num_devices > 1 else STATE
    cut = tuple(
        dataclasses.replace(x, shape=(*x.shape[:3], 4, *x.shape[4:])) if i < 2 else x for i, x in enumerate(cut)
    )
    axes = (("tensor", num_devices),) if num_devices > 1 else ()
    placement = Placement(tuple(jax.devices()[:num_devices]), axes)
    made = make_transfers(LAYOUT, cut)
    compiled = {name: compile_afresh(transfer.lower(placement.sharding)) for name, transfer in made.items()}
    stored = {
        name: deserialize(serialize(program), made[name].signature(kept_arguments(program)), placement)
        for name, program in compiled.items()
    }
    for program in compiled.values():
        assert not count_collectives(program)
    pool_bytes = sum(x.nbytes for x in cut[:2]) // num_devices + cut[2].nbytes
    memory: Any = compiled["copy-pages"].memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    rng = np.random.default_rng(2)
    before = [np.asarray(rng.integers(-99, 99, x.shape), dtype=jax.numpy.dtype(x.dtype)) for x in cut]

    class Stored(Moves):
        def transfer(self, name: str) -> Any:
            return stored[name]

    moves = Stored(LAYOUT, cut)
    state = [jax.device_put(x, placement.sharding(y.spec)) for x, y in zip(before, cut, strict=True)]
    values = jax.device_get(moves.read_pages(state, pages(1, 4)))
    state = moves.write_pages(moves.copy_pages(state, pages(0), pages(1)), pages(3, 0), values)
    state = moves.write_slot(state, 1, moves.read_slot(state, 2))
    for page, source in {0: 4, 1: 0, 2: 2, 3: 1, 4: 4}.items():
        assert_equal(at(state, page), at(before, source))
    assert_equal([x[1] for x in state[3:]], [x[2] for x in before[3:]])
    assert [x.sharding for x in state] == [placement.sharding(x.spec) for x in cut]


def copied(module: Any, state: tuple[ArrayType, ...]) -> list[str]:
    """Instructions that copy an array of the state's shapes."""
    shapes = {f"[{','.join(map(str, x.shape))}]" for x in state}
    lines = [line for line in module.as_text().splitlines() if " copy(" in line or " copy-start(" in line]
    return [line for line in lines if any(shape in line.split("copy")[0] for shape in shapes)]
