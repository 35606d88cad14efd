"""The official client of OpenAI's API, against a real server on this machine."""

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "fake", "temperature": 0, "max_tokens": 12}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "fp8kv"


def test_completions(client):
    found = client.completions.create(prompt=["abc", "xyz"], n=2, logprobs=2, echo=True, **GREEDY)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("abc")
    assert found.choices[0].finish_reason in ("stop", "length")
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_completions_as_a_stream(client):
    whole = client.completions.create(prompt="abc", **GREEDY)
    chunks = list(
        client.completions.create(
            prompt="abc", stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(one.text for chunk in chunks for one in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_chat(client):
    found = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    (choice,) = found.choices
    assert choice.message.role == "assistant"
    entries = choice.logprobs.content
    assert len(entries) == found.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    # what the client has of an answer can be sent back
    messages = [*HELLO, choice.message.model_dump(), *HELLO]
    again = client.chat.completions.create(messages=messages, **GREEDY)
    assert again.usage.prompt_tokens > found.usage.prompt_tokens
    again = client.chat.completions.create(messages=[*HELLO, choice.message, *HELLO], **GREEDY)
    assert again.usage.prompt_tokens > found.usage.prompt_tokens


def test_chat_as_a_stream(client):
    body = {"messages": HELLO, "n": 2, "seed": 1} | GREEDY
    whole = client.chat.completions.create(**body)
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in client.chat.completions.create(stream=True, **body):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert list(reasons.values()) == [choice.finish_reason for choice in whole.choices]


def test_parameters_of_other_engines_go_as_extra_body(client):
    extra = {"top_k": 1, "ignore_eos": True}
    found = client.completions.create(prompt="abc", extra_body=extra, **GREEDY)
    assert found.usage.completion_tokens == 12


def test_a_stream_that_is_closed_early_frees_its_pages(client, llm, until):
    permits = llm.hold()
    stream = client.completions.create(
        prompt="abc",
        stream=True,
        **GREEDY | {"max_tokens": 300, "extra_body": {"ignore_eos": True}},
    )
    permits.release(5)
    next(iter(stream))
    stream.close()
    until(
        lambda: llm.engine.status.num_free_pages == llm.engine.status.num_pages or permits.release()
    )


def test_errors_are_the_clients_own(client):
    def complete(**more):
        return client.completions.create(**{"prompt": "abc"} | GREEDY | more)

    with pytest.raises(openai.UnprocessableEntityError, match="temperature is -1") as caught:
        complete(temperature=-1)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.UnprocessableEntityError, match="suffix is not supported") as caught:
        complete(suffix="x")
    assert caught.value.param == "suffix"
    with pytest.raises(openai.NotFoundError) as caught:
        complete(model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="exceeds the model's 400 positions"):
        complete(max_tokens=10**9)


def test_a_failure_inside_a_stream_is_an_error(client, kit, fake_model):
    poisoned = kit.tokenizer.decode([fake_model.POISON])
    stream = client.completions.create(
        prompt=f"ab{poisoned}d", stream=True, extra_body={"ignore_eos": True}, **GREEDY
    )
    with pytest.raises(openai.APIError, match="NaN or infinity"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="NaN or infinity"):
        client.completions.create(
            prompt=f"ab{poisoned}d", extra_body={"ignore_eos": True}, **GREEDY
        )


def test_keys(listening, llm):
    with listening(llm, api_key="right") as server:
        for key, is_right in (("right", True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                if is_right:
                    assert client.models.list().data[0].id == "fake"
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()


def test_a_full_queue_is_a_rate_limit(listening, fake_llm):
    with (
        listening(fake_llm(max_sequences=1), max_queue=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        seat = server.service.open(2)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(prompt="abc", **GREEDY)
        seat.close()
        assert client.completions.create(prompt="abc", **GREEDY).choices
