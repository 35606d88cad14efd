"""What the clients of the load do: each asks again and again, in one of five ways, and counts what comes back."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

WORDS = ("Tom", "Anna", "has", "buys", "gives", "apples", "3", "12", "each", "how", "many", "left")


@dataclass
class Tally:
    """What came back."""

    answers: Counter = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    def expect(self, kind, response_status, promised, text=""):
        """Count an answer; keep what no limit promises."""
        self.answers[kind, response_status] += 1
        if response_status not in promised and len(self.unexpected) < 20:
            self.unexpected.append(f"{kind}: {response_status} {text[:200]}")


async def one_client(client, model, end, chance, tally):
    """Ask until the time is up."""
    while time.monotonic() < end:
        ask = chance.choices(
            (whole, streamed, streamed_and_left, left, refused), (30, 35, 15, 10, 10)
        )[0]
        try:
            await ask(client, model, chance, tally)
        except httpx.HTTPError as error:
            tally.expect(ask.__name__, type(error).__name__, (), str(error))


def request_of(model, chance):
    """A request that can be served, and its route."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 120)))
    body = {
        "model": model,
        "max_tokens": chance.randint(1, 64),
        "temperature": chance.choice((0, 0.7, 1.0)),
        "n": chance.choice((1, 1, 1, 2, 3)),
        "seed": chance.randrange(1000),
        "stop": chance.choice((None, "\n", ["Question:", "####"])),
    }
    if chance.random() < 0.5:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    body["prompt"] = chance.choice((text, [text, "Tom has"], [5, 6, 7, 8]))
    if chance.random() < 0.2:
        body |= {"echo": True, "logprobs": chance.randint(0, 5)}
    return "/v1/completions", body


async def whole(client, model, chance, tally):
    route, body = request_of(model, chance)
    start = time.monotonic()
    response = await client.post(route, json=body)
    tally.seconds.append(time.monotonic() - start)
    tally.expect("whole", response.status_code, (200, 429), response.text)
    if response.status_code == 200:
        tally.tokens += response.json()["usage"]["completion_tokens"]


async def streamed(client, model, chance, tally, *, leave_after=None):
    route, body = request_of(model, chance)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    kind = "streamed" if leave_after is None else "streamed and left"
    start = time.monotonic()
    async with client.stream("POST", route, json=body) as response:
        tally.expect(kind, response.status_code, (200, 429))
        if response.status_code != 200:
            return
        last = ""
        count = 0
        async for line in response.aiter_lines():
            if not line:
                continue
            if not count:
                tally.first_seconds.append(time.monotonic() - start)
            count += 1
            if leave_after is not None and count >= leave_after:
                return
            if '"error"' in line:
                tally.expect(kind, "error in the stream", (), line)
            last, before = line, last
    if last != "data: [DONE]":
        tally.expect(kind, "no end", (), last)
        return
    tally.seconds.append(time.monotonic() - start)
    tally.tokens += json.loads(before.removeprefix("data: "))["usage"]["completion_tokens"]


async def streamed_and_left(client, model, chance, tally):
    await streamed(client, model, chance, tally, leave_after=chance.randint(1, 10))


async def left(client, model, chance, tally):
    """Ask, and go before the answer is there."""
    route, body = request_of(model, chance)
    try:
        response = await client.post(route, json=body, timeout=chance.uniform(0.01, 0.5))
        tally.expect("left", response.status_code, (200, 429))
    except httpx.TimeoutException:
        tally.expect("left", "left", ("left",))


async def refused(client, model, chance, tally):
    """Ask for what cannot be done."""
    json_type = {"Content-Type": "application/json"}
    good = {"model": model, "prompt": "Tom has"}
    kind, content, status = chance.choice(
        (
            ("malformed JSON", b'{"model": ', 400),
            ("invalid UTF-8", b'{"model": "\xff\xfe"}', 400),
            ("unknown model", json.dumps(good | {"model": "other"}).encode(), 404),
            ("negative temperature", json.dumps(good | {"temperature": -1}).encode(), 422),
            ("huge max_tokens", json.dumps(good | {"max_tokens": 10**15}).encode(), 422),
            ("over-long prompt", json.dumps(good | {"prompt": "Tom " * 20_000}).encode(), 422),
            ("unknown parameter", json.dumps(good | {"frobnicate": 1}).encode(), 422),
        )
    )
    response = await client.post("/v1/completions", content=content, headers=json_type)
    tally.expect(kind, response.status_code, (status,), response.text)
