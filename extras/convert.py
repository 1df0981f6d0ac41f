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
from tasks.function_calling import first_choice, judge

JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
JSON_TYPES |= {"dict": "object", "list": "array", "tuple": "array", "set": "array"}
JSON_TYPES |= {kind: kind for kind in JSON_TYPES.values()}


class Unusable(UserError):
    """A row that is left out, and why."""


def convert(data: str, rows: list[dict]) -> list[dict]:
    """The rows of load_rows(data) as problems in our form. UserError for another form."""
    truths = {}
    if any("function" in row for row in rows):
        beside = re.sub(r"[^/:]+$", r"possible_answer/\g<0>", data)
        for truth in load_rows(beside):
            truths[str(truth.get("id"))] = truth.get("ground_truth")
    problems, left_out = [], Counter()
    for number, row in enumerate(rows, 1):
        wants = f"{data}, row {number} is not in our form, xLAM's or Berkeley's"
        try:
            with explain(wants, Exception):
                problems.append(problem_of(row, truths))
        except Unusable as reason:
            left_out[str(reason)] += 1
    if left_out:
        print(f"{data}: {left_out.total()} of {len(rows)} rows left out: {dict(left_out)}.")
    check(problems, f"{data} holds no usable problem.")
    return problems


def problem_of(row: dict, truths: dict) -> dict:
    """One row in our form. Raises Unusable, or what the row's damage raises."""
    answers = []
    if "query" in row:
        messages = [{"role": "user", "content": row["query"]}]
        functions = read_json(row["tools"])
        for call in read_json(row["answers"]):
            arguments = one_choice(call["arguments"])
            answers.append({"name": call["name"], "arguments": arguments})
    else:
        (messages,) = row["question"]  # one turn
        functions = read_json(row["function"])
        for call in truths[str(row["id"])]:
            ((name, arguments),) = call.items()
            answers.append({"name": name, "arguments": dict(arguments)})
    tools = [tool_of(function) for function in functions]
    names = [tool["function"]["name"] for tool in tools]
    if not answers or any(names.count(call["name"]) != 1 for call in answers):
        raise Unusable("it wants no call, or not of one tool on offer")
    for answer in answers:
        tool = tools[names.index(answer["name"])]
        clean(answer["arguments"], tool["function"]["parameters"])
    request = " ".join(message["content"] for message in messages)
    key = " ".join(request.lower().split())
    problem = {"key": key, "messages": messages, "tools": tools, "answers": answers}
    calls = [call | {"arguments": first_choice(call["arguments"])} for call in answers]
    if not judge(problem, calls).ok:
        raise Unusable("its own answer does not pass")
    return problem


def clean(arguments: dict, schema: dict) -> None:
    """Removes what the tool lacks and may be left out, and that a required one may be."""
    required = schema.get("required", [])
    if set(required) - arguments.keys():
        raise Unusable("its answer lacks a required parameter")
    for name, accepted in list(arguments.items()):
        if name in required and len(accepted) > 1:
            arguments[name] = [value for value in accepted if value != ""]
        elif name not in schema["properties"] and "" in accepted:
            del arguments[name]
        elif name not in schema["properties"]:
            raise Unusable("it wants a parameter that the tool lacks")


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
    """A tool as the model sees it. Its parameters may be xLAM's {name: schema}."""
    schema = function.get("parameters", {})
    if not isinstance(schema.get("type"), str):
        required = []
        for name, spec in schema.items():
            if "default" not in spec and "optional" not in str(spec.get("type")).lower():
                required.append(name)
        schema = {"type": "dict", "properties": schema, "required": required}
    described = {"name": function["name"], "description": function.get("description", "")}
    parameters = schema_of({"type": "dict", "properties": {}} | schema)
    return {"type": "function", "function": described | {"parameters": parameters}}


def schema_of(spec: dict) -> dict:
    """A JSON schema for one that may have Python's types."""
    schema = dict(spec)
    schema = type_of(schema.pop("type", None)) | schema
    if schema.get("type") in ("integer", "number", "boolean"):
        with suppress(KeyError, AttributeError, ValueError):
            schema["default"] = json.loads(schema["default"].lower())  # "10", "False"
    if not isinstance(schema.get("required", []), list):
        del schema["required"]  # xLAM's kind may say true in a parameter
    if "items" in schema:
        schema["items"] = schema_of(schema["items"])
    if "properties" in schema:
        specs = schema["properties"].items()
        schema["properties"] = {name: schema_of(inner) for name, inner in specs}
    return schema


def type_of(kind) -> dict:
    """ "List[float], optional" -> {"type": "array", "items": {"type": "number"}}"""
    word, _, inside = str(kind).lower().partition(",")[0].partition("[")
    word = word.strip(" ]")
    if word == "list" and inside:
        return {"type": "array", "items": type_of(inside)}
    return {"type": JSON_TYPES[word]} if word in JSON_TYPES else {}  # "any" leaves it open


if __name__ == "__main__":
    with plain_errors("convert"):
        check(len(sys.argv) == 3, "usage: python -m extras.convert FILE OUT.jsonl")
        problems = convert(sys.argv[1], load_rows(sys.argv[1]))
        lines = [json.dumps(problem) + "\n" for problem in problems]
        Path(sys.argv[2]).write_text("".join(lines), encoding="utf-8")
