"""Breaks the program on purpose, one line at a time, and says which test notices.

    python tests/mutate.py

Each change is made in a copy of the repository, where the tests of the loss, the sampler, the
model, training and the golden logits run until one fails. Exit 1 if any change goes unnoticed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("loss", "sampler", "golden", "model", "train")]
MUTATIONS = [  # what is broken, where, the words there, and what they become
    (
        "the mask is shifted by one",
        "rrr.py",
        "list(range(P, P + n)), ids, mask]",
        "list(range(P, P + n)), ids, [False, *mask[:-1]]]",
    ),
    (
        "the stop token is not trained",
        "rrr.py",
        "+ [i in trained] * len(turn.ids)",
        "+ [i in trained] * (len(turn.ids) - 1) + [False]",
    ),
    (
        "a reflection sees the padding of a short prefix",
        "rrr.py",
        "prefix = (place[:P] < counts[:, :1])",
        "prefix = (place[:P] < P).expand(N, P)",
    ),
    (
        "a reflection sees its own future",
        "rrr.py",
        "own = (place[:R] <= place[:R, None])",
        "own = (place[:R] <= place[:R, None] + R)",
    ),
    (
        "each micro-batch has its own denominator",
        "rrr.py",
        "per_sequence.get(loss_norm, total)",
        "per_sequence.get(loss_norm, sum(sum(row[3]) for row in group))",
    ),
    (
        "the loss forgets the temperature",
        "rrr.py",
        "head(some).div_(temperature)",
        "head(some)",
    ),
    (
        "the loss's gradient forgets the temperature",
        "rrr.py",
        "grad[:, None] / ctx.temperature",
        "grad[:, None]",
    ),
    (
        "the sampler forgets the temperature",
        "sampler.py",
        "logits = logits / temperature",
        "logits = logits / 1.0",
    ),
    (
        "the clip is on the wrong side",
        "rrr.py",
        "-torch.min(ratio * advantages",
        "-torch.max(ratio * advantages",
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
        "F.linear(x, weight, bias) for weight",
        "F.linear(x, weight) for weight",
    ),
    (
        "Llama 3's rope scaling is ignored",
        "model.py",
        'if rope["rope_type"] == "llama3":',
        'if rope["rope_type"] == "no such":',
    ),
    (
        "longrope always takes its short factors",
        "model.py",
        "[int(n > old)]",
        "[0]",
    ),
    (
        "a fork shares its parent's keys",
        "sampler.py",
        "new.keys = [keys[index] for keys in self.keys]",
        "new.keys = [keys if len(keys) == len(slots) else keys[index] for keys in self.keys]",
    ),
    (
        "compaction forgets to move the values",
        "sampler.py",
        "for tensor in turn + self.cache.tensors():",
        "for tensor in turn + self.cache.tensors()[:-1]:",
    ),
    (
        "sampling goes on with weights from before the update",
        "model.py",
        "if packed_for != key:",
        "if packed_for is None:",
    ),
    (
        "the blocked copy forgets the biases",
        "model.py",
        "bias = None if biases[0] is None else torch.cat(biases)",
        "bias = None",
    ),
    (
        "what the graphs wrote stays on their desk",
        "sampler.py",
        "self.cache.copy_(desk.cache)",
        "pass",
    ),
    (
        "bfloat16 weights are their own masters",
        "train.py",
        "[p.detach().to(d, torch.float32) for p, d in zip(self.parameters, where)]",
        "[p.detach().to(d) for p, d in zip(self.parameters, where)]",
    ),
]


def main():
    unnoticed = 0
    for what, file, old, new in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "*cache*"))
            source = (copy / file).read_text()
            if source.count(old) != 1:
                sys.exit(f"'{what}': {file} has {source.count(old)} times, not once: {old}")
            (copy / file).write_text(source.replace(old, new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", *TESTS]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        noticed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
        unnoticed += not noticed
        print(f"{what:45} {noticed[1] if noticed else 'NO TEST NOTICED'}", flush=True)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
