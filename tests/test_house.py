"""What the README says of the files, and who may import whom."""

import ast
import os
import re
import sys

import pytest
from conftest import ROOT

MAY_IMPORT = {  # file -> the files of ours that it may know
    "model.py": set(),
    "tasks/__init__.py": {"model"},
    "tasks/countdown.py": {"model", "tasks"},
    "tasks/function_calling.py": {"model", "tasks"},
    "sampler.py": {"model"},
    "rrr.py": {"model", "sampler"},
    "eval.py": {"model", "rrr", "tasks"},
    "train.py": {"eval", "model", "rrr"},
    "tiny/make_tiny.py": {"model", "tasks"},
}
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "huggingface_hub", "jinja2"}
PACKAGES |= {"pyarrow"}  # only if a parquet file is asked for
in_ci = pytest.mark.skipif("CI" not in os.environ, reason="CI counts lines; a fork may grow")


def count(file):
    """(lines, lines of code): the rest is docstrings, comments and blank lines."""
    text = (ROOT / file).read_text()
    lines, words = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0]
            if isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                words |= set(range(first.lineno, first.end_lineno + 1))
    code = [
        i
        for i, line in enumerate(lines, 1)
        if line.strip() and not line.strip().startswith("#") and i not in words
    ]
    return len(lines), len(code)


@in_ci
def test_the_readme_tells_the_true_line_counts():
    """Prevents: a table that lost its truth, and a file that nobody lists."""
    found = re.findall(
        r"^\| `(\S+\.py)` \| (\d+) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M
    )
    told = {file: (int(lines), int(code)) for file, lines, code in found}
    files = [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("tiny/*.py")]
    true = {path.relative_to(ROOT).as_posix(): count(path) for path in files}
    assert told == true
    together = re.search(
        r"^\| together \| (\d+) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert [int(n) for n in together.groups()] == [sum(n) for n in zip(*true.values())]


@in_ci
def test_about_two_thousand_lines_of_code():
    """The budget. Whoever adds a feature finds what can go."""
    assert sum(count(file)[1] for file in MAY_IMPORT) <= 2230


@pytest.mark.parametrize("file", MAY_IMPORT)
def test_no_import_runs_upward_and_no_package_is_new(file):
    """Prevents: a circle, a witness (transformers, trl) that the program needs."""
    tree = ast.parse((ROOT / file).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert names <= MAY_IMPORT[file] | PACKAGES


@pytest.mark.parametrize("file", MAY_IMPORT)
def test_a_line_has_at_most_100_columns(file):
    assert max(map(len, (ROOT / file).read_text().splitlines())) <= 100
