"""Runs calls of the LoRAX Python client: JSON on standard input, JSON on standard output. Runs in the clients' own environment.

In: {"url", "headers", "calls": [{"do": "generate" | "stream" | "async_generate" | "async_stream", "prompt", "merged"?, "with": {..}}]}
Out: a list, for each call what it gave, or {"error": class, "message"}.
"""

import asyncio
import json
import sys

from lorax import AsyncClient, Client, MergedAdapters


def arguments(call: dict) -> dict:
    given = dict(call.get("with", {}))
    if "merged" in call:
        given["merged_adapters"] = MergedAdapters(**call["merged"])
    return given


def plain(reply) -> dict:
    return json.loads(reply.model_dump_json())


def run(client: Client, other: AsyncClient, call: dict):
    prompt, given = call["prompt"], arguments(call)

    async def streamed() -> list:
        return [plain(event) async for event in other.generate_stream(prompt, **given)]

    match call["do"]:
        case "generate":
            return plain(client.generate(prompt, **given))
        case "stream":
            return [plain(event) for event in client.generate_stream(prompt, **given)]
        case "async_generate":
            return plain(asyncio.run(other.generate(prompt, **given)))
        case "async_stream":
            return asyncio.run(streamed())


def main():
    asked = json.load(sys.stdin)
    answers = []
    for call in asked["calls"]:
        client = Client(asked["url"], headers=asked.get("headers"), timeout=60)
        other = AsyncClient(asked["url"], headers=asked.get("headers"), timeout=60)
        try:
            answers.append(run(client, other, call))
        except Exception as error:  # the test decides whether it is the right one
            answers.append({"error": type(error).__name__, "message": str(error)})
    json.dump(answers, sys.stdout)


main()
