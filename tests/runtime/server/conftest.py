"""Servers to test: over a fake model, whose steps a test can hold up, in this process or behind a real socket."""

import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

PATIENCE = 8
"""Seconds after which what a test waits for will not come."""


class FakeLlm:
    """What the server knows of an LLM, over the fake model of the engine's tests."""

    def __init__(self, kit, **options):
        self.engine, self.model = kit.make(**{"max_sequences": 8, "max_positions": 400} | options)
        self.tokenizer = kit.tokenizer
        self.limits = self.engine._limits
        self.max_length = self.limits.max_positions
        self.counts = None
        self.permits = None
        self._forward, self.model.forward = self.model.forward, self._step
        self._answer = kit.answer

    def hold(self):
        """Let no step happen but those that are released."""
        self.permits = threading.Semaphore(0)
        return self.permits

    def encode(self, prompt):
        return tuple(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    def teacher_forced(self, sequences):
        for prompt, answer in sequences:
            self.limits.check([*prompt, *answer], 0, 1 << 20)
        return self._read(sequences)

    def _read(self, sequences):
        import torch

        from fp8kv.recipes.errors import RequestError
        from fp8kv.runtime.paging import OutOfPages

        allocator = self.engine._allocator
        for number, (prompt, answer) in enumerate(sequences):
            tokens = (*prompt, *answer)
            try:
                pages = allocator.allocate(-(-(len(tokens) - 1) // allocator.page_size))
            except OutOfPages:
                raise RequestError("too few free pages") from None
            try:
                rows = [self._answer(tokens[:end]) for end in range(len(prompt), len(tokens))]
                yield number, torch.stack(rows)
            finally:
                allocator.free(pages)

    def cache_counts(self):
        from fp8kv.recipes.errors import RequestError

        if self.counts is None:
            raise RequestError("nothing was counted")
        return self.counts

    def _step(self, batch):
        if self.permits is not None:
            assert self.permits.acquire(timeout=PATIENCE)
        return self._forward(batch)


@pytest.fixture
def kit(fake_model, byte_tokenizer):
    tokenizer = byte_tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    kit = fake_model.EngineKit(tokenizer)
    kit.answer = fake_model.answer
    yield kit
    tokenizer.chat_template = None


@pytest.fixture
def fake_llm(kit):
    """Make an LLM over the fake model."""
    return lambda **options: FakeLlm(kit, **options)


@pytest.fixture
def llm(fake_llm):
    return fake_llm()


def _service(llm, **settings):
    from fp8kv.runtime.server.service import Service
    from fp8kv.runtime.server.settings import ServerSettings

    return Service(llm, ServerSettings(**{"model": "fake"} | settings))


@pytest.fixture
def in_process():
    """Give a client of an application in this process; what is wrong with the server is raised in the test."""
    from starlette.testclient import TestClient

    from fp8kv.runtime.server.app import make_app

    @contextmanager
    def open_client(llm, *, raises=True, **settings):
        service = _service(llm, **settings)
        with TestClient(make_app(service), raise_server_exceptions=raises) as client:
            client.service = service
            yield client
        assert not service.num_open

    return open_client


@pytest.fixture
def client(in_process, llm):
    with in_process(llm) as client:
        yield client
    assert_all_given_back(llm)


@pytest.fixture
def listening():
    """Run a real server on a free port of this machine; it is stopped in the end, if it was not before."""
    from fp8kv.runtime.server.launch import DrainingServer, bind, url

    @contextmanager
    def run(llm, **settings):
        said = []
        ready = threading.Event()
        opened = bind("127.0.0.1", 0)

        def say(line):
            said.append(line)
            ready.set()

        service = _service(llm, **settings)
        server = DrainingServer(service, say=say, started="started")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield SimpleNamespace(
                url=url(opened), service=service, server=server, thread=thread, said=said
            )
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            opened.close()
        assert not thread.is_alive()

    return run


@pytest.fixture
def live(listening, llm):
    with listening(llm) as server:
        yield server
    assert_all_given_back(llm)


@pytest.fixture
def until():
    return wait_until


@pytest.fixture
def events():
    return parse_events


def wait_until(condition):
    """Wait for what other threads bring about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def parse_events(text):
    """The data of server-sent events; the last, which is no JSON, is taken off."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def assert_all_given_back(llm):
    status = llm.engine.status
    assert (status.num_waiting, status.num_running) == (0, 0)
    assert status.num_free_pages == status.num_pages
    llm.engine._allocator.check([])
