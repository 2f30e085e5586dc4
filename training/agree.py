"""Processes of one run that come to one verdict, from any thread and without their devices.

A save ends in a background thread, and a collective of the devices that is started there would
interleave with those of the step. So the processes talk through the coordination service that
`jax.distributed.initialize` has begun, as Orbax does.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

TIMEOUT = 1800.0  # seconds; a dead process ends the others sooner, so this is for a stalled one
_serials = itertools.count()


class PeerError(RuntimeError):
    """Some process could not do its part; what it said."""


class Agreement:
    """The same calls, in the same order, from one thread at a time of every process.

    Alone, a process agrees with itself at once. client: instead of the coordination service's,
    with `process` and `processes`, for tests.
    """

    def __init__(
        self, client: Any = None, process: int | None = None, processes: int | None = None
    ):
        self._client, self._process, self._processes = client, process, processes
        self._name, self._met = None, 0

    @property
    def process(self) -> int:
        return jax.process_index() if self._process is None else self._process

    @property
    def leads(self) -> bool:
        return self.process == 0

    @property
    def processes(self) -> int:
        return jax.process_count() if self._processes is None else self._processes

    def meet(self, text: str = "", *, error: str = "", timeout: float = TIMEOUT) -> list[str]:
        """Waits for all processes; every one's text on the leader, the leader's alone elsewhere.

        error: why this process could not do its part. Raises PeerError on every process, with
        what the first one said, if any brings an error or does not come in `timeout` seconds.
        """
        if self.processes == 1:
            if error:
                raise PeerError(error)
            return [text]
        if self._name is None:
            self._name = f"meshwork/agree/{next(_serials)}"
            self._client = self._client or _service()
        here, self._met = f"{self._name}/{self._met}", self._met + 1
        if self.leads:
            return self._judge(here, text, error, timeout)
        self._client.key_value_set(f"{here}/{self.process}", json.dumps([text, error]))
        text, error = self._get(f"{here}/verdict", timeout)
        if error:
            raise PeerError(error)
        return [text]

    def _judge(self, here: str, text: str, error: str, timeout: float) -> list[str]:
        texts = [text]
        for other in range(1, self.processes):
            if error:  # then nobody needs to be waited for
                break
            told, error = self._get(f"{here}/{other}", timeout)
            error = error and f"{error} (process {other})"
            texts.append(told)
        self._client.key_value_set(f"{here}/verdict", json.dumps([text, error]))
        if error:
            raise PeerError(error)
        # All have come here, so nobody will read what was said the last time.
        self._client.key_value_delete(f"{self._name}/{self._met - 2}/")
        return texts

    def _get(self, key: str, timeout: float) -> tuple[str, str]:
        try:
            text, error = json.loads(self._client.blocking_key_value_get(key, int(timeout * 1000)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return "", f"no answer for {timeout:,.0f} seconds"
        return text, error

    def lead(self, work: Callable[[], Any], *, timeout: float = TIMEOUT) -> Any:
        """What `work()` gives the leader, on every process; JSON.

        timeout: seconds that the others wait for it.

        Where it raises an Exception, that is raised on the leader and a PeerError elsewhere.
        """
        if not self.leads:
            return json.loads(self.meet(timeout=timeout)[0])
        try:
            result = work()
        except Exception as error:
            with contextlib.suppress(PeerError):
                self.meet(error=str(error) or type(error).__name__)
            raise
        self.meet(json.dumps(result))
        return result


def _service() -> Any:
    from jax._src import distributed  # there is no public way to its keys and values

    return distributed.global_state.client
