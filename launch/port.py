"""The port where the processes of a run meet: listened at by process 0, reached by the others.

Whatever stands in the way becomes a PortError, one sentence.
"""

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator

RESOLVING = 30.0  # seconds for a name that a cluster's name service may not have heard of yet
LEAVING = 5.0  # seconds for an earlier run to leave the port
TRYING = 10.0  # seconds for one attempt
PAUSE = 0.2


class PortError(ValueError):
    """The coordinator's address cannot be used; one sentence."""


def split(address: str) -> tuple[str, int]:
    """(host, port) of 'HOST:PORT'; an IPv6 address stands in brackets. Raises PortError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise PortError(
            f"--coordinator={address} is not HOST:PORT, the machine of process 0 and a free port "
            "there, for example 10.0.0.1:8476"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine is meant. A machine's own name may resolve to its loopback too."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def addresses(host: str, port: int) -> list[tuple]:
    """(family, address) of each that the name has. Raises PortError once it is in vain."""
    for last in _attempts(RESOLVING):
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [(family, address) for family, _, _, _, address in found]
        except socket.gaierror as error:
            if last or error.errno == socket.EAI_FAMILY:
                raise PortError(
                    f"the name {host} of the coordinator does not resolve ({error.strerror}); "
                    "give --coordinator a name or an address that every host knows"
                ) from None
    raise AssertionError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: of all addresses of this machine, or of loopback alone if so named."""
    found = addresses(host, port)
    if not any(_is_here(family, address) for family, address in found):
        listed = ", ".join(dict.fromkeys(address[0] for _, address in found))
        raise PortError(
            f"{host} ({listed}) is not an address of this machine; start process 0 there, or name "
            "this machine in --coordinator"
        )
    for last in _attempts(LEAVING):
        try:
            return _listening(host, *found[0])
        except OSError as error:
            if last or error.errno != errno.EADDRINUSE:
                raise PortError(_refused(host, port, error)) from None
    raise AssertionError


def _listening(host: str, family: int, address: tuple) -> socket.socket:
    if is_loopback(host):
        return socket.create_server(address, family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", address[1]), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", address[1]))


def _refused(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        why = "is in use on this machine; end what uses it"
    else:
        why = f"cannot be listened at ({error.strerror}); find out why"
    return f"port {port} {why}, or choose another in --coordinator={host}:PORT"


def _is_here(family: int, address: tuple) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def connect(
    host: str, port: int, seconds: float, told: float, note: Callable[[str], object]
) -> socket.socket:
    """A connection with whoever listens there, tried for that many seconds.

    told: seconds to name in the error.  note(text): called after each attempt that fails.
    """
    found = addresses(host, port)
    why = ""
    for last in _attempts(seconds):
        for family, address in found:
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.settimeout(TRYING)
            try:
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                why = error.strerror or "no answer"
        note(f"nobody listens at {host}:{port} yet ({why})")
        if last:
            break
    raise PortError(
        f"nobody listens at {host}:{port} after {told:.0f} seconds ({why}); is process 0 running "
        "there, and can this machine reach the port?"
    )


def _attempts(seconds: float) -> Iterator[bool]:
    """Pauses between attempts; True for the last one."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        yield False
        time.sleep(min(PAUSE, left))
    yield True
