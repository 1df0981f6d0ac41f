"""extras/fast_cpu.py: a packed model is the same model. Tests bear the name of a bug."""

import copy

import pytest
import torch
from conftest import close, fill, random_model
from test_model import parameters_of, write_model

from extras import fast_cpu
from model import load, save

IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
POSITIONS = torch.arange(5).expand(2, 5)
FAMILIES = [
    {},
    {"tie_word_embeddings": False},
    {"model_type": "llama"},
    {"model_type": "qwen3"},
    {"model_type": "phi3"},
]


def run(model, mode=torch.inference_mode):
    with mode():
        return model.logits(model(IDS, POSITIONS))


def packed_of(model):
    model = copy.deepcopy(model)
    fast_cpu.pack(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_lose_a_bias_or_mix_up_the_fused_halves(family):
    model = fill(random_model(**family), std=0.25, norms=0.3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    packed = packed_of(model)
    assert packed.lm_head not in fast_cpu.PACKED
    torch.testing.assert_close(run(packed), run(model, torch.no_grad), atol=1e-4, rtol=1e-4)
    # A CPU without float32 products of oneDNN would compare the model with itself.
    assert (packed.lm_head in fast_cpu.PACKED) == fast_cpu.can_pack(model.lm_head.weight)


def test_packed_bfloat16_is_another_model():
    """Where the CPU cannot multiply in bfloat16, the layers stay what they were."""
    model = random_model().bfloat16()
    ours, theirs = run(packed_of(model)).float(), run(model, torch.no_grad)
    assert run(packed_of(model)).dtype == torch.bfloat16
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    close("logits in bfloat16, packed and not", worst, 0.02)


def test_sampling_goes_on_with_weights_from_before_the_update():
    model = random_model()
    packed = packed_of(model)
    run(packed)
    optimizer = torch.optim.AdamW(packed.parameters(), lr=0.01)
    packed.logits(packed(IDS, POSITIONS)).square().mean().backward()
    optimizer.step()
    after = run(packed)
    assert not torch.allclose(after, run(model), atol=1e-2)
    torch.testing.assert_close(after, run(packed, torch.no_grad), atol=1e-4, rtol=1e-4)
    packed.double().float()  # new tensors, of which none is older than version 0
    torch.testing.assert_close(run(packed), after, atol=1e-4, rtol=1e-4)


def test_gradients_are_taken_through_the_packed_copy():
    model = random_model()
    packed = packed_of(model)
    run(packed)
    for each in (model, packed):
        each.logits(each(IDS, POSITIONS)).square().mean().backward()
    for p, q in zip(model.parameters(), packed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_names_and_ties_change():
    model = random_model()
    packed = packed_of(model)
    run(packed)
    assert packed.state_dict().keys() == model.state_dict().keys()
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    again = copy.deepcopy(packed)  # the reference model of a run
    assert again.lm_head not in fast_cpu.PACKED and torch.equal(run(again), run(packed))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        again.lm_head.weight.zero_()
    assert not run(again).any() and run(packed).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_is_saved_as_something_else(tmp_path, family):
    weights = write_model(tmp_path / "m", **family)
    model, chat = load(str(tmp_path / "m"))
    fast_cpu.pack(model)
    run(model)
    save(model, chat, tmp_path / "saved")
    again, _ = load(str(tmp_path / "saved"))
    saved = parameters_of(again)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
