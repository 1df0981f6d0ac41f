"""One decoder for Qwen2/2.5/3, Llama 3.x, SmolLM2, Mistral, Phi-3.5; its weights and chat template.

    model, chat = load("qwen2.5-1.5b", device="cuda", dtype=torch.bfloat16)
    logits = model.logits(model(ids, positions))  # (B, T) -> (B, T, C) -> (B, T, V)

Parameters bear their Hugging Face names, so the tensors of a file and state_dict() agree one to
one. There is no cache and no mask here: the caller passes how queries meet keys to `forward`.
"""

import datetime
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import jinja2.ext
import jinja2.sandbox
import torch
import torch.nn.functional as F
from huggingface_hub import constants, errors, save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

NAMES = {  # short name -> hub id; a new one is one line here
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen2-{n}b": f"Qwen/Qwen2-{n}B-Instruct" for n in ("1.5", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
    **{f"llama3.2-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in ("1", "3")},
    **{f"smollm2-{n}m": f"HuggingFaceTB/SmolLM2-{n}M-Instruct" for n in ("135", "360")},
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "palmyra-mini": "Writer/palmyra-mini",
}
TEXT_FILES = (  # what a folder may hold besides config.json and the weights; save() copies it
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt tokenizer.model chat_template.jinja generation_config.json"
).split()
INDEX = "model.safetensors.index.json"  # says which tensor is in which shard
NEEDED = ["config.json", "model.safetensors", "model-*.safetensors", INDEX, *TEXT_FILES]
SHARD_BYTES = 5 * 10**9


class UserError(Exception):
    """Something the user can mend, told in one sentence; entry points print it, no traceback."""


def check(ok, sentence: str):
    if not ok:
        raise UserError(sentence)


@contextmanager
def explain(sentence: str, *errors: type[Exception]):
    """Turns these errors into a UserError: the sentence, and the reason in brackets."""
    try:
        yield
    except errors as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{sentence} ({type(error).__name__}: {reason}).") from None


def hub_download(repo: str, patterns: list[str], repo_type: str = "model") -> Path:
    """The local folder with those files of a Hugging Face repository that match one of `patterns`.
    Shows progress, keeps complete files in a cache, which serves offline, and honours HF_ENDPOINT
    and HF_TOKEN. UserError, with what to do about it, for all that can go wrong."""
    try:
        return Path(snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))
    except Exception as error:  # its own, and those of whichever HTTP library it uses
        if isinstance(error, errors.LocalEntryNotFoundError):
            error = error.__cause__ or error  # not in the cache either: why not from the hub?
        hub, status = constants.ENDPOINT, getattr(getattr(error, "response", 0), "status_code", 0)
        kind, page = ("file", "datasets/" + repo) if repo_type == "dataset" else ("folder", repo)
        reason = getattr(error, "server_message", None) or str(error)
        if isinstance(error, errors.GatedRepoError):
            hint = f"is gated: accept its terms on https://huggingface.co/{page} and set HF_TOKEN"
        elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            hint = f"is not on {hub}: check the spelling; if it is private, set HF_TOKEN"
        elif status in (401, 403):
            hint = f"is refused by {hub}: check that HF_TOKEN is valid and may read it"
        elif isinstance(error, OSError) and error.errno:
            hint = f"cannot be kept in {constants.HF_HUB_CACHE}: check its disk, or set HF_HOME"
        else:
            hint = f"could not be fetched from {hub} and is not in the cache: check the network, "
            hint += f"HF_ENDPOINT and HF_HUB_OFFLINE, or pass a local {kind} instead"
            reason = str(error)  # names the file, too
        reason = f"{type(error).__name__}: {' '.join(reason.split())[:300].rstrip('.')}"  # one line
        raise UserError(f"the {repo_type} {repo} {hint} ({reason}).") from None


def resolve(name: str) -> Path:
    """The folder of a model: `tiny`, a short name, a folder, a run (its last step), or a hub id.
    A short name wins over a folder of that name, which ./name still reaches."""
    path = Path(name).expanduser()
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    if name.lower() in NAMES:
        return hub_download(NAMES[name.lower()], NEEDED)
    if path.is_dir():
        steps = [p for p in path.iterdir() if re.fullmatch(r"step-\d+", p.name)]
        return max(steps, key=lambda p: int(p.name[5:]), default=path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir():
        return hub_download(name, NEEDED)
    known = ", ".join(["tiny", *NAMES])
    raise UserError(f"there is no model '{name}'; known are {known}, hub ids, folders and runs.")


def read_json(path: Path, optional: bool = False) -> dict:
    """The JSON object in a file ({} if an optional one is absent); UserError for anything else."""
    if optional and not path.is_file():
        return {}
    with explain(f"{path} is missing or damaged; fetch it", OSError, ValueError, RecursionError):
        data = json.loads(path.read_text(encoding="utf-8"))
    check(isinstance(data, dict), f"{path} should hold a JSON object, not {type(data).__name__}.")
    return data


FAMILIES = {  # model_type of config.json -> what sets it apart; SmolLM2 is a llama
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "sliding_window": None},  # null, or not in use
    "qwen3": {"qk_norm": True, "sliding_window": None},
    "phi3": {"fused": True},
}
KNOWN = {  # key of config.json -> what this code does; None: absent, null, false or empty
    "model_type": [*FAMILIES],
    "rope_type": ["default", "llama3", "longrope"],
    "hidden_act": ["silu", None],
    "layer_types": [["full_attention"], None],
    "partial_rotary_factor": [1, None],
    **dict.fromkeys(["num_experts", "num_local_experts", "quantization_config"], [None]),
    **dict.fromkeys(["mlp_bias", "attention_bias"], [None]),  # on o as well; Qwen2 has its own
    **dict.fromkeys(["use_sliding_window", "full_attention"], [None]),  # the latter: several ropes
}


@dataclass
class ModelConfig:
    """What the decoder needs to know of config.json, under the names that it has there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope: dict  # rope_type and its numbers
    source: dict  # config.json itself, for save()
    sliding_window: int | None = None  # all tokens see all before them: no context goes beyond this
    tie_word_embeddings: bool = False  # the head is the embedding
    attention_bias: bool = False  # a bias on q, k and v, none on o
    qk_norm: bool = False  # RMSNorm on each head's query and key
    fused: bool = False  # qkv_proj and gate_up_proj, as in Phi-3

    @classmethod
    def from_dict(cls, source: dict, where: str = "config.json") -> "ModelConfig":
        """Reads the older form (rope_theta, rope_scaling) and the newer one (rope_parameters).
        UserError, by name, for whatever the config asks for and the decoder does not do."""
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
        flat = {"num_key_value_heads": source.get("num_attention_heads"), "rope_theta": 10000.0}
        flat |= {**source, **rope}  # the numbers of rope may stand within it or beside it
        flat["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        flat["layer_types"] = sorted(set(source.get("layer_types") or []))
        for key, known in KNOWN.items():
            value = flat.get(key) or None
            check(value in known, f"{where} has {key} = {value!r:.80}, this code does {known}.")
        for f in fields(cls)[:10]:
            if f.name == "head_dim" and not flat.get("head_dim"):
                flat["head_dim"] = flat["hidden_size"] // flat["num_attention_heads"]
            value, kind = flat.get(f.name), f.type
            fits = type(value) in (int, kind) and value > 0
            check(fits, f"{where}: {f.name} should be a positive {kind.__name__}, not {value!r}.")
        heads, shared = flat["num_attention_heads"], flat["num_key_value_heads"]
        check(heads % shared == 0, f"{where}: {heads} heads cannot share {shared} key heads.")
        flat |= {**FAMILIES[flat["model_type"]], "rope": {**flat}, "source": source}
        config = cls(**{f.name: flat[f.name] for f in fields(cls) if f.name in flat})
        with explain(f"{where} lacks what its rope needs", KeyError, TypeError, RuntimeError):
            rope_tables(config, 1)
        return config


def rope_tables(config: ModelConfig, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (n, D) float32 for positions 0..n-1. The two halves of D are alike, but that the
    first of sin is negated, as `rotate` wants it.
    llama3 divides the slow frequencies by `factor`, keeps the fast ones, and blends in between.
    longrope (arXiv 2402.13753) divides each by a factor of its own, and scales both tables."""
    D, rope, slower, scale = config.head_dim, config.rope, 1.0, 1.0
    if rope["rope_type"] == "longrope":
        old = rope["original_max_position_embeddings"]
        slower = torch.tensor([rope["short_factor"], rope["long_factor"]])[int(n > old)]  # (D/2,)
        stretch = max(1, rope.get("factor") or config.max_position_embeddings / old)
        scale = rope.get("attention_factor") or math.sqrt(1 + math.log(stretch) / math.log(old))
    frequencies = 1 / (slower * config.rope_theta ** (torch.arange(0, D, 2).float() / D))  # (D/2,)
    if rope["rope_type"] == "llama3":
        old = rope["original_max_position_embeddings"]
        turns = old * frequencies / (2 * math.pi)  # (D/2,) rotations within the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,) 1: keep, 0: divide
        frequencies = fast * frequencies + (1 - fast) * frequencies / rope["factor"]
    angles = torch.arange(n).float()[:, None] * torch.cat((frequencies, frequencies))  # (n, D)
    sign = (torch.arange(D) >= D // 2) * 2 - 1  # (D,) -1 and 1
    return angles.cos() * scale, angles.sin() * sign * scale


def attention(layer: int, q, k, v, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Attention within each row: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D). A query
    sees itself and what is before it, or where `bias` is 0, not -inf: (B or 1, 1, H / KV * T, S),
    once for each of the heads that share a key head. enable_gqa is not used: it falls to a slow
    path for some devices and dtypes."""
    (B, H, T, D), KV = q.shape, k.shape[1]
    if bias is None:  # the kernels for this skip what is not seen
        k, v = k.repeat_interleave(H // KV, dim=1), v.repeat_interleave(H // KV, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Nothing is repeated: the heads that share a key head, neighbours, are more queries of it.
    return F.scaled_dot_product_attention(q.reshape(B, KV, -1, D), k, v, bias).view(B, H, T, D)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rope, computed in float32: x (B, heads, T, D), cos and sin (B, 1, T, D) -> as x."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def product(x: torch.Tensor, *layers: nn.Module, silu=False, times=None) -> torch.Tensor:
    """What linear layers that read the same x (..., C) give, side by side: (..., sum of widths);
    silu of it, or `times` another tensor, in the same pass.

    When sampling on a CPU (known by inference mode), oneDNN multiplies with one copy of the weights
    in the blocked layout that it wants. A plain weight is laid out anew at each call: at the few
    rows of a decoding step that is a third of the time. The copy is renewed when a weight changed.
    """
    weights, biases = [y.weight for y in layers], [getattr(y, "bias", None) for y in layers]
    sampling = torch.is_inference_mode_enabled() and torch.backends.mkldnn.is_available()
    if not sampling or x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16):
        parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        y = F.silu(y) if silu else y
        return y if times is None else y * times
    key = [(weight.data_ptr(), weight._version) for weight in weights]
    packed_for, weight, bias = getattr(layers[0], "packed", (None, None, None))
    if packed_for != key:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
        bias = None if biases[0] is None else torch.cat(biases)
        layers[0].packed = key, weight, bias
    if times is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, times, weight, bias, "mul")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.heads = layer, D, (H, KV, KV)
        if config.fused:
            self.qkv_proj = nn.Linear(C, (H + 2 * KV) * D, bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, n * D, bias) for n in self.heads)
        self.inputs = ["qkv_proj"] if config.fused else ["q_proj", "k_proj", "v_proj"]
        self.o_proj = nn.Linear(H * D, C, bias=False)
        norm = partial(nn.RMSNorm, D, eps=config.rms_norm_eps) if config.qk_norm else lambda: None
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, cos, sin, attend):
        qkv = product(x, *(getattr(self, name) for name in self.inputs))  # (B, T, (H + 2 KV) D)
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 KV, T, D)
        qk, v = qkv.tensor_split((sum(self.heads[:2]),), dim=1)
        if self.q_norm:
            q, k = qk.split(self.heads[:2], dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split(self.heads[:2], dim=1)  # (B, H, T, D), (B, KV, T, D)
        out = attend(self.layer, q, k, v)  # (B, H, T, D)
        return product(out.transpose(1, 2).flatten(2), self.o_proj)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, inner, self.fused = config.hidden_size, config.intermediate_size, config.fused
        if self.fused:
            self.gate_up_proj = nn.Linear(C, 2 * inner, bias=False)
        else:
            self.gate_proj, self.up_proj = (nn.Linear(C, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        if self.fused:
            gate, up = product(x, self.gate_up_proj).chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = product(x, self.up_proj, times=product(x, self.gate_proj, silu=True))
        return product(y, self.down_proj)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Ids to hidden states; `logits` is apart, because few positions need the head. Norms compute
    in float32 (nn.RMSNorm does so for every dtype), and so do rope and head."""

    def __init__(self, config: ModelConfig, context: int | None = None):
        super().__init__()
        V, C = config.vocab_size, config.hidden_size
        self.config = config
        self.checkpointing = False  # True: recompute layers in the backward pass, for less memory
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, V, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.set_context(context)

    def set_context(self, n: int | None = None) -> None:
        """Rope tables for positions 0..n-1 on the weights' device; None: as many as the tasks need.
        n also chooses longrope's factors: once a run, so that cached keys and training agree.
        UserError if the model does not reach that far."""
        most = min(self.config.max_position_embeddings, self.config.sliding_window or math.inf)
        n = n or min(4096, most)
        check(n <= most, f"a context of {n} is beyond the {most} that its config.json allows.")
        # Plain attributes: as buffers they would follow the weights' dtype, too coarse for angles.
        device = self.model.embed_tokens.weight.device
        self.cos, self.sin = (table.to(device) for table in rope_tables(self.config, n))  # (n, D)
        self.context = n

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend=attention) -> torch.Tensor:
        """ids and positions (B, T) int64, positions < context -> hidden (B, T, C), normalised.
        attend(layer, q, k, v): q (B, H, T, D), k and v (B, KV, T, D), after rope -> as q."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, D)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    @property
    def head(self) -> nn.Module:
        return self.lm_head or self.model.embed_tokens

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> (..., V) float32, computed in float32: bfloat16 logits are coarse. The
        exception is sampling in bfloat16 on a CPU, where such a product would cost as much as ten
        layers: there, as in serving engines, they are bfloat16, and that is what is drawn from."""
        weight = self.head.weight
        if torch.is_inference_mode_enabled() and not hidden.is_cuda:
            return product(hidden, self.head)
        if torch.is_grad_enabled() or not hidden.is_cuda or weight.dtype != torch.bfloat16:
            return F.linear(hidden.float(), weight.float())
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # no float32 copy of the head


def load(name: str, device="cpu", dtype=torch.float32, context=None) -> tuple[Decoder, "Chat"]:
    """A model by name (see `resolve`), for that many tokens (see `set_context`). What can be
    refused (UserError) is refused before the weights are read."""
    no_gpu = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    check(not no_gpu, "cuda is asked for, but PyTorch finds no GPU; take --device cpu.")
    folder = resolve(name)
    config = ModelConfig.from_dict(read_json(folder / "config.json"), f"{folder}/config.json")
    chat = Chat(folder)
    ids, V = 1 + max(chat.tokenizer.get_vocab().values(), default=0), config.vocab_size
    check(ids <= V, f"the tokenizer in {folder} has {ids} ids, but its model has {V}; fetch both.")
    with torch.device("meta"):
        model = Decoder(config, context).to(dtype)
    read_weights(model, folder, device)
    model.set_context(model.context)
    return model, chat


def read_weights(model: Decoder, folder: Path, device) -> None:
    """Fills a decoder on the meta device from safetensors, one file or shards by the index: each
    tensor straight to its device and dtype. UserError for damage, and for tensors that are missing,
    unknown or misshapen: these are named before any is read."""
    where = read_json(folder / INDEX, optional=True).get("weight_map", {})  # tensor -> file
    weights = model.state_dict()
    wanted = {f"{name} float {list(tensor.shape)}" for name, tensor in weights.items()}
    found, holder = set(), {}  # the like of `wanted`; tensor -> the open file that holds it
    hint = f"safetensors in {folder} are missing or damaged (no pickle is read); fetch them again"
    with explain(hint, SafetensorError, OSError):
        for path in sorted(set(where.values())) or ["model.safetensors"]:
            file = safe_open(folder / path, framework="pt")
            for name in file.keys():
                # Tables of older files, and a tied head that is in the file all the same.
                extra = name.endswith(("rotary_emb.inv_freq", "lm_head.weight"))
                if where.get(name, path) == path and (name in weights or not extra):
                    piece, holder[name] = file.get_slice(name), file
                    kind = re.sub(r"^(F32|F16|BF16)$", "float", piece.get_dtype())
                    found.add(f"{name} {kind} {piece.get_shape()}")
        lacks, more = (sorted(s)[:5] or "nothing" for s in (wanted - found, found - wanted))
        check(wanted == found, f"{folder} misfits its config.json: it lacks {lacks}, has {more}.")
        model.to_empty(device=device)
        for name, parameter in model.state_dict().items():
            parameter.copy_(holder[name].get_tensor(name))


def save(model: Decoder, chat: "Chat", folder: Path | str, dtype: torch.dtype | None = None):
    """Writes a Hugging Face folder, which must not exist yet; dtype None keeps the model's own.
    UserError if it cannot be written; the caller removes what was begun."""
    folder, dtype = Path(folder), dtype or model.model.embed_tokens.weight.dtype
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = {**model.config.source}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("auto_map", None)  # names Python files of the source, neither copied nor needed
    with explain(f"the model cannot be written to {folder}", OSError, SafetensorError):
        folder.mkdir(parents=True)
        for name, content in chat.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES)


JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(  # with what the ecosystem lets templates use
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
JINJA.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own is for HTML
JINJA.globals["raise_exception"] = lambda why: check(False, f"the chat template refuses: {why}.")
# Llama 3 writes the date into its prompt: one day for all runs, or none could be repeated.
JINJA.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime


class Chat:
    """A model's tokenizer and chat template. A conversation only grows, by ids: `prompt` begins it,
    `glue` joins a sampled turn to the next. What was sampled is never decoded and encoded again.
    stop_ids: every id that ends a turn. native_tools: the template itself can show tools."""

    def __init__(self, folder: Path):
        paths = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
        self.files = {path.name: path.read_bytes() for path in paths}  # folder may go before save()
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        words = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items()}
        self.words = {k: v for k, v in words.items() if k.endswith("_token") and type(v) is str}
        text = settings.get("chat_template")
        if "chat_template.jinja" in self.files:
            text = self.files["chat_template.jinja"].decode("utf-8", "replace")
        if isinstance(text, list):  # several, by name
            text = {entry["name"]: entry["template"] for entry in text}.get("default")
        check(text, f"{folder} has no chat template; take a model that was made for chat.")
        # {% generation %} marks the assistant's words and prints nothing: to jinja2, a comment.
        text = re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", text)
        hint = f"tokenizer.json or the chat template in {folder} is missing or damaged; fetch both"
        with explain(hint, Exception):  # tokenizers raises nothing narrower
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.template = JINJA.from_string(text)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.native_tools = "tools" in text

        self.end_of_turn = None  # so it stays if the template ends turns with plain words
        added, glue = self.tokenizer.get_added_tokens_decoder(), self.glue("x", last_id=-1)
        first = next((i for i in glue if i in added or self.decode([i]).strip()), None)  # no blanks
        self.end_of_turn = first if first in added else None
        stops = {self.end_of_turn, self.tokenizer.token_to_id(self.words.get("eos_token", ""))}
        for name in ("config.json", "generation_config.json"):
            ids = read_json(folder / name, optional=True).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        self.stop_ids = frozenset(stops - {None})

    def encode(self, text: str) -> list[int]:
        """Special tokens that are written in the text count as such; none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Ids of messages ({"role", "content"}) and tools (JSON schemas), and the next header."""
        return self.encode(self._render(messages, tools))

    def glue(self, instruction: str, last_id: int) -> list[int]:
        """Ids between a sampled turn, whose last id is given, and the next: the end of turn (unless
        the turn sampled it itself), the user's instruction, the header of the answer."""
        answer = "SAMPLED-TURN"  # what the template writes behind it is the glue
        turns = [("user", "x"), ("assistant", answer), ("user", instruction)]
        text = self._render([{"role": role, "content": content} for role, content in turns])
        check(answer in text, "the chat template drops earlier answers; take another model.")
        ids = self.encode(text.partition(answer)[2])
        return ids[ids.index(last_id) + 1 :] if last_id == self.end_of_turn else ids

    def _render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        # Qwen3 answers at once: here reflecting is a turn of its own.
        options = {"add_generation_prompt": True, "enable_thinking": False, **self.words}
        with explain("the chat template refuses these messages", jinja2.TemplateError):
            return self.template.render(messages=messages, tools=tools, **options)
