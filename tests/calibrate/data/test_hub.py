"""Hub datasets: what is asked of the ``datasets`` package, and its errors in one sentence."""

import sys
import types

import pytest

from fp8kv.calibrate.data.hub import SHUFFLE_BUFFER_ROWS, stream_hub
from fp8kv.calibrate.data.sources import Source
from fp8kv.recipes.errors import DataError


class FakeStream:
    """Stands for an ``IterableDataset``: rows, then perhaps an error."""

    def __init__(self, rows, error=None):
        self.rows, self.error, self.shuffled = rows, error, None

    def shuffle(self, **arguments):
        self.shuffled = arguments
        return self

    def __iter__(self):
        yield from self.rows
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    """Replace the ``datasets`` package; return what it was asked and what it answers."""
    state = types.SimpleNamespace(calls=[], answer=FakeStream([]))

    def load_dataset(**arguments):
        state.calls.append(arguments)
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return state


def test_a_hub_dataset_is_streamed_through_a_seeded_buffer(hub):
    hub.answer = FakeStream([{"text": "a"}, {"text": "b"}])
    rows = list(stream_hub(Source("openai/gsm8k", config="main", split="test"), seed=5))
    assert [row.fields["text"] for row in rows] == ["a", "b"]
    assert rows[0].where == "a row of dataset openai/gsm8k"
    assert hub.calls == [
        {"path": "openai/gsm8k", "name": "main", "split": "test", "streaming": True}
    ]
    assert hub.answer.shuffled == {"seed": 5, "buffer_size": SHUFFLE_BUFFER_ROWS}


def test_no_more_rows_are_read_than_asked(hub):
    hub.answer = FakeStream([{"text": "a"}], error=ConnectionError("read too far"))
    assert next(stream_hub(Source("a/b"), seed=0)).fields == {"text": "a"}


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
        ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"),
        RuntimeError("Dataset scripts are no longer supported, but found b.py"),
    ],
)
@pytest.mark.parametrize("while_reading", [False, True])
def test_errors_of_the_hub_become_one_sentence(hub, error, while_reading):
    hub.answer = FakeStream([{"text": "a"}], error) if while_reading else error
    with pytest.raises(DataError) as caught:
        list(stream_hub(Source("a/b", config="c", split="tain"), seed=0))
    message = str(caught.value)
    assert message.startswith(f"cannot read dataset a/b ({' '.join(str(error).split())})")
    assert "check the network, the name, config=c and split=tain, or give a local file" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error


def test_a_page_of_error_text_is_cut_and_an_empty_one_has_its_type(hub):
    hub.answer = ValueError("x" * 10_000)
    with pytest.raises(DataError) as caught:
        list(stream_hub(Source("a/b"), seed=0))
    assert len(str(caught.value)) < 600
    hub.answer = TimeoutError()
    with pytest.raises(DataError, match=r"\(TimeoutError\)"):
        list(stream_hub(Source("a/b"), seed=0))


def test_without_the_package_the_remedy_is_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(DataError) as caught:
        list(stream_hub(Source("a/b"), seed=0))
    assert "reading dataset a/b from the Hugging Face hub needs the package 'datasets'" in str(
        caught.value
    )
    assert "pip install datasets" in str(caught.value)
