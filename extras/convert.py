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
JSON_TYPES |= {kind: kind for kind in JSON_TYPES.values()}
JSON_TYPES |= {"none": "null", "null": "null", "nonetype": "null"}
# What JSON writes for a type; an integer is a number, too.
TYPES = {"string": [str], "integer": [int], "number": [int, float], "boolean": [bool]}
TYPES |= {"array": [list], "object": [dict], "null": [type(None)]}


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
        for call in read_json(row["answers"] or "[]"):
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


# ---- what a row wants, held against its tool's schema ----
def clean(arguments: dict, schema: dict) -> None:
    """Removes what the tool lacks and may be left out, and that a required one may be; what
    remains is read in the types of the schema. Raises Unusable."""
    required = schema.get("required", [])
    if set(required) - arguments.keys():
        raise Unusable("its answer lacks a required parameter")
    for name, accepted in list(arguments.items()):
        if name in schema["properties"]:
            spec = schema["properties"][name]
            arguments[name] = conforming(accepted, spec, name in required)
        elif "" in accepted:
            del arguments[name]
        else:
            raise Unusable("it wants a parameter that the tool lacks")


def conforming(accepted, spec: dict, required: bool) -> list:
    """The accepted values that obey a schema; "" among others: it may be left out."""
    values = [value for value in accepted if value not in ("", None)] or accepted
    kept = []
    for value in values:
        with suppress(ValueError):
            kept.append(value if value == "" else conform(value, spec))
    if values and not kept:
        raise Unusable("its answer breaks its tool's schema")
    if "" in accepted and "" not in kept and not required:
        kept.append("")
    return kept


def conform(value, spec: dict):
    """A wanted value, read in the first type of its schema in which that is exact: "5" is
    5. ValueError where it breaks the schema. An object's keys have lists of values."""
    kinds = spec.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        with suppress(ValueError):
            return in_type(value, kind, spec)
    if kinds:
        raise ValueError(f"{value!r:.60} is no {kinds}")
    return value


def in_type(value, kind: str, spec: dict):
    if isinstance(value, str) and kind != "string":
        value = json.loads(value.lower() if kind == "boolean" else value)
    elif type(value) is int and kind == "string":
        value = str(value)
    elif kind == "integer" and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) not in TYPES.get(kind, [type(value)]):
        raise ValueError("it is of another type")
    if "enum" in spec and not any(same(choice, value, spec) for choice in spec["enum"]):
        raise ValueError("it is not in the enum")
    if isinstance(value, list):
        return [conform(item, spec.get("items", {})) for item in value]
    if isinstance(value, dict):
        required, read = spec.get("required", []), {}
        for key, accepted in value.items():
            inner = spec.get("properties", {}).get(key, spec.get("additionalProperties"))
            inner = inner if isinstance(inner, dict) else {}
            accepted = accepted if isinstance(accepted, list) else [accepted]
            read[key] = conforming(accepted, inner, key in required)
        return read
    return value


# ---- a row's writing ----
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
    function = function.get("function", function)
    schema = function.get("parameters") or {}
    inner = schema.get("properties")
    whole = isinstance(inner, dict) and all(isinstance(v, dict) for v in inner.values())
    if not whole and not isinstance(schema.get("type"), str):
        required = [name for name, spec in schema.items() if not is_optional(spec)]
        schema = {"type": "dict", "properties": schema, "required": required}
    described = {"name": function["name"], "description": function.get("description", "")}
    parameters = schema_of({"type": "dict", "properties": {}} | schema)
    return {"type": "function", "function": described | {"parameters": parameters}}


def is_optional(spec: dict) -> bool:
    """xLAM's way to say so: a default, a type "int, optional" or "Optional[int]"."""
    kind = str(spec.get("type")).lower()
    told = "optional" in kind or "default" in kind or "none" in kind
    return "default" in spec or told or spec.get("required") is False


def schema_of(spec: dict) -> dict:
    """A JSON schema for one that may have Python's types, and a default as text."""
    schema = dict(spec)
    kind = schema.pop("type", None)
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list):
            kind = [option.get("type") for option in schema.pop(several)]
    schema = type_of(kind) | schema
    told = re.search(r",\s*default\s*[=:]\s*(.*)", kind) if isinstance(kind, str) else None
    if told:  # "str, default='London'"
        schema.setdefault("default", told[1].strip(" '\""))
    if "default" in schema:
        with suppress(ValueError):
            schema["default"] = conform(schema["default"], {"type": schema.get("type", [])})
    if not isinstance(schema.get("required", []), list):
        del schema["required"]  # xLAM's kind may say true in a parameter
    if "items" in schema:
        schema["items"] = schema_of(schema["items"])
    if "properties" in schema:
        specs = schema["properties"].items()
        schema["properties"] = {name: schema_of(inner) for name, inner in specs}
    return schema


def type_of(kind) -> dict:
    """A type of Python's or of JSON's, or a list of such, as a JSON schema. "any" is open.

    "List[float], optional"      {"type": "array", "items": {"type": "number"}}
    "Optional[Union[int, str]]"  {"type": ["integer", "string"]}
    """
    if isinstance(kind, list):
        return either([type_of(one) for one in kind])
    text = split(str(kind).lower())[0].removeprefix("typing.").strip()
    word, _, inside = text.partition("[")
    parts = split(inside.removesuffix("]"))
    if inside and word in ("optional", "union"):
        return either([type_of(part) for part in parts])
    schema = {"type": JSON_TYPES[word]} if word in JSON_TYPES else {}
    if inside and schema.get("type") == "array":
        schema["items"] = either([type_of(part) for part in parts if part.strip() != "..."])
    if inside and word == "dict":
        schema["additionalProperties"] = type_of(parts[-1])
    return schema


def either(schemas: list[dict]) -> dict:
    """One of several types; open if one of them is."""
    merged, kinds = {}, []
    for schema in schemas:
        if "type" not in schema:
            return {}
        merged |= schema
        kinds += schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kinds = list(dict.fromkeys(kinds))
    return merged | {"type": kinds[0] if len(kinds) == 1 else kinds}


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


if __name__ == "__main__":
    with plain_errors("convert"):
        check(len(sys.argv) == 3, "usage: python -m extras.convert FILE OUT.jsonl")
        problems = convert(sys.argv[1], load_rows(sys.argv[1]))
        lines = [json.dumps(problem) + "\n" for problem in problems]
        Path(sys.argv[2]).write_text("".join(lines), encoding="utf-8")
