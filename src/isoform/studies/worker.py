"""A worker of a study: reads runs as lines of JSON, carries them out, and answers each with a line; see `workers`."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    """Ends when its input does: a study that was killed leaves no run behind that goes on without it."""
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    tasks: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(json.loads(line))
        tasks.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while (task := tasks.get()) is not None:
        busy.set()
        answer = _answer(task)
        busy.clear()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    from isoform.errors import IsoformError
    from isoform.studies.workers import do

    try:
        return do(task)
    except IsoformError as error:
        return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        return {"error": "RuntimeError", "message": f"a run failed: {error!r}"}


if __name__ == "__main__":
    main()
