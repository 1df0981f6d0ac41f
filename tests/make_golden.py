"""Writes tests/golden.safetensors: what transformers computes for small models of every
family.

    pip install -r requirements.txt transformers==5.23.0 && python tests/make_golden.py

tests/test_golden.py compares our decoder with it wherever torch runs, without transformers.
The weights are not stored: both sides draw them from NumPy's RandomState, whose streams are
frozen."""

import json
import platform
import zlib
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("golden.safetensors")
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 4.0 * i for i in range(8)],
}
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    "longrope": {**LONGROPE, "rope_theta": 1e4, "original_max_position_embeddings": 256},
}
FAMILIES = {  # name -> transformers' class, and what sets its config apart
    "qwen2": ("Qwen2", {"rope_parameters": ROPES["plain"]}),
    "qwen3": ("Qwen3", {"rope_parameters": ROPES["plain"], "head_dim": 32}),
    "llama": ("Llama", {"rope_parameters": ROPES["llama3"]}),
    "mistral": ("Mistral", {"rope_parameters": ROPES["plain"], "sliding_window": None}),
    "phi3": (
        "Phi3",
        {
            "rope_parameters": ROPES["longrope"],
            "original_max_position_embeddings": 256,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
        },
    ),
}
LENGTH, KEPT = 40, 3  # positions run, and the last of them whose logits are kept


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights that depend on nothing but their names: large enough for attention to
    matter."""
    for name, p in model.named_parameters():
        normal = numpy.random.RandomState(zlib.crc32(name.encode())).standard_normal(
            p.shape
        )
        values = torch.from_numpy(normal).to(p.dtype)
        if p.dim() == 2:
            p.copy_(0.15 * values)
        else:  # norms around 1, biases around 0
            p.copy_(0.3 * values + (0 if name.endswith("bias") else 1))


def some_ids() -> torch.Tensor:
    ids = numpy.random.RandomState(0).randint(0, COMMON["vocab_size"], (1, LENGTH))
    return torch.from_numpy(ids)  # (1, LENGTH)


def main():
    import transformers

    tensors, configs = {}, {}
    for family, (name, extra) in FAMILIES.items():
        for tied in (True, False):
            key = f"{family} {'tied' if tied else 'untied'}"
            settings = {**COMMON, **extra, "tie_word_embeddings": tied}
            config = getattr(transformers, f"{name}Config")(**settings)
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            fill(model)
            configs[key] = config.to_dict()
            for start in (0, 300, 5000, 16000):
                positions = torch.arange(LENGTH)[None] + start  # (1, LENGTH)
                with torch.no_grad():
                    logits = model(
                        some_ids(), position_ids=positions, use_cache=False
                    ).logits
                tensors[f"{key} {start}"] = logits[0, -KEPT:].float().clone()  # (KEPT, V)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": numpy.__version__, "transformers": transformers.__version__}
    about = {"versions": json.dumps(versions), "configs": json.dumps(configs)}
    save_file(tensors, GOLDEN, about)
    print(f"{len(tensors)} tensors, {GOLDEN.stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
