"""What an address may look like; rollcall_test.py has what stands in the way at the port."""

import pytest

from launch import port
from launch.port import PortError


@pytest.mark.parametrize("text", ["10.0.0.1", ":80", "host:", "host:many", "host:0", "host:70000"])
def test_an_address_that_is_none(text):
    with pytest.raises(PortError, match=f"--coordinator={text} is not HOST:PORT"):
        port.split(text)


@pytest.mark.parametrize(
    ("text", "host", "loopback"),
    [("[::1]:80", "::1", True), ("a.b:80", "a.b", False), ("127.0.1.1:80", "127.0.1.1", True)],
)
def test_an_address(text, host, loopback):
    assert port.split(text) == (host, 80)
    assert port.is_loopback(host) == loopback
