"""Small random models: enough to see whether the machinery is right."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Chat, Decoder, ModelConfig  # noqa: E402

# Of models so small: a second thread costs more than it gives; also to what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def random_model(vocab_size=97, layers=2, seed=0, **more) -> Decoder:
    """A Qwen2 decoder with large random weights, so that its distributions are far from
    flat."""
    torch.manual_seed(seed)
    source = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    } | more
    model = Decoder(ModelConfig.from_dict(source)).eval()
    return fill(model, 0.25)


@torch.no_grad()
def fill(model: Decoder, std: float, norms: float = 0.0) -> Decoder:
    """Random weights of this deviation; norms are 1 and biases 0, or spread around
    these."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(std=std)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            p.add_(norms * torch.randn(p.shape))
    return model


WORST = {}  # what was compared -> (the largest difference of this session, its tolerance)


def close(what: str, difference, tolerance: float) -> None:
    """Asserts that a difference is below its tolerance; the worst are printed at the
    end."""
    difference = torch.as_tensor(difference).item()
    WORST[what] = max(WORST.get(what, (0.0, 0.0)), (difference, tolerance))
    assert difference < tolerance, (
        f"{what}: {difference:.1e}, the tolerance is {tolerance:.0e}"
    )


def pytest_terminal_summary(terminalreporter):
    if WORST:
        terminalreporter.section("worst differences")
    for what, (difference, tolerance) in sorted(WORST.items()):
        terminalreporter.write_line(f"{what:60} {difference:8.1e} of {tolerance:.0e}")


@pytest.fixture
def small():
    return random_model()


@pytest.fixture(scope="session")
def tiny_chat():
    return Chat(ROOT / "tiny")
