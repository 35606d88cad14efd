"""``/v1/completions``: what the engine says, in the shape of OpenAI's API."""

import threading
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

GREEDY = {"model": "fake", "temperature": 0, "max_tokens": 12}


def ask(client, **body):
    return client.post("/v1/completions", json=GREEDY | body)


def answer(client, **body):
    response = ask(client, **body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(kit, text):
    return kit.tokenizer(text)["input_ids"]


def expected(kit, prompt, **parameters):
    one = kit.request(prompt, **parameters)
    return kit.alone(replace(one, prompt_token_ids=tuple(ids(kit, prompt))))


def test_the_text_is_the_engines(client, kit):
    found = answer(client, prompt="abc")
    (choice,) = expected(kit, "abc")
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert found["model"] == "fake"
    assert found["choices"] == [
        {"index": 0, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}
    ]
    count = len(choice.token_ids)
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": count,
        "total_tokens": 3 + count,
    }


def test_several_prompts_of_both_kinds_have_n_choices_each(client, kit):
    found = answer(client, prompt=["abc", ids(kit, "xyz")], n=2, seed=5, temperature=1)
    one = expected(kit, "abc", n=2, seed=5, temperature=1.0)
    other = expected(kit, "xyz", n=2, seed=5, temperature=1.0)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found["choices"]] == [
        choice.text for choice in (*one, *other)
    ]
    assert found["usage"]["prompt_tokens"] == 6


def test_token_ids_need_no_list_around_them(client, kit):
    (choice,) = expected(kit, "abc")
    assert answer(client, prompt=ids(kit, "abc"))["choices"][0]["text"] == choice.text


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        ({"temperature": None, "seed": 3}, {"temperature": 1.0, "seed": 3}),
        (
            {"temperature": 0.7, "seed": 3, "top_p": 0.5},
            {"temperature": 0.7, "seed": 3, "top_p": 0.5},
        ),
        ({"temperature": 2, "seed": 3, "top_k": 2}, {"temperature": 2.0, "seed": 3, "top_k": 2}),
        ({"temperature": 2, "seed": 3, "top_k": 0}, {"temperature": 2.0, "seed": 3}),
        ({"temperature": 2, "seed": 3, "top_k": -1}, {"temperature": 2.0, "seed": 3}),
        ({"max_tokens": 40, "stop": ["ca", "bb"]}, {"max_tokens": 40, "stop": ("ca", "bb")}),
        ({"max_tokens": 40, "stop": "b"}, {"max_tokens": 40, "stop": ("b",)}),
        ({"max_tokens": 60, "ignore_eos": True}, {"max_tokens": 60, "ignore_eos": True}),
        ({"max_tokens": None}, {"max_tokens": 16}),
        ({"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "stop": None}, {}),
    ],
)
def test_every_parameter_arrives(client, kit, body, parameters):
    (choice,) = expected(kit, "abcd", **parameters)
    (found,) = answer(client, prompt="abcd", **body)["choices"]
    assert (found["text"], found["finish_reason"]) == (choice.text, choice.finish_reason)


def test_logprobs_are_the_engines(client, kit):
    (found,) = answer(client, prompt="abc", logprobs=2, max_tokens=4, ignore_eos=True)["choices"]
    (choice,) = expected(kit, "abc", logprobs=2, max_tokens=4, ignore_eos=True)
    shape = found["logprobs"]
    assert "".join(shape["tokens"]) == found["text"]
    assert shape["token_logprobs"] == [entry.logprob for entry in choice.logprobs]
    assert [list(top.values()) for top in shape["top_logprobs"]] == [
        [logprob for _, logprob in entry.top] for entry in choice.logprobs
    ]
    assert shape["text_offset"] == [0, 1, 2, 3]


def test_no_alternatives_still_show_the_token_itself(client):
    (found,) = answer(client, prompt="abc", logprobs=0, max_tokens=1)["choices"]
    shape = found["logprobs"]
    assert shape["top_logprobs"] == [{shape["tokens"][0]: shape["token_logprobs"][0]}]


def test_echo_begins_with_the_prompt(client, kit):
    (choice,) = expected(kit, "abc")
    (found,) = answer(client, prompt="abc", echo=True)["choices"]
    assert (found["text"], found["logprobs"]) == ("abc" + choice.text, None)
    (found,) = answer(client, prompt=ids(kit, "abc"), echo=True)["choices"]
    assert found["text"] == "abc" + choice.text


def test_echo_with_logprobs_scores_the_prompt(client, kit, fake_model):
    (found,) = answer(client, prompt="abcab", echo=True, logprobs=1, max_tokens=1)["choices"]
    shape = found["logprobs"]
    assert shape["tokens"][:5] == list("abcab")
    assert len(shape["tokens"]) == 6
    assert shape["token_logprobs"][0] is shape["top_logprobs"][0] is None
    prompt = ids(kit, "abcab")
    for position in range(1, 5):
        logprobs = fake_model.answer(tuple(prompt[:position])).log_softmax(-1)
        assert shape["token_logprobs"][position] == pytest.approx(
            float(logprobs[prompt[position]]), abs=1e-5
        )
        top = shape["top_logprobs"][position]
        assert max(top.values()) == pytest.approx(float(logprobs.max()), abs=1e-5)
        assert top["abcab"[position]] == shape["token_logprobs"][position]
    assert shape["text_offset"] == [0, 1, 2, 3, 4, 5]


def test_nothing_need_be_generated_where_the_prompt_is_scored(client):
    found = answer(client, prompt=["abcab", "a"], echo=True, logprobs=1, max_tokens=0, n=2)
    assert [choice["text"] for choice in found["choices"]] == ["abcab", "abcab", "a", "a"]
    assert [len(choice["logprobs"]["tokens"]) for choice in found["choices"]] == [5, 5, 1, 1]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    (found,) = answer(client, prompt="abc", echo=True, max_tokens=0)["choices"]
    assert (found["text"], found["logprobs"]) == ("abc", None)


def test_a_stream_says_the_same_piece_by_piece(client, events):
    body = {"prompt": ["abc", "xyz"], "n": 2, "logprobs": 2, "seed": 5, "temperature": 1.0}
    whole = answer(client, **body, echo=True)
    response = ask(client, **body, echo=True, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [
            one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]
        ]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [
            choice["finish_reason"]
        ]
        for key, values in choice["logprobs"].items():
            assert [value for one in own for value in one["logprobs"][key]] == values


def test_a_stream_counts_only_when_asked(client, events):
    for options in (None, {"include_usage": False}, {}):
        response = ask(client, prompt="abc", stream=True, stream_options=options)
        assert all("usage" not in chunk for chunk in events(response.text))


def test_a_prompt_whose_numbers_are_none_fails_alone(client, kit, fake_model):
    poisoned = kit.tokenizer.decode([fake_model.POISON])
    response = ask(client, prompt=f"ab{poisoned}d", ignore_eos=True)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "NaN or infinity" in error["message"]
    assert client.get("/health").status_code == 200
    (choice,) = expected(kit, "abc")
    assert answer(client, prompt="abc")["choices"][0]["text"] == choice.text


def test_a_prompt_that_cannot_be_scored_gives_its_pages_back(client, kit, llm, fake_model):
    poisoned = kit.tokenizer.decode([fake_model.POISON])
    response = ask(client, prompt=f"ab{poisoned}defgh", echo=True, logprobs=0, max_tokens=0)
    assert response.status_code == 500
    assert "NaN or infinity" in response.json()["error"]["message"]
    assert llm.engine.status.num_free_pages == llm.engine.status.num_pages


def test_a_stream_that_fails_ends_with_the_error(client, events, kit, fake_model):
    poisoned = kit.tokenizer.decode([fake_model.POISON])
    response = ask(client, prompt=f"ab{poisoned}d", ignore_eos=True, stream=True)
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert all("choices" in chunk for chunk in chunks)
    assert "NaN or infinity" in last["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "abc", "temperature": -1}, "temperature is -1"),
        ({"prompt": "abc", "top_p": 0}, "top_p is 0"),
        ({"prompt": "abc", "top_k": -2}, "top_k is -2"),
        ({"prompt": "abc", "n": 0}, "n is 0"),
        ({"prompt": "abc", "n": 9}, "n is 9"),
        ({"prompt": "abc", "logprobs": 21}, "logprobs is 21"),
        ({"prompt": "abc", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "abc", "max_tokens": -5, "echo": True}, "max_tokens is -5"),
        ({"prompt": "abc", "max_tokens": 0, "echo": True, "stream": True}, "nothing to stream"),
        ({"prompt": "abc", "max_tokens": 10**12}, "exceeds the model's 400 positions"),
        ({"prompt": "abc" * 200}, "exceeds the model's 400 positions"),
        ({"prompt": "abc" * 200, "echo": True, "logprobs": 0}, "exceeds the model's 400 positions"),
        ({"prompt": "abc", "stop": ""}, "stop is"),
        ({"prompt": "abc", "stop": ["a"] * 33}, "stop"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [259]}, "token id 259"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": ["abc"] * 2000}, "asks for 2000 sequences"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left_behind(client, body, words):
    response = ask(client, **body)
    assert response.status_code == 422, response.text
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/health").status_code == 200


def test_of_several_prompts_one_bad_one_refuses_all(client):
    assert ask(client, prompt=["abc", "abc" * 200]).status_code == 422


def test_a_prompt_that_never_fits_into_the_cache_is_refused(in_process, fake_llm):
    with in_process(fake_llm(num_pages=4, page_size=4)) as client:
        response = ask(client, prompt="abcdefgh", max_tokens=12)
        assert response.status_code == 422
        assert "can never fit into the cache's 16 tokens" in response.json()["error"]["message"]
        assert ask(client, prompt="abcd", max_tokens=12).status_code == 200


def test_scores_wait_for_pages_that_others_hold(in_process, fake_llm, until):
    llm = fake_llm(num_pages=6, page_size=4)
    permits = llm.hold()
    with in_process(llm) as client:
        found = {}

        def run(name, **body):
            found[name] = ask(client, **body).json()

        one = threading.Thread(
            target=run, args=["one"], kwargs={"prompt": "abcdefgh", "ignore_eos": True}
        )
        one.start()
        until(lambda: llm.engine.status.num_running == 1)
        other = threading.Thread(
            target=run,
            args=["other"],
            kwargs={"prompt": "abcdefgh" * 2 + "ab", "echo": True, "logprobs": 0, "max_tokens": 0},
        )
        other.start()
        until(lambda: client.service.num_open == 2)
        permits.release(100)
        one.join()
        other.join()
        assert found["one"]["choices"][0]["finish_reason"] == "length"
        assert len(found["other"]["choices"][0]["logprobs"]["tokens"]) == 18
