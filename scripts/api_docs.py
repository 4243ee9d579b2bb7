"""Write docs/API.md from the service's OpenAPI document. `--check` only compares, and exits 1 when they differ.

`--metrics` first renews the schema of metrics.json, lora_mvp/assets/metrics.schema.json; that loads torch.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_mvp.api.main import create_app  # noqa: E402
from lora_mvp.api.problems import STATUS_OF  # noqa: E402

METRICS = ROOT / "lora_mvp" / "assets" / "metrics.schema.json"
FILE = ROOT / "docs" / "API.md"
HEAD = """# The job service over HTTP

<!-- written by scripts/api_docs.py from the OpenAPI document; do not edit -->

`uvicorn lora_mvp.api.main:app` serves what is below; `GET /openapi.json` gives it to programs, and `lora_mvp.api.client.Client` is a client in Python.
"""
ERRORS_HEAD = """## Errors

Every answer from 400 up has the type `application/problem+json` ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)). `code` is for programs, `detail` for people, and
`request_id` finds the line in the service's log. `Retry-After` comes with 429 and 503.
"""
GROUPS = {"jobs": "Jobs", "files": "Files of a job", "data": "Pictures and models", "operation": "Operation"}


def kind(schema: dict[str, Any]) -> str:
    """A type in words, for a table."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(kind(option) for option in schema.get("anyOf", schema.get("oneOf")))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if schema.get("type") == "object":
        return "object"
    limits = {"minimum": "from", "maximum": "to", "maxLength": "length up to"}
    words = [schema.get("format", schema.get("type", "any")).replace("date-time", "time")]
    return " ".join(words + [f"{word} {schema[key]}" for key, word in limits.items() if key in schema])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines] + [""]


def fields(schema: dict[str, Any]) -> list[str]:
    """The table of an object's fields."""
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        default = "" if "default" not in field else f"default `{json.dumps(field['default'])}`"
        note = "; ".join(filter(None, [field.get("description", ""), default]))
        rows.append((f"`{name}`{'' if name in required else '?'}", kind(field), note))
    return table(("field", "type", ""), rows)


def example(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields that have an example."""
    return {name: field["examples"][0] for name, field in schema["properties"].items() if "examples" in field}


def operation(path: str, method: str, about: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """The section of one route."""
    lines = [f"### `{method.upper()} {path}`", "", about.get("description", ""), ""]
    parameters = [p for p in about.get("parameters", []) if p["in"] != "path"]
    if parameters:
        rows = [(f"`{p['name']}`", p["in"], kind(p["schema"]), p.get("description", "")) for p in parameters]
        lines += table(("parameter", "in", "type", ""), rows)
    for content in about.get("requestBody", {}).get("content", {}).values():
        names = [
            s["$ref"].rsplit("/", 1)[-1] for s in content["schema"].get("anyOf", [content["schema"]]) if "$ref" in s
        ]
        for schema in (schemas[name] for name in names):
            lines += ["Body:", "", *fields(schema)]
            if example(schema):
                lines += ["```json", json.dumps(example(schema)), "```", ""]
    rows = []
    for status, answer in sorted(about["responses"].items()):
        if int(status) < 400:
            found = [
                kind(c["schema"]) if "$ref" in c.get("schema", {}) else f"`{t}`"
                for t, c in answer.get("content", {}).items()
            ]
            rows.append(
                (
                    status,
                    ", ".join(found),
                    "" if answer["description"] == "Successful Response" else answer["description"],
                )
            )
    return lines + table(("answer", "body", ""), rows)


def metrics_schema() -> str:
    """The schemas of metrics.json and of what is in it, as OpenAPI names them."""
    from lora_mvp.eval.records import Metrics

    whole = Metrics.model_json_schema(ref_template="#/components/schemas/{model}")
    return json.dumps(whole.pop("$defs") | {"Metrics": whole}, indent=1) + "\n"


def document() -> str:
    """The whole text."""
    found = create_app().openapi()
    schemas, lines = found["components"]["schemas"], [HEAD, found["info"]["description"], ""]
    for tag, title in GROUPS.items():
        lines += [f"## {title}", ""]
        for path, methods in found["paths"].items():
            for method, about in methods.items():
                lines += operation(path, method, about, schemas) if tag in about["tags"] else []
    bodies = {"TrainRequest", "EvaluateRequest", "RetryRequest"}
    lines += ["## Objects", ""]
    for name, schema in sorted(schemas.items()):
        if "properties" in schema and name not in bodies:
            lines += [f"### {name}", "", schema.get("description", ""), "", *fields(schema)]
    errors = {}
    for about in (about for methods in found["paths"].values() for about in methods.values()):
        errors |= about["responses"]
    codes = {int(s): [c for c, status in STATUS_OF.items() if status == int(s)] for s in errors if int(s) >= 400}
    rows = [(str(s), errors[str(s)]["description"], ", ".join(f"`{c}`" for c in codes[s])) for s in sorted(codes)]
    lines += [ERRORS_HEAD, *table(("status", "when", "codes among others"), rows)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--metrics" in sys.argv[1:]:
        METRICS.write_text(metrics_schema(), encoding="utf-8")
    text = document()
    if "--check" in sys.argv[1:]:
        if not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
            sys.exit("docs/API.md is not what the service says; run python scripts/api_docs.py")
    else:
        FILE.write_text(text, encoding="utf-8")
