"""``/v1/chat/completions``: messages through the template, answers in the shape of OpenAI's API."""

from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

GREEDY = {"model": "fake", "temperature": 0, "max_tokens": 12}
HELLO = [{"role": "user", "content": "hello"}]


def ask(client, messages=HELLO, **body):
    return client.post("/v1/chat/completions", json=GREEDY | {"messages": messages} | body)


def answer(client, messages=HELLO, **body):
    response = ask(client, messages, **body)
    assert response.status_code == 200, response.text
    return response.json()


def expected(kit, prompt, **parameters):
    """The choices for what the template makes of the messages."""
    token_ids = tuple(kit.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return kit.alone(replace(kit.request(prompt, **parameters), prompt_token_ids=token_ids))


def test_the_answer_is_the_engines(client, kit):
    found = answer(client)
    (choice,) = expected(kit, "u:hello;")
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
    ]
    assert found["usage"]["prompt_tokens"] == 8
    assert found["usage"]["completion_tokens"] == len(choice.token_ids)


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (
            [
                {"role": "system", "content": "be"},
                {"role": "user", "content": "x", "name": "me"},
                {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "z"},
            ],
            "s:be;u:x;a:y;u:z;",
        ),
        ([{"role": "developer", "content": "be"}], "s:be;"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                }
            ],
            "u:ab;",
        ),
    ],
)
def test_messages_go_through_the_template(client, kit, messages, prompt):
    (choice,) = expected(kit, prompt)
    assert answer(client, messages)["choices"][0]["message"]["content"] == choice.text


def test_without_max_tokens_an_answer_may_fill_the_positions(client):
    found = answer(client, max_tokens=None, ignore_eos=True)
    assert found["usage"]["total_tokens"] == 400
    assert found["choices"][0]["finish_reason"] == "length"


def test_the_newer_name_of_max_tokens(client):
    body = {"max_tokens": None, "max_completion_tokens": 3, "ignore_eos": True}
    assert answer(client, **body)["usage"]["completion_tokens"] == 3
    assert answer(client, **body | {"max_tokens": 3})["usage"]["completion_tokens"] == 3
    response = ask(client, **body | {"max_tokens": 4})
    assert response.status_code == 422
    assert "differ" in response.json()["error"]["message"]


def test_logprobs_are_the_engines(client, kit):
    (found,) = answer(client, logprobs=True, top_logprobs=2)["choices"]
    (choice,) = expected(kit, "u:hello;", logprobs=2)
    entries = found["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [one.logprob for one in choice.logprobs]
    for entry, one in zip(entries, choice.logprobs, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == [value for _, value in one.top]
        assert entry["bytes"] is None or entry["token"].encode() == bytes(entry["bytes"])
    (found,) = answer(client, logprobs=True)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in found["logprobs"]["content"])


def test_a_stream_says_the_same_piece_by_piece(client, events):
    body = {"n": 2, "seed": 5, "temperature": 1.0, "logprobs": True, "top_logprobs": 1}
    whole = answer(client, **body)
    response = ask(client, **body, stream=True, stream_options={"include_usage": True})
    *chunks, last = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        own = [
            one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]
        ]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        texts = [one["delta"].get("content", "") for one in own]
        assert "".join(texts) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert [entry for one in own[1:] for entry in one["logprobs"]["content"]] == choice[
            "logprobs"
        ]["content"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "tool_calls is not"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "exceeds the model's"),
        ({"messages": [{"role": "user", "content": "x" * 500}], "max_tokens": None}, "exceeds"),
    ],
)
def test_what_cannot_be_done_is_refused(client, body, words):
    response = ask(client, **body)
    assert response.status_code == 422, response.text
    assert words in response.json()["error"]["message"]


def test_a_template_may_refuse_messages(client, kit):
    kit.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    response = ask(client)
    assert response.status_code == 422
    assert "template refuses the messages: roles must alternate" in response.text


def test_without_a_template_there_is_no_chat(client, kit):
    kit.tokenizer.chat_template = None
    response = ask(client)
    assert response.status_code == 422
    assert "no chat template" in response.json()["error"]["message"]
