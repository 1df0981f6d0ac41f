"""Logits against transformers' own, recorded by make_golden.py, for every family of the
loader."""

import json

import pytest
import torch
from conftest import close
from make_golden import FAMILIES, GOLDEN, KEPT, LENGTH, fill, some_ids
from safetensors import safe_open

from model import Decoder, ModelConfig


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tied):
    """Prevents: a bias dropped, a rope scaling or a q/k norm ignored, a wrong half of a
    fused matrix. Far positions too: a short prompt hides errors of rope."""
    with safe_open(GOLDEN, framework="pt") as golden:
        config = json.loads(golden.metadata()["configs"])[f"{family} {tied}"]
        starts = (0, 300, 5000, 16000)
        expected = {
            start: golden.get_tensor(f"{family} {tied} {start}") for start in starts
        }
    model = Decoder(ModelConfig.from_dict(config)).eval()
    fill(model)
    for start, theirs in expected.items():
        # Phi-3.5 takes its short or long factors by the context asked for.
        model.set_context(256 if start == 0 else 16384)
        positions = torch.arange(LENGTH)[None] + start
        with torch.no_grad():
            ours = model.logits(model(some_ids(), positions))[0, -KEPT:]  # (KEPT, V)
        close("logits, golden", (ours - theirs).abs().max() / theirs.abs().max(), 1e-4)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
