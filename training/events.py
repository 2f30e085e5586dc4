"""TensorBoard event files: written straight to the file, and cut back on resume.

Records are framed here rather than queued to tensorboardX's writer threads: every event reaches
the operating system at once (a killed run loses none), and no thread competes with the step.
A file is a sequence of records: length (uint64), its masked crc32c, payload, its masked crc32c.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from tensorboardX import summary as summaries
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

FINAL = "final/"  # tags of what is known only at the end of a run
_HEAD, _CRC = struct.Struct("<Q"), struct.Struct("<I")
_PNG = struct.Struct(">II")  # width and height, at byte 16 of every file


class EventFile:
    """A new event file in `folder`. start: the first step that it may hold."""

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names; a number tells apart two made in
        # the same second.
        number = len(list(folder.glob("*tfevents*")))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number:04d}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._write(0, file_version="brain.Event:2")
        # A TensorBoard that is already running forgets what it read from this step on.
        self._write(start, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        value = [Summary.Value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._write(step, summary=Summary(value=value))

    def text(self, step: int, tag: str, text: str) -> None:
        self._write(step, summary=summaries.text(tag, text))

    def image(self, step: int, tag: str, png: bytes) -> None:
        """png: a whole file, which says its own size."""
        width, height = _PNG.unpack_from(png, 16)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def hparams(self, step: int, config: dict[str, Any], metrics: dict[str, Any]) -> None:
        """config: flat, of bool, int, float, str and None (left out)."""
        final = {FINAL + name: value for name, value in metrics.items()}
        for part in summaries.hparams(config, final):
            self._write(step, summary=part)
        self.scalars(step, final)

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what) -> None:
        data = Event(step=step, wall_time=time.time(), **what).SerializeToString()
        head = _HEAD.pack(len(data))
        crcs = [_CRC.pack(masked_crc32c(part)) for part in (head, data)]
        self._file.write(head + crcs[0] + data + crcs[1])


def cut(folder: pathlib.Path, last_step: int) -> None:
    """Removes every event after `last_step`, and whatever a run writes only at its end."""
    for path in sorted(folder.glob("*tfevents*")):
        kept = [record for record, event in _records(path.read_bytes()) if _keep(event, last_step)]
        if kept:
            temporary = folder / "cut.tmp"
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        else:
            path.unlink()


def _keep(event: Event, last_step: int) -> bool:
    ends = any(value.tag.startswith((FINAL, "_hparams_")) for value in event.summary.value)
    return event.step <= last_step and not ends


def _records(content: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of a file with their events, up to a torn one, where TensorBoard stops too."""
    start = 0
    while (data := start + _HEAD.size + _CRC.size) <= len(content):
        head, crc = content[start : start + _HEAD.size], content[start + _HEAD.size : data]
        end = data + _HEAD.unpack(head)[0]
        if crc != _CRC.pack(masked_crc32c(head)) or end + _CRC.size > len(content):
            return
        yield content[start : end + _CRC.size], Event.FromString(content[data:end])
        start = end + _CRC.size
