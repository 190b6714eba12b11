"""A decoding process, started by `cdistill.data.lazy` with the arguments ``ARCHIVE C H W``.

It reads requests on stdin, a line of JSON each: a list of jobs (see `cdistill.formats.archives`). To each it answers
on stdout with a line of JSON, null or [kind of error, message], and after null with the pixels, C*H*W bytes an image.
It ends when stdin does, so that it never outlives the process that started it, whatever happened to that one.
"""

import json
import os
import signal
import sys
from pathlib import Path

from cdistill.errors import CdistillError
from cdistill.formats.archives import decode_jobs


def main() -> None:
    """Answers requests until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent decides, and may want to save first
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the pixels
    path, shape = Path(sys.argv[1]), tuple(map(int, sys.argv[2:]))
    try:
        for line in sys.stdin.buffer:
            answers.write(_answer(path, json.loads(line), shape))
            answers.flush()
    except BrokenPipeError:
        os._exit(0)


def _answer(path: Path, jobs: list[list[object]], shape: tuple[int, ...]) -> bytes:
    try:
        images = decode_jobs(path, jobs, shape)
    except CdistillError as error:
        return json.dumps([type(error).__name__, str(error)]).encode() + b"\n"
    return b"null\n" + b"".join(image.tobytes() for image in images)
