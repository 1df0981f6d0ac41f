"""Breaks the program on purpose, one line at a time, and says which test notices.

    python tests/mutate.py

Each change is made in a copy of the repository, where the tests of the loss, the
sampler, the model, the road on a GPU, training and the golden logits run until one fails.
Exit 1 if any change goes unnoticed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("loss", "sampler", "golden", "model", "fast_cpu", "gpu_road", "train")
TESTS = [f"tests/test_{name}.py" for name in NAMES]
MUTATIONS = [  # what is broken, where, the words there, and what they become
    (
        "the mask is shifted by one",
        "rrr.py",
        "mask, logps = mask[P + 1 :], logps[P + 1 :]",
        "mask, logps = mask[P:-1], logps[P + 1 :]",
    ),
    (
        "the stop token is not trained",
        "rrr.py",
        "mask += [i in trained_turns] * len(turn.ids)",
        "mask += [i in trained_turns] * (len(turn.ids) - 1) + [False]",
    ),
    (
        "a reflection sees its sibling",
        "rrr.py",
        "(key == 0) | (key == query)",
        "(key == 0) | (key <= query)",
    ),
    (
        "a reflection sees its own future",
        "rrr.py",
        "return ((key == 0) | (key == query)) & causal",
        "return (key == 0) | (key == query)",
    ),
    (
        "each micro-batch has its own denominator",
        "rrr.py",
        "make_row(group, tokens, len(kept), config)",
        "make_row(group, sum(len(e.reflection.ids) for e in group), len(group), config)",
    ),
    (
        "the loss forgets the temperature",
        "rrr.py",
        "logits = model.logits(hidden) / temperature",
        "logits = model.logits(hidden)",
    ),
    (
        "the recomputed head forgets the temperature",
        "rrr.py",
        "model.logits(hidden) / temperature",
        "model.logits(hidden) / (1 if torch._C._current_graph_task_id() >= 0 "
        "else temperature)",
    ),
    (
        "the sampler forgets the temperature",
        "sampler.py",
        "logits.float() / (temperature or 1.0)",
        "logits.float() / 1.0",
    ),
    (
        "the clip is on the wrong side",
        "rrr.py",
        "-torch.min(ratio * A",
        "-torch.max(ratio * A",
    ),
    (
        "the KL estimate is the wrong way round",
        "rrr.py",
        "torch.exp(ref_logps - logps) - (ref_logps - logps) - 1",
        "torch.exp(logps - ref_logps) - (logps - ref_logps) - 1",
    ),
    (
        "a bias is dropped",
        "model.py",
        "self.v_proj = nn.Linear(C, KV * D, bias)",
        "self.v_proj = nn.Linear(C, KV * D, bias=False)",
    ),
    (
        "Llama 3's rope scaling is ignored",
        "model.py",
        'if config.rope_type == "llama3":',
        'if config.rope_type == "no such":',
    ),
    (
        "longrope always takes its short factors",
        "model.py",
        "config.long_factor if n > original else config.short_factor",
        "config.short_factor",
    ),
    (
        "a fork shares its parent's keys",
        "sampler.py",
        "new.keys = [k[index] for k in self.keys]",
        "new.keys = [k if len(k) == len(rows) else k[index] for k in self.keys]",
    ),
    (
        "compaction forgets to move the values",
        "sampler.py",
        "for tensor in turn + kept:",
        "for tensor in turn + kept[:-1]:",
    ),
    (
        "sampling goes on with weights from before the update",
        "extras/fast_cpu.py",
        "if packed_from != source:",
        "if packed_from is None:",
    ),
    (
        "the packed copy forgets the biases",
        "extras/fast_cpu.py",
        "(x, packed, self.bias,",
        "(x, packed, None,",
    ),
    (
        "what the graphs wrote stays in the shared state",
        "extras/cuda_graphs.py",
        "copy_rows(self.cache, self.source)",
        "pass",
    ),
    (
        "a recorded step waits for the GPU",
        "sampler.py",
        "        self.t += 1",
        "        self.t += 1 if self.alive[:n].any() else 1",
    ),
    (
        "a recorded step replaces a tensor",
        "sampler.py",
        "        self.t += 1",
        "        self.t = self.t + 1",
    ),
    (
        "each graph has a pool of its own",
        "extras/cuda_graphs.py",
        "record(partial(super().step, n, S), self.pool)",
        "record(partial(super().step, n, S), None)",
    ),
    (
        "bfloat16 weights are their own masters",
        "train.py",
        "nn.Parameter(p.detach().to(device, torch.float32))",
        "nn.Parameter(p.detach().to(device))",
    ),
]


def main():
    unnoticed = 0
    for what, file, old, new in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            ignore = shutil.ignore_patterns(".git", "runs", "*cache*")
            shutil.copytree(ROOT, copy, ignore=ignore)
            source = (copy / file).read_text()
            if source.count(old) != 1:
                sys.exit(f"'{what}': {file} has {source.count(old)} times, not once: {old}")
            (copy / file).write_text(source.replace(old, new))
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "--tb=no",
                "-rfE",
                *TESTS,
            ]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
        noticed = failed if result.returncode == 1 else None  # not: pytest itself failed
        unnoticed += not noticed
        print(f"{what:52} {noticed[1] if noticed else 'NO TEST NOTICED'}", flush=True)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
