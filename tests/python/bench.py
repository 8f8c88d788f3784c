#!/usr/bin/env python3
"""Throughput and latency of a running OpenAI-compatible server, over real sockets; needs only the standard library.

    python bench.py --model demo --concurrency 32 --requests 128 --prompt-tokens 64 --max-tokens 64
    python bench.py --model base,a0,a1,a2          the models take turns
    python bench.py --model a --distinct 64        a0 .. a63 take turns

Prompts are random token ids (seeded), so that no prefix is shared; `ignore_eos` makes every reply `--max-tokens` long. Time to first
token is from the request's first byte to the first chunk with a token; the inter-token time is the gap between such chunks.
"""

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.parse
import urllib.request


def percentile(values: list[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))] if ordered else float("nan")


class Failed(Exception):
    """A request that did not end well."""


async def one_request(address: tuple[str, int], key: str | None, body: dict, timeout_s: float) -> list[float]:
    """Sends one streamed completion; gives the times (s) of start and of each chunk with tokens."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(*address)
        try:
            content = json.dumps(body).encode()
            authorization = f"Authorization: Bearer {key}\r\n" if key else ""
            times = [time.perf_counter()]
            writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n{authorization}"
                         f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
            status = (await reader.readline()).split()
            if len(status) < 2 or status[1] != b"200":
                raise Failed(f"{b' '.join(status[1:]).decode()}: {(await reader.read(4096)).decode(errors='replace')[-500:]}")
            tokens = 0
            # Chunked framing puts its own lines between the events; they do not start with `data: `.
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    break
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise Failed(chunk["error"]["message"])
                    new = sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
                    if new:
                        times.append(time.perf_counter())
                        tokens += new
            if tokens != body["max_tokens"]:
                raise Failed(f"{tokens} tokens instead of {body['max_tokens']}")
            return times
        finally:
            writer.close()


async def run(args, models: list[str], vocabulary: int) -> dict:
    url = urllib.parse.urlsplit(args.url)
    address = (url.hostname or "localhost", url.port or 80)
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(vocabulary // 8, vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
    results: list[list[float]] = []
    failures: list[str] = []
    waiting = iter(range(args.requests))

    async def worker():
        for i in waiting:
            body = dict(model=models[i % len(models)], prompt=prompts[i], max_tokens=args.max_tokens, temperature=args.temperature, seed=i,
                        ignore_eos=True, stream=True, return_token_ids=True)
            try:
                results.append(await one_request(address, args.api_key, body, args.timeout))
            except (Failed, OSError, TimeoutError, ValueError) as error:
                failures.append(f"{type(error).__name__}: {error}")

    async def warm():
        for model in models:
            body = dict(model=model, prompt=prompts[0][:8], max_tokens=1, temperature=0, ignore_eos=True, stream=True, return_token_ids=True)
            await one_request(address, args.api_key, body, args.timeout)

    if args.warm:
        await warm()
    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(args.concurrency, args.requests))))
    wall = time.perf_counter() - started
    first = [times[1] - times[0] for times in results]
    gaps = [b - a for times in results for a, b in zip(times[1:], times[2:])]
    done = len(results)
    return {
        "models": len(models), "concurrency": args.concurrency, "requests": done, "failures": len(failures),
        "first_failure": failures[0] if failures else None, "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens,
        "wall_s": round(wall, 3), "output_tokens_per_s": round(done * args.max_tokens / wall, 1),
        "total_tokens_per_s": round(done * (args.max_tokens + args.prompt_tokens) / wall, 1), "requests_per_s": round(done / wall, 2),
        **{f"{name}_ms_{label}": round(1000 * percentile(values, q), 2)
           for name, values in (("ttft", first), ("itl", gaps)) for label, q in (("p50", 0.5), ("p99", 0.99))},
    }


def ask(args, path: str, body: dict | None = None) -> dict:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {args.api_key}"} if args.api_key else {})}
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(args.url.rstrip("/") + path, data=data, headers=headers), timeout=30) as answer:
        return json.load(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--model", help="comma-separated; they take turns. Default: the server's first")
    parser.add_argument("--distinct", type=int, default=0, help="use --model as a prefix of this many names: a0, a1, ..")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--vocabulary", type=int, default=2048, help="prompt ids are below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--no-warm", dest="warm", action="store_false", help="also measure the first load of each adapter")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.concurrency, args.requests, args.prompt_tokens, args.max_tokens) < 1 or args.vocabulary < 8:
        parser.error("counts must be at least 1 and --vocabulary at least 8")
    models = args.model.split(",") if args.model else [ask(args, "/v1/models")["data"][0]["id"]]
    if args.distinct:
        models = [f"{models[0]}{i}" for i in range(args.distinct)]
    report = asyncio.run(run(args, models, args.vocabulary))
    if args.json:
        print(json.dumps(report))
    else:
        width = max(map(len, report))
        print("\n".join(f"{name:{width}}  {value}" for name, value in report.items() if value is not None))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
