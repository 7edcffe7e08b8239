"""Families of which a few laws say enough: their positions and scales are those of families in the whole matrix."""

import pytest
import torch
from families import MORE_FAMILIES, exact, make_base, make_model, sleep_config, tokens
from helpers import assert_close, assert_same_states, states, stream
from reference import reference_run

from hf_sleep.bases.probe import probe

L = 6


def settings(family: str):
    return sleep_config(family, window_size=L, sleep_passes=2, eviction="sliding", num_sink_tokens=2)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_an_untrained_retrofit_is_the_base_bit_for_bit(family):
    ids = tokens(L)[None]
    with torch.no_grad():
        model = make_model(family, settings(family), trained=False)
        assert torch.equal(model(ids).logits, make_base(family)(ids).logits)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_stream_is_algorithm_1(family):
    model, ids = make_model(family, settings(family), torch.double), tokens(3 * L + 2)
    with exact(), torch.no_grad():
        run = reference_run(model, ids)
        for sizes in ([len(ids)], [1] * len(ids), [4, 9, 3, 4]):
            logits, cache = stream(model, ids[None], sizes)
            assert_close(logits[0], run.logits, what=f"logits of {sizes}")
            assert_same_states(states(model, cache), run.memory)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_its_adapter_passes_the_probe(family):
    assert probe(make_base(family)).covered
