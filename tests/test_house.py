"""What the README says of the files, how much there may be, and who may import whom."""

import ast
import io
import os
import re
import statistics
import sys
import tokenize

import pytest
from conftest import ROOT
from mutate import MUTATIONS

MAY_IMPORT = {  # a file of the road -> the files of ours that it may know
    "model.py": set(),
    "tasks/__init__.py": {"model"},
    "tasks/countdown.py": {"model", "tasks"},
    "tasks/function_calling.py": {"model", "tasks"},
    "config.py": {"model", "rrr", "tasks"},
    "sampler.py": {"model"},
    "rrr.py": {"model", "sampler"},
    "eval.py": {"config", "model", "rrr"},
    "train.py": {"config", "eval", "model", "rrr"},
}
OURS = {path.split("/")[0].removesuffix(".py") for path in MAY_IMPORT}
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm"}
PACKAGES |= {"huggingface_hub", "jinja2", "filelock"}  # which come along with those
LAZY = {"extras", "pyarrow"}  # only where they are asked for, inside a function
in_ci = pytest.mark.skipif("CI" not in os.environ, reason="CI counts; a fork may grow")


def files(*patterns):
    paths = [path.relative_to(ROOT) for some in patterns for path in ROOT.glob(some)]
    return sorted(path.as_posix() for path in paths)


EXTRAS = files("extras/*.py")
ROAD = files("*.py", "*/*.py")  # all Python that is not beside it
ROAD = [f for f in ROAD if not f.startswith(("extras/", "tests/", "tiny/"))]
README = (ROOT / "README.md").read_text()


# ---- how much there is ----

COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)


class Count:
    """Of one file. Words are lines of docstrings, and those that only hold a comment; code
    is what remains without the blank ones; `widths` are those of code lines that say
    something (no imports, no lines of brackets alone), without their indent."""

    def __init__(self, file):
        text = (ROOT / file).read_text()
        nodes, lines = list(ast.walk(ast.parse(text))), text.splitlines()
        self.lines = len(lines)
        blank = {i for i, line in enumerate(lines, 1) if not line.strip()}
        words, imports = self.docstrings(nodes), set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row, column = token.start
            if token.type == tokenize.COMMENT and not lines[row - 1][:column].strip():
                words.add(row)
        self.words = len(words - blank)
        self.functions, self.nested = [], 0
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports |= span(node)
            if isinstance(node, ast.FunctionDef):
                self.functions.append((len(span(node)), f"{file}: {node.name}"))
            if isinstance(node, COMPREHENSIONS):
                inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
                self.nested += len(inner) > 1 or len(node.generators) > 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
                self.nested += 1
        code = set(range(1, len(lines) + 1)) - words - blank
        self.code = len(code)
        telling = [lines[i - 1].strip() for i in code - imports]
        self.widths = [len(line) for line in telling if re.search(r"\w", line)]

    @staticmethod
    def docstrings(nodes):
        rows = set()
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = node.body[0] if node.body else None
                value = getattr(getattr(first, "value", None), "value", None)
                if isinstance(first, ast.Expr) and isinstance(value, str):
                    rows |= span(first)
        return rows


def span(node):
    """The numbers of the lines that a node takes."""
    return set(range(node.lineno, node.end_lineno + 1))


SAMPLE = """'''Words,
more words.'''
import os

# words
def f(x):
    'Words.'

    return [  # not words
        a for a in zip(x, x) for b in a
    ]
y = [[1 for _ in "a"] for _ in "b"]
z = "# not words"
"""


def test_what_is_counted(tmp_path):
    """Prevents: a budget that is kept because something is not counted."""
    path = tmp_path / "x.py"
    path.write_text(SAMPLE)
    count = Count(path)
    assert (count.lines, count.code, count.words) == (13, 7, 4)
    assert count.functions == [(6, f"{path}: f")]
    assert count.nested == 3  # two `for`s, one inside another, a zip
    assert sorted(count.widths) == [9, 17, 21, 31, 35]


@in_ci
def test_the_road_keeps_to_its_budget():
    """Whoever adds a feature finds what can go: shorter by leaving out, not by packing."""
    counts = [Count(file) for file in ROAD]
    assert sum(c.lines for c in counts) <= 2450
    code, words = sum(c.code for c in counts), sum(c.words for c in counts)
    assert code <= 1800
    assert words / (words + code) >= 0.15
    assert statistics.median(width for c in counts for width in c.widths) <= 44
    assert sum(c.nested for c in counts) <= 16
    long = [f for c in counts for f in c.functions if f[0] > 50]
    assert not long


@in_ci
def test_extras_keep_to_theirs():
    lines = {file: Count(file).lines for file in EXTRAS}
    assert sum(lines.values()) <= 1300 and max(lines.values()) <= 300


@in_ci
@pytest.mark.parametrize("of", ["the road", "extras"])
def test_the_readme_tells_the_true_line_counts(of):
    """Two tables. Prevents: one that lost its truth, and a file that nobody lists."""
    told, tables = {}, []
    for line in README.splitlines():
        row = re.match(r"\| `?([\w./]+)`? \| ([\d,]+) \| ([\d,]+) \|", line)
        if row and (row[1].endswith(".py") or row[1] == "together"):
            told[row[1]] = tuple(int(n.replace(",", "")) for n in row.groups()[1:])
        if row and row[1] == "together":
            tables.append(told)
            told = {}
    assert len(tables) == 2 and not told
    counts = {f: Count(f) for f in (ROAD if of == "the road" else EXTRAS)}
    true = {file: (count.lines, count.code) for file, count in counts.items()}
    true["together"] = tuple(sum(n) for n in zip(*true.values()))
    assert tables[of == "extras"] == true


@in_ci
def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


# ---- who may import whom ----


def imports(node):
    """The first names of what a piece of a program imports, wherever it does."""
    names = []
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            names += [alias.name for alias in n.names]
        if isinstance(n, ast.ImportFrom):
            names.append(n.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


def eager(tree):
    """What importing a file imports: all but what its functions do when they are called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return imports(tree)


@in_ci
def test_every_file_of_the_road_has_its_floor():
    assert set(ROAD) == set(MAY_IMPORT)


@pytest.mark.parametrize("file", MAY_IMPORT)
def test_no_import_runs_upward_and_no_package_is_new(file):
    """Prevents: a circle, a witness (transformers, trl) that the program needs, a road that
    does not open without what stands beside it."""
    source = (ROOT / file).read_text()
    assert imports(ast.parse(source)) <= MAY_IMPORT[file] | PACKAGES | LAZY
    assert eager(ast.parse(source)) <= MAY_IMPORT[file] | PACKAGES


@pytest.mark.parametrize("file", EXTRAS)
def test_what_stands_beside_the_road_needs_no_new_package(file):
    names = imports(ast.parse((ROOT / file).read_text()))
    if file == "extras/train_trl.py":
        names -= {"datasets", "transformers", "trl"}  # the road that it is made for
    assert names <= OURS | PACKAGES | LAZY


def test_each_break_of_mutate_fits_the_code():
    """Prevents: breaks that rot, as each takes minutes to try."""
    for what, file, old, new in MUTATIONS:
        assert (ROOT / file).read_text().count(old) == 1 and new != old, what


def test_requirements_are_what_is_imported():
    """Prevents: a tool (ruff) or a witness that everybody must install."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in lines}
    assert names - {"", "pytest"} <= PACKAGES


@pytest.mark.parametrize("file", ROAD + EXTRAS)
def test_a_line_has_at_most_92_columns(file):
    lines = (ROOT / file).read_text().splitlines()
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 92]
