"""Levels, counts and kinship against loops."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llsa_np as llsa


@given(st.integers(1, 500), st.integers(2, 30), st.integers(1, 6))
def test_against_loops(tokens, block_size, levels):
    h = llsa.Hierarchy(tokens, block_size, levels)
    lengths = [tokens]
    for _ in range(levels):
        lengths.append(math.ceil(Fraction(lengths[-1], block_size)))
    assert h.lengths == tuple(lengths)
    for level in range(levels + 1):
        spans = [h.span(level, j) for j in range(lengths[level])]
        assert [t for span in spans for t in span] == list(range(tokens))
        assert h.counts(level).tolist() == [len(span) for span in spans]
        assert h.last_count(level) == len(spans[-1])
        assert all(t in spans[h.ancestor(level, t)] for t in range(tokens))
        if level:
            below = [j for token in range(lengths[level]) for j in h.children(level, token)]
            assert below == list(range(lengths[level - 1]))


@pytest.mark.parametrize(
    ("tokens", "levels"), [(1, 1), (255, 1), (4096, 2), (16384, 2), (65536, 3), (262144, 3), (1048576, 4)]
)
def test_default_levels_of_the_paper(tokens, levels):
    assert llsa.default_levels(tokens) == levels


@given(st.integers(2, 1000), st.integers(1, 6))
def test_default_levels_are_exact_at_powers(block_size, power):
    assert llsa.default_levels(block_size**power, block_size) == max(1, power - 1)
    assert llsa.default_levels(block_size**power - 1, block_size) == max(1, power - 2)


def test_default_levels_stop_at_16():
    assert llsa.default_levels(2**60, 2) == 16


def test_frozen():
    h = llsa.Hierarchy(20, 4, 2)
    with pytest.raises(AttributeError):
        h.tokens = 3
    assert h == llsa.Hierarchy(20, 4, 2)
    assert hash(h) == hash(llsa.Hierarchy(20, 4, 2))


def test_selection_is_immutable_and_survives_a_copy():
    import copy
    import pickle

    import numpy as np

    q = np.random.default_rng(0).standard_normal((1, 1, 20, 4))
    selection = llsa.select(q, q, block_size=4, levels=2, topk=(3, 2))
    assert (selection.block_size, selection.levels, selection.topk) == (4, 2, (3, 2))
    assert (selection.query_tokens, selection.key_tokens, len(selection)) == (20, 20, 2)
    assert "topk=(3, 2)" in repr(selection)
    for wrong in (0, 3, -1, "1", 1.0, np.array([1, 2])):
        with pytest.raises(IndexError, match=r"levels 1\.\.2"):
            selection[wrong]
    for statement in (lambda: setattr(selection, "topk", 1), lambda: delattr(selection, "topk")):
        with pytest.raises(AttributeError, match="immutable"):
            statement()
    for again in (copy.copy(selection), copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
        assert all(np.array_equal(a, b) for a, b in zip(again, selection))
        assert repr(again) == repr(selection)
