"""The guard of conftest.py: tests reach this machine and nothing else."""

import socket
import threading
import urllib.request

import pytest


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.create_connection(("example.com", 80), timeout=1),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("2001:db8::1", 80)),
        lambda: urllib.request.urlopen("http://example.com", timeout=1),
        lambda: socket.getaddrinfo(b"example.com", 80),
    ],
)
def test_another_machine_is_out_of_reach(reach):
    with pytest.raises(pytest.fail.Exception, match="tests run without a network"):
        reach()


def test_code_that_retries_on_any_exception_does_not_swallow_the_failure():
    assert not issubclass(pytest.fail.Exception, Exception)


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        socket.create_connection(server.getsockname(), timeout=5).close()
        thread.join()


def test_sockets_without_a_network_work(tmp_path):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))
