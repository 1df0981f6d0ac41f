"""Here because others write function calling in other forms; this makes ours of them.

    python -m extras.convert FILE OUT.jsonl     (--data does the same by itself)

xLAM-60k has {query, tools, answers}, the latter two as JSON text, and {name: schema} with
Python's types for parameters. The Berkeley leaderboard has {id, question, function}, and
a file of the same name in possible_answer/. Rows that ours cannot express are left out.
"""

import json
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from config import plain_errors
from model import UserError, check, explain
from tasks import load_rows, without_surrogates
from tasks.function_calling import first_choice, judge, same

JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
JSON_TYPES |= {"dict": "object", "list": "array", "tuple": "array", "set": "array"}
JSON_TYPES |= {"nonetype": "null"} | {kind: kind for kind in [*JSON_TYPES.values(), "null"]}
NO_TYPES = ("optional", "required", "union", "typing", "none")


def convert(data: str, rows: list[dict]) -> list[dict]:
    """The rows of load_rows(data) as problems in our form. UserError for another form."""
    truths = {}
    if any("function" in row for row in rows):
        beside = re.sub(r"[^/:]+$", r"possible_answer/\g<0>", data)
        truths = {str(t.get("id")): t.get("ground_truth") for t in load_rows(beside)}
    problems, left_out = [], Counter()
    for number, row in enumerate(rows, 1):
        with explain(f"{data}, row {number} is not ours, xLAM's or Berkeley's", Exception):
            try:
                problems.append(problem_of(row, truths))
            except UserError as reason:
                left_out[str(reason)] += 1
    if left_out:
        print(f"{data}: {left_out.total()} of {len(rows)} rows left out: {dict(left_out)}.")
    check(problems, f"{data} holds no usable problem.")
    return problems


def problem_of(row: dict, truths: dict) -> dict:
    """One row in our form. UserError: it is left out. Other errors: it is damaged."""
    calls, answers = [], []
    if "query" in row:
        messages = [{"role": "user", "content": row["query"]}]
        functions = read_json(row["tools"])
        for call in read_json(row["answers"] or "[]"):
            calls.append((call["name"], one_choice(call["arguments"])))
    else:
        (messages,) = row["question"]  # one turn
        functions = read_json(row["function"])
        for call in truths[str(row["id"])]:
            calls += call.items()
    tools = [tool_of(function) for function in functions]
    names = [tool["function"]["name"] for tool in tools]
    on_offer = [names.count(name) == 1 for name, _ in calls]
    check(calls and all(on_offer), "it wants no call, or not of one tool on offer")
    for name, arguments in calls:
        schema = tools[names.index(name)]["function"]["parameters"]
        answers.append({"name": name, "arguments": obeying(arguments, schema)})
    request = " ".join(message["content"] for message in messages)
    key = " ".join(request.lower().split())
    problem = {"key": key, "messages": messages, "tools": tools, "answers": answers}
    calls = [call | {"arguments": first_choice(call["arguments"])} for call in answers]
    check(judge(problem, calls).ok, "its own answer does not pass")
    return problem


def obeying(arguments: dict, schema: dict) -> dict:
    """The accepted values of a call's parameters, or of an object's keys, that the schema
    allows; "" among them: it may be left out. Raises UserError."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    read = {}
    for name, accepted in arguments.items():
        if name not in properties:
            check("" in accepted, "it wants a parameter that the tool lacks")
            continue
        present, kept = [value for value in accepted if value not in ("", None)], []
        for value in present:
            with suppress(ValueError):
                kept.append(conform(value, properties[name]))
        check(kept or not present, "its answer breaks its tool's schema")
        may_be_left_out = not present or ("" in accepted and name not in required)
        read[name] = kept + [""] * may_be_left_out
    return read


def conform(value, spec: dict):
    """A wanted value in a type of its schema, if that is exact: "5" is 5. ValueError where
    it breaks the schema. An object's keys have lists of values."""
    kinds = spec.get("type") or JSON_TYPES.values()
    if isinstance(value, str) and "string" not in kinds:
        value = json.loads(value.lower() if "boolean" in kinds else value)
    elif type(value) is int and kinds == "string":
        value = str(value)
    found = JSON_TYPES[type(value).__name__.lower()]
    if found not in kinds and not (found == "integer" and "number" in kinds):
        raise ValueError(f"{value!r:.60} is no {kinds}")
    if "enum" in spec and not any(same(choice, value, spec) for choice in spec["enum"]):
        raise ValueError(f"{value!r:.60} is not in the enum")
    if isinstance(value, list):
        return [conform(item, spec.get("items", {})) for item in value]
    if isinstance(value, dict) and "properties" in spec:
        return obeying(value, spec)
    return value


def one_choice(value):
    """A plain value in our form: each key of an object gets a list of one value."""
    if isinstance(value, dict):
        return {key: [one_choice(item)] for key, item in value.items()}
    return [one_choice(item) for item in value] if isinstance(value, list) else value


def read_json(value):
    """Without the nulls that Arrow and parquet write for keys that only other rows have."""
    text = value if isinstance(value, str) else json.dumps(value)
    rows = json.loads(
        text, object_pairs_hook=lambda row: {k: v for k, v in row if v is not None}
    )
    return without_surrogates(rows)


def tool_of(function: dict) -> dict:
    """A tool as the model sees it. Its parameters may be xLAM's {name: schema}, optional
    by a default, or by a type "int, optional" or "Optional[int]"."""
    function = function.get("function", function)
    schema = function.get("parameters") or {}
    if not isinstance(schema.get("type"), str):
        required = []
        for name, spec in schema.items():
            told = re.search("optional|default|none", str(spec.get("type", "")).lower())
            if not told and "default" not in spec and spec.get("required") is not False:
                required.append(name)
        schema = {"type": "dict", "properties": schema, "required": required}
    return {"type": "function", "function": function | {"parameters": schema_of(schema)}}


def schema_of(spec: dict) -> dict:
    """A JSON schema for one that may have Python's types, and a default as text."""
    schema = dict(spec)
    kind = schema.pop("type", "any")
    if isinstance(kind, list):
        schema["type"] = [JSON_TYPES.get(name.lower(), name) for name in kind]
    else:
        words = re.findall(r"\w+", str(kind).lower().partition("default")[0])
        schema = type_of([word for word in words if word not in NO_TYPES]) | schema
    if "default" in schema:
        with suppress(ValueError):
            schema["default"] = conform(schema["default"], {"type": schema.get("type")})
    if not isinstance(schema.get("required", []), list):
        del schema["required"]  # xLAM's kind may say true in a parameter
    if "items" in schema:
        schema["items"] = schema_of(schema["items"])
    if "properties" in schema:
        specs = schema["properties"].items()
        schema["properties"] = {name: schema_of(inner) for name, inner in specs}
    return schema


def type_of(words: list[str]) -> dict:
    """A schema for the words of a type: of List[float] {"type": "array", "items": {"type":
    "number"}}, of Union[int, str] {"type": ["integer", "string"]}, of Any, like all, {}."""
    kinds = list(dict.fromkeys(map(JSON_TYPES.get, words))) or [None]
    if kinds[0] == "array":
        return {"type": "array"} | ({"items": type_of(words[1:])} if words[1:] else {})
    if kinds[0] == "object":
        return {"type": "object"}
    return {} if None in kinds else {"type": kinds[0] if len(kinds) == 1 else kinds}


if __name__ == "__main__":
    with plain_errors("convert"):
        check(len(sys.argv) == 3, "usage: python -m extras.convert FILE OUT.jsonl")
        problems = convert(sys.argv[1], load_rows(sys.argv[1]))
        lines = [json.dumps(problem) + "\n" for problem in problems]
        Path(sys.argv[2]).write_text("".join(lines), encoding="utf-8")
