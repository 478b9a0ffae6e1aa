"""The parts of an artifact by themselves: codec, digests, weights of every dtype, environments, fingerprints."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Literal

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt_jax.artifact import digests, fingerprint, weights
from fastgpt_jax.artifact.codec import SchemaError, decode, encode
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey
from fastgpt_jax.artifact.environment import Environment, read_cpu_features
from fastgpt_jax.artifact.executable import ArrayType, Placement
from fastgpt_jax.artifact.lazy_steps import LazySteps
from fastgpt_jax.artifact.manifest import Fingerprint
from fastgpt_jax.artifact.step import Step, flatten_inputs, input_shapes, unflatten_inputs
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.inputs import init_sampler_inputs
from fastgpt_jax.sampling.step_io import StepInputs


@dataclasses.dataclass(frozen=True)
class Leaf:
    size: int
    share: float
    kind: Literal["a", "b"]


@dataclasses.dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    notes: Mapping[str, str]
    best: Leaf | None


LEAF = st.builds(
    Leaf, st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from("ab")
)
TREE = st.builds(
    Tree,
    st.lists(LEAF, max_size=3).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.none() | LEAF,
)


@given(TREE)
def test_the_codec_gives_back_what_it_was_given(tree):
    assert decode(Tree, encode(tree)) == tree


@pytest.mark.parametrize(
    "change, words",
    [
        ({"leaves": [{"size": 1, "share": 1, "kind": "c"}]}, r"leaves\[0\].kind"),
        ({"leaves": [{"size": True, "share": 1, "kind": "a"}]}, r"leaves\[0\].size"),
        ({"leaves": {}}, "leaves must be a list"),
        ({"pair": [1]}, "pair"),
        ({"notes": {"x": 3}}, "notes.x"),
        ({"best": {"size": 1}}, "best.share is missing"),
        ({"extra": 1}, "extra"),
    ],
)
def test_the_codec_names_the_place_of_a_mistake(change, words):
    good = {"leaves": [], "pair": [1, "x"], "notes": {}, "best": None}
    decode(Tree, good)
    with pytest.raises(SchemaError, match=words):
        decode(Tree, good | change)


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 16))
def test_a_stream_has_the_digests_of_its_file(tmp_path_factory, chunks, piece_bytes):
    data = b"".join(chunks)
    path = tmp_path_factory.mktemp("digests") / "file"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "PIECE_BYTES", piece_bytes)
        digester = digests.PieceDigester()
        for chunk in chunks:
            digester.update(memoryview(chunk))
        expected = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)] or [b""]
        assert digester.digests() == tuple(hashlib.sha256(piece).hexdigest() for piece in expected)
        assert digests.digest_file(path) == digester.digests()


ARRAYS = {
    "float32": np.linspace(0, 1, 7, dtype=np.float32).reshape(7, 1),
    "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
    "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
    "float8_e4m3fn": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
    "bool": np.array([[True, False, True]]),
    "uint32": np.array(7, np.uint32),
    "int8": np.zeros((0, 4), np.int8),
}


@pytest.mark.parametrize("max_file_bytes", [10, 2**30])
def test_weights_of_every_dtype_come_back(tmp_path, monkeypatch, max_file_bytes):
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", max_file_bytes)
    given = [weights.Weight(n, x.shape, str(x.dtype), (), lambda x=x: x) for n, x in ARRAYS.items()]
    written = []
    records, files = weights.write_weights(tmp_path, given, written.append)
    assert sum(written) == sum(w.nbytes for w in given) and all(r.begin % 64 == 0 for r in records)
    assert [f.sha256 for f in files] == list(digests.digest_files([tmp_path / f.path for f in files]))
    assert len(files) == (1 if max_file_bytes > 100 else 4)  # 28, 10, 16, and 3 + 3 + 4 + 0 bytes
    back = weights.map_weights(tmp_path, records, Placement((jax.devices()[0],)))
    for array, expected in zip(back, ARRAYS.values(), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(array), expected)


HERE = Environment("0.10.2", "0.10.2", "cpu", "cpu", "cpu", 4, ("avx2", "fma"))


def test_an_environment_with_more_is_no_mismatch():
    assert HERE.mismatches(HERE) == ()
    more = dataclasses.replace(HERE, device_count=8, cpu_features=("avx2", "avx512f", "fma"))
    assert HERE.mismatches(more) == ()
    assert len(more.mismatches(HERE)) == 2


def test_code_that_calls_native_kernels_needs_them():
    made = dataclasses.replace(HERE, cpu_kernels="1")
    assert made.mismatches(made) == () and HERE.mismatches(made) == ()
    assert made.mismatches(HERE) == ("cpu_kernels cannot be used here, the artifact was made with version 1",)
    (found,) = made.mismatches(dataclasses.replace(HERE, cpu_kernels="2"))
    assert found.startswith("cpu_kernels are version 2")


def test_cpu_features_are_those_that_code_can_ask_for(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor: 0\nflags\t\t: fpu sse4_2 avx2 ibpb avx512_vnni hypervisor\n")
    assert read_cpu_features(path) == ("avx2", "avx512_vnni", "sse4_2")
    path.write_text("Features\t: fp asimd atomics i8mm\n")
    assert read_cpu_features(path) == ("asimd", "i8mm")
    assert read_cpu_features(tmp_path / "none") == ()


EXPECTED = Fingerprint((1, 2), (5, 6, 7), (-1.0, -2.0, -3.0), 0.02)


@pytest.mark.parametrize(
    "ids, logprobs, holds",
    [
        ((5, 6, 7), (-1.001, -2.0, -3.01), True),
        ((5, 6, 8), (-1.0, -2.0, -3.01), True),  # the last is as likely as a stranger
        ((5, 6, 7), (-1.0, -2.0, -3.1), False),
        ((6, 5, 7), (-1.0, -2.0, -3.0), False),
        ((5, 9, 7), (-1.0, -2.0, -3.0), False),
        ((5, 6, 7), (float("nan"), -2.0, -3.0), False),
    ],
)
def test_a_fingerprint_holds_within_rounding(ids, logprobs, holds):
    found = dataclasses.replace(EXPECTED, top_ids=ids, top_logprobs=logprobs)
    if holds:
        fingerprint.check(EXPECTED, found)
    else:
        with pytest.raises(UserError, match="fingerprint"):
            fingerprint.check(EXPECTED, found)


@pytest.mark.parametrize("variant, score", [("greedy", False), ("full", False), ("full", True)])
def test_inputs_are_flattened_in_one_order(variant, score):
    key = EntryPointKey(6, 2, variant, score)
    inputs = StepInputs(
        *(np.arange(n, dtype=np.int32) for n in (6, 2)),
        np.zeros((2, 3), np.int32),
        *(np.arange(n, dtype=np.int32) for n in (2, 2, 6)),
    )
    sampler = init_sampler_inputs(2, 40, 9) if variant == "full" else None
    flat = flatten_inputs(key, inputs, sampler)
    assert [(x.shape, x.dtype) for x in flat] == [(s.shape, s.dtype) for s in input_shapes(key, 40, 9, 3)]
    back, back_sampler = unflatten_inputs(key, flat)
    assert back.num_new is inputs.num_new and back.slots is inputs.slots
    assert back_sampler is None if sampler is None else back_sampler.seeds is sampler.seeds


def test_buckets_answer_the_scheduler():
    buckets = Buckets(((4, 1), (4, 3), (16, 1)), (1, 4, 6))
    assert buckets.chunk_lens == (4, 16) and buckets.prefill_rows(4) == (1, 3)
    assert [buckets.decode_rows(n) for n in (1, 2, 4, 5, 6)] == [1, 4, 4, 6, 6]
    names = [key.name for key in buckets.keys()]
    assert len(set(names)) == len(names) == 3 * 2 + 3 * 3 and "prefill-r3-c4-full-score" in names


def test_steps_are_made_once_by_whoever_asks_first():
    made = []
    keys = [EntryPointKey(n, n, "greedy", False) for n in (1, 2, 3)]

    def make(key):
        made.append(key)
        return Step(key, lambda *groups: groups, [])

    steps = LazySteps({key: functools.partial(make, key) for key in keys})
    assert steps.get(keys[1]).key == keys[1]
    steps.load_rest_in_background()
    steps.load_rest_in_background()
    steps._thread.join()
    assert steps.get(keys[0]).key == keys[0] and sorted(made) == keys


def test_an_array_type_counts_bytes_as_stored():
    assert ArrayType((3, 5), "bfloat16").nbytes == 30 and ArrayType((), "float32").nbytes == 4
