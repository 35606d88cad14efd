"""``fp8kv serve``: options, refusals, and one server from its start to its end."""

import os
import re
import signal
import subprocess
import sys

import pytest

from fp8kv.demo import MODELS

MODEL = MODELS["tiny-minimax-m2"]
PLAIN = ("--cache", "fp8-unit", "--device", "cpu", "--num-pages", "32", "--port", "0")


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to the server, which ends at once."""
    launch = pytest.importorskip("fp8kv.runtime.server.launch")
    made = []

    def serve(llm, settings, opened, *, say, started):
        made.append((llm, settings, started))
        say(started)
        return 0

    monkeypatch.setattr(launch, "serve", serve)
    monkeypatch.delenv("FP8KV_API_KEY", raising=False)
    return made


def test_one_line_says_what_is_served(run, calls):
    result = run("serve", MODEL, *PLAIN)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    loading, line = result.stderr.splitlines()
    assert loading == "loading weights"
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+/v1 serves tiny-minimax-m2: fp8-unit cache, backend reference on cpu, "
        r"32 pages of 64 tokens; at most 2048 tokens a request, 256 sequences at a time and 1024 waiting, "
        r"16777216 bytes a body",
        line,
    )


def test_options_arrive(run, calls):
    options = ["--served-model-name", "me/it", "--max-queue", "3", "--max-body-bytes", "1000"]
    options += ["--shutdown-timeout", "1.5", "--api-key", "k", "--max-sequences", "4", "--quiet"]
    options += ["--page-size", "16", "--max-batch-tokens", "64", "--count-clipped"]
    result = run("serve", MODEL, *PLAIN, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    llm, settings, started = calls[0]
    assert (settings.model, settings.max_queue, settings.max_body_bytes) == ("me/it", 3, 1000)
    assert (settings.shutdown_seconds, settings.api_key) == (1.5, "k")
    assert (llm.limits.max_sequences, llm.limits.max_batch_tokens) == (4, 64)
    assert llm.max_length == 32 * 16
    assert "32 pages of 16 tokens" in started


def test_the_key_comes_from_the_environment_and_is_not_shown(run, calls, monkeypatch):
    monkeypatch.setenv("FP8KV_API_KEY", "secret")
    result = run("serve", MODEL, *PLAIN)
    assert calls[0][1].api_key == "secret"
    assert "secret" not in result.output


def test_other_machines_and_no_key_are_worth_a_warning(run, calls, monkeypatch):
    from fp8kv.runtime.server import launch

    monkeypatch.setattr(launch, "is_loopback", lambda opened: False)
    assert "warning: " in run("serve", MODEL, *PLAIN, "--quiet").stderr
    assert run("serve", MODEL, *PLAIN, "--quiet", "--api-key", "k").stderr == ""


def test_requests_that_were_cut_short_are_a_failure(run, calls, monkeypatch):
    from fp8kv.runtime.server import launch

    monkeypatch.setattr(launch, "serve", lambda *arguments, **options: 2)
    result = run("serve", MODEL, *PLAIN)
    assert result.exit_code == 3
    assert "2 requests were cut short: give them longer with --shutdown-timeout" in result.stderr


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(run, calls):
    from fp8kv.runtime.server.launch import bind

    with bind("127.0.0.1", 0) as opened:
        opened.listen()
        result = run("serve", "not/there", "--port", str(opened.getsockname()[1]))
    assert result.exit_code == 3
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1 port ")


def test_scales_that_are_missing_are_said(run, calls, caplog):
    options = ["--device", "cpu", "--num-pages", "32", "--port", "0"]
    assert run("serve", MODEL, *options).exit_code == 0
    assert "KV scales are missing and taken as 1.0" in caplog.text


def test_without_the_extra_one_sentence_says_what_to_install(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fp8kv.runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = run("serve", MODEL)
    assert result.exit_code == 3
    assert re.fullmatch(
        r'error: (fastapi|uvicorn) is missing, which fp8kv serve needs: pip install "fp8kv\[serve\]"\n',
        result.stderr,
    )


def test_a_server_from_its_start_to_its_end(tmp_path):
    pytest.importorskip("fastapi")
    import httpx

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fp8kv", "serve", str(MODEL), *PLAIN, "--api-key", "k"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline() == "loading weights\n"
        url = re.match(r"http://\S+/v1", process.stderr.readline())[0]
        body = {"model": "tiny-minimax-m2", "prompt": "Question: Tom has", "temperature": 0}
        headers = {"Authorization": "Bearer k"}
        response = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=60)
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 16
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout, stderr) == (0, "", "")
    finally:
        process.kill()
        process.wait()
